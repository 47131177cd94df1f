"""report.html: one self-contained page on a run. No script, no network, readable on a phone.

Completions are shown unless the job says `output.private`; errors are shown by kind, without values.
"""

from typing import Any

from storage import keys
from storage.commits import CommitCache
from storage.object_store import ObjectStore
from tasks.receipt import rate_text
from tasks.report_facts import ReportFacts, finish_share, report_facts


def write_report(store: ObjectStore, *, cache: CommitCache | None = None) -> bytes:
    """Draw the run's report, store it as `report.html` and return it; `cache` has commits known already.

    Raises:
        BadInput: the folder is not a planned run's.
        StorageError: the run cannot be read, or the report not be written.
    """
    page = render_report(report_facts(store, cache=cache)).encode()
    store.put(keys.REPORT, page)
    return page


def render_report(facts: ReportFacts) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tasks", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,.0f}"
    environment.filters["duration"] = duration
    environment.filters["rate"] = rate_text
    template = environment.get_template("report.html.j2")
    return template.render(facts=facts, cards=_cards(facts), pictures=_pictures(facts))


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cards(facts: ReportFacts) -> list[tuple[str, str]]:
    """The numbers one looks for first."""
    answered = finish_share(facts.rows_by_state)
    tokens = facts.num_completion_tokens
    cards = [
        ("rows", _compact(sum(facts.rows_by_state.values()))),
        ("answered", "-" if answered is None else f"{100 * answered:.2f} %"),
        ("completion tokens", _compact(tokens)),
        ("time", duration(facts.wall_s)),
        ("tokens/s per replica", "-" if facts.rate is None else rate_text(facts.rate)),
        ("replicas", str(facts.num_replicas)),
        ("replica hours", f"{sum(facts.seconds.values()) / 3600:,.2f}"),
        ("cost", "no price given" if facts.usd is None else f"${facts.usd:,.2f}"),
    ]
    if facts.usd is not None and tokens:
        cards.append(("per million tokens", f"${facts.usd / tokens * 1e6:,.3f}"))
    for name, label in (
        ("prefill_share_of_flops", "prefill, of peak FLOP/s"),
        ("decode_share_of_bandwidth", "decode, of memory bandwidth"),
    ):
        share = facts.roofline[name]
        if share is not None:
            cards.append((label, f"{100 * share:.0f} %"))
    return cards


def _compact(count: int) -> str:
    """Return a count that fits into a card."""
    return f"{count:,}" if count < 10**7 else f"{count / 1e6:,.1f} M"


def _pictures(facts: ReportFacts) -> list[dict[str, Any]]:
    # Drawing takes a library that nothing else here needs.
    from markupsafe import Markup

    from tasks import report_pictures as draw

    prompts = {
        str(k): int(v) for k, v in facts.plan.stats.get("prompt_tokens_histogram", {}).items()
    }
    made = [
        ("Throughput", draw.rates_picture(facts.rates) if facts.rates else None),
        (
            "Time by phase",
            draw.phases_picture(facts.seconds) if any(facts.seconds.values()) else None,
        ),
        ("Device", draw.device_picture(facts.device) if facts.device else None),
        ("Prompt lengths", draw.histogram_picture(prompts, "prompt tokens") if prompts else None),
        (
            "Completion lengths",
            draw.histogram_picture(facts.completion_tokens_histogram, "completion tokens")
            if facts.completion_tokens_histogram
            else None,
        ),
    ]
    # Drawn here from numbers and fixed words only: nothing of a row is in it.
    legends = {
        "Device": [
            ("peak memory", draw.ACCENT),
            ("KV blocks in use", draw.SECOND),
            ("utilisation", draw.THIRD),
        ]
    }
    return [
        {"title": title, "svg": Markup(svg), "legend": legends.get(title, [])}
        for title, svg in made
        if svg is not None
    ]

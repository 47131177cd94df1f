"""The report's pictures, as SVG that takes its colours and fonts from the page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

INK = "#010203"  # becomes the page's text colour
ACCENT = "#3b7dd8"
SECOND = "#d9822b"
THIRD = "#45b8ac"
_WIDTH, _HEIGHT = 4.8, 2.3  # inches; scaled to the page, so that letters can be read on a phone
_PALETTE = {
    "stage": "#8c8c8c",
    "load": "#b0a090",
    "warm_up": "#cbbfae",
    "start": "#8a9ba8",
    "canary": "#7a9e7e",
    "read": "#b565a7",
    "tokenise": "#d65076",
    "prefill": THIRD,
    "decode": ACCENT,
    "tail": SECOND,
    "write": "#efc050",
    "other": "#9b9b9b",
}


def rates_picture(rates: Sequence[tuple[float, float]]) -> str:
    """Completion tokens per second over the run."""
    figure, axes = _figure()
    minutes, values = zip(*rates, strict=True)
    axes.fill_between(minutes, values, step="mid", color=ACCENT, alpha=0.25, linewidth=0)
    axes.step(minutes, values, where="mid", color=ACCENT, linewidth=1.5)
    axes.set_xlabel("minutes since the start")
    axes.set_ylabel("completion tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return _svg(figure, "Completion tokens per second over time")


def histogram_picture(histogram: Mapping[str, int], label: str) -> str:
    """Rows by number of tokens; bars are the histogram's buckets."""
    figure, axes = _figure()
    bounds = sorted(int(bound) for bound in histogram)
    counts = [histogram[str(bound)] for bound in bounds]
    axes.bar(range(len(bounds)), counts, width=0.9, color=ACCENT)
    every = max(1, -(-len(bounds) // 7))
    axes.set_xticks(range(0, len(bounds), every), [f"{b:,}" for b in bounds[::every]])
    axes.set_xlabel(f"{label}, up to")
    axes.set_ylabel("rows")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return _svg(figure, f"Rows by {label}")


def phases_picture(seconds: Mapping[str, float]) -> str:
    """Time of all replicas by phase, as shares."""
    shown = [(name, seconds[name]) for name in _PALETTE if seconds.get(name, 0.0) > 0]
    total = sum(value for _, value in shown)
    figure, axes = _figure(height=0.3 * len(shown) + 0.7)
    names = [name.replace("_", " ") for name, _ in shown]
    shares = [100 * value / total for _, value in shown]
    colours = [_PALETTE.get(name, ACCENT) for name, _ in shown]
    bars = axes.barh(range(len(shown)), shares, color=colours)
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.bar_label(bars, [f" {share:.1f} %" for share in shares], color=INK)
    axes.set_xlim(0, max(shares) * 1.18)
    axes.set_xlabel("% of replica time")
    return _svg(figure, "Replica time by phase")


def device_picture(rows: Sequence[Mapping[str, float]]) -> str:
    """Peak device memory, and KV occupancy and utilisation where they are known."""
    figure, axes = _figure()
    minutes = [row["minutes"] for row in rows]
    axes.plot(minutes, [row["memory_gb"] for row in rows], color=ACCENT, linewidth=1.5)
    axes.set_ylim(0, 1.15 * max(row["memory_gb"] for row in rows))
    axes.set_ylabel("peak memory, GB")
    axes.set_xlabel("minutes since the start")
    shares = axes.twinx()
    shares.spines[["top"]].set_visible(False)
    shares.set_ylim(0, 105)
    shares.set_ylabel("KV in use, utilisation, %")
    shares.plot(minutes, [100 * row["kv_occupancy"] for row in rows], color=SECOND, linewidth=1.5)
    used = [(row["minutes"], 100 * row["utilisation"]) for row in rows if "utilisation" in row]
    if used:
        shares.plot(*zip(*used, strict=True), color=THIRD, linewidth=1.5)
    return _svg(figure, "Device memory in blue, KV in use in orange, utilisation in green")


def _figure(height: float = _HEIGHT) -> tuple[Any, Any]:
    # Drawing is heavy, and only for reports; without pyplot there is no global state to leak.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    for axes in figure.axes:
        axes.yaxis.label.set_color(INK)
        axes.tick_params(colors=INK, labelsize=9)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The page decides on the size; the picture keeps its proportions.
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)

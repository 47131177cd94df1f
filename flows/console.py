"""What people see: a live bar on a terminal, one line a minute elsewhere, a table at the end."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from inference.backends.base import BackendInfo
from storage import keys
from storage.errors import NotFound
from storage.object_store import ObjectStore
from tasks.bench import MixResult
from tasks.progress import Progress, Snapshot
from tasks.status import RunStatus
from tasks.verify import Verification

_LINE_EVERY_S = 60.0
_REFRESH_S = 0.25
_SAMPLE_CHARS = 160
_PIPE_COLUMNS = 200  # no table is wider


@contextmanager
def show(progress: Progress, *, as_json: bool) -> Iterator[None]:
    """Render progress on stderr while the body runs."""
    console = Console(stderr=True)
    done = threading.Event()
    target = _live if console.is_terminal and not as_json else _lines
    thread = threading.Thread(target=target, args=(console, progress, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def show_cursor() -> None:
    """Undo what a live bar does to the terminal, in a process that ends without its clean-up."""
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")


def progress_line(snapshot: Snapshot) -> str:
    """Return one plain line: phase, rows, tokens/s, ETA, shard states."""
    shards = ", ".join(f"{count} {state}" for state, count in snapshot.shards.items())
    parts = [snapshot.phase]
    if snapshot.num_rows:
        parts.append(f"{snapshot.rows_done:,}/{snapshot.num_rows:,} rows")
        # Tokens are counted as their rows finish: before the first, nought would be a lie.
        has_any = snapshot.num_completion_tokens > 0
        rate = f"{snapshot.tokens_per_s:,.0f} tokens/s" if has_any else "no row generated yet"
        parts.append(rate)
        parts.append(f"ETA {_duration(snapshot.eta_s)}")
        if snapshot.finish_p50 and snapshot.finish_p90:
            parts.append(f"P50 {clock(snapshot.finish_p50)}, P90 {clock(snapshot.finish_p90)}")
        parts.append(f"shards: {shards or 'none started'} of {snapshot.num_shards}")
    return " | ".join(parts)


def clock(moment: str) -> str:
    """Return a stored moment as this machine's wall clock shows it."""
    return datetime.fromisoformat(moment).astimezone().strftime("%a %H:%M:%S")


def status_line(status: RunStatus) -> str:
    """Return one plain line on a run, all replicas together."""
    done = sum(status.rows_by_state.values())
    parts = [
        "published" if status.is_published else "not published",
        f"{done:,}/{status.num_rows:,} rows",
        f"{status.num_committed:,}/{status.num_shards:,} shards",
    ]
    found = status.outlook
    if found is not None:
        parts.append(f"{found.num_replicas if found.is_running else 0} replicas")
        if found.completion_tokens_per_s is not None:
            parts.append(f"{found.completion_tokens_per_s:,.0f} tokens/s")
        if found.finish_p50 and found.finish_p90:
            parts.append(f"P50 {clock(found.finish_p50)}, P90 {clock(found.finish_p90)}")
        if found.warning:
            parts.append(f"WARNING: {found.warning}")
    return " | ".join(parts)


def print_outcome(
    status: RunStatus, exhausted: Mapping[int, str], completions: list[dict[str, Any]]
) -> None:
    """Print what happened, a few completions, and where everything is."""
    console = _output()
    console.print(_summary_table(status))
    for shard_id, error in exhausted.items():
        console.print(Text(f"shard {shard_id:05d} could not be finished: {error}", style="red"))
    for row in completions:
        console.print(Text(f"row {row['row_index']}: ", style="bold"), end="")
        console.print(Text(_clipped(row["completion"])))
    _print_places(console, status)


def print_status(status: RunStatus) -> None:
    """Print how far a run is."""
    console = _output()
    console.print(_summary_table(status))
    if status.outlook is not None:
        console.print(Text(status_line(status)))
    for shard_id, error in status.failed_shards.items():
        console.print(Text(f"shard {shard_id:05d}, last attempt: {error}", style="red"))
    _print_places(console, status)


def print_tiers(rows: list[dict[str, Any]]) -> None:
    """Print what fits where, the best marked, then what does not fit and why."""
    console = _output()
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for name in ("", "GPU", "weights"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "TP", "copies", "KV tokens", "tokens/s", "hours", "$/M"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (row for row in rows if row["fits"]):
        held = row["dtype"] if row["quantization"] == "none" else row["quantization"]
        table.add_row(
            "*" if row["best"] else "",
            _gpu_name(row),
            held,
            str(row["num_gpus"]),
            str(row["tensor_parallel_size"]),
            str(row["replicas"]),
            f"{row['kv_tokens']:,}",
            _or_dash(row["completion_tokens_per_s"], ",.0f"),
            _or_dash(row["hours"], ".2f"),
            _or_dash(row["usd_per_million_tokens"], ".3f"),
        )
    console.print(table)
    unpredicted = [row["notes"][0] for row in rows if row["fits"] and row["hours"] is None]
    for note in dict.fromkeys(unpredicted):
        console.print(Text(f"- {note}", style="dim"))
    for row in rows:
        if row["fits"] and row["best"]:
            console.print(Text(f"* {row['reason']}"))
        if not row["fits"]:
            nearest = f"; {row['nearest']}" if row["nearest"] else ""
            console.print(
                Text(f"{row['gpu']} {row['quantization']}: {row['reason']}{nearest}", style="dim")
            )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_verification(uri: str, found: Verification) -> None:
    """Print what `verify` found."""
    console = _output()
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(found.counts.items()))
    console.print(f"{found.num_parts} parts read, {found.num_rows:,} rows: {states or 'none'}")
    for violation in found.violations:
        console.print(Text(violation, style="red"))
    if found.missing_shards:
        console.print(f"{len(found.missing_shards)} shards are not committed yet")
    verdict = "whole" if found.is_whole else "NOT whole"
    console.print(f"{escape(uri)} is {verdict}")


def samples(store: ObjectStore, count: int = 3) -> list[dict[str, Any]]:
    """Return a few answered rows of the first part, for the eye."""
    import tempfile
    from pathlib import Path

    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        try:
            store.download(keys.completions(0), path)
        except NotFound:
            return []
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(
                batch_size=256, columns=["row_index", "state", "completion"]
            ):
                return [row for row in batch.to_pylist() if row["state"] == "ok"][:count]
    return []


def print_bench(info: BackendInfo, results: list[MixResult]) -> None:
    """Print what an engine is and how long it took for each mix."""
    console = _output()
    held = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in info.memory.items())
    console.print(
        f"{info.backend} on {info.num_ranks} x {info.device}, {info.dtype}; loaded in {info.load_s:.1f} s, "
        f"warm after {info.warmup_s:.1f} s; {held or 'memory not planned'}"
    )
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    table.add_column("mix", no_wrap=True)
    for name in ("seconds", "prompt tokens", "completion tokens", "completion tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            f"{result.mix}:{result.num_requests}",
            f"{result.seconds:.2f}",
            f"{result.num_prompt_tokens:,}",
            f"{result.num_completion_tokens:,}",
            f"{result.completion_tokens_per_s:,.1f}",
        )
    console.print(table)


def _summary_table(status: RunStatus) -> Table:
    table = Table(title=f"run {status.run_id}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    state = "published" if status.is_published else "not published"
    if status.manifest and status.manifest.revision > 1:
        state += f", revision {status.manifest.revision}"
    table.add_row("state", state)
    table.add_row("shards committed", f"{status.num_committed:,} of {status.num_shards:,}")
    done = sum(status.rows_by_state.values())
    table.add_row("rows", f"{done:,} of {status.num_rows:,}")
    for name, rows in status.rows_by_state.items():
        table.add_row(f"  {name}", f"{rows:,}")
    table.add_row("prompt tokens", f"{status.num_prompt_tokens:,}")
    table.add_row("completion tokens", f"{status.num_completion_tokens:,}")
    rate = (status.manifest.totals if status.manifest else {}).get(
        "completion_tokens_per_replica_s"
    )
    if rate:
        table.add_row("completion tokens/s per replica", f"{rate:,.1f}")
    reused = (status.manifest.totals if status.manifest else {}).get("num_reused_rows")
    if reused:
        table.add_row("copied from earlier runs", f"{reused:,}")
    return table


def _print_places(console: Console, status: RunStatus) -> None:
    console.print(Text(f"completions  {status.uri}/{keys.COMPLETIONS}"))
    console.print(Text(f"receipts     {status.uri}/{keys.METRICS}"))
    if status.is_published:
        console.print(Text(f"manifest     {status.uri}/{keys.manifest()}"))


def _output() -> Console:
    """Return standard output; lines are as long as they are, so a log or a pipe gets a path whole."""
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    return console


def _live(console: Console, progress: Progress, done: threading.Event) -> None:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not done.wait(_REFRESH_S):
            for note in progress.take_notes():
                live.console.print(Text(note))
            live.update(_bar(progress.snapshot()), refresh=True)
    for note in progress.take_notes():
        console.print(Text(note))


def _bar(snapshot: Snapshot) -> Table:
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(1, snapshot.num_rows), completed=snapshot.rows_done, width=30)
    grid.add_row(bar, Text(progress_line(snapshot)))
    return grid


def _lines(console: Console, progress: Progress, done: threading.Event) -> None:
    waited, shown = 0.0, ""
    while not done.wait(_REFRESH_S):
        waited += _REFRESH_S
        for note in progress.take_notes():
            print(note, file=sys.stderr, flush=True)
        snapshot = progress.snapshot()
        if waited >= _LINE_EVERY_S or snapshot.phase.split(",")[0] != shown:
            waited, shown = 0.0, snapshot.phase.split(",")[0]
            print(progress_line(snapshot), file=sys.stderr, flush=True)
    for note in progress.take_notes():
        print(note, file=sys.stderr, flush=True)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _gpu_name(row: dict[str, Any]) -> str:
    return row["gpu"] if row["offload"] == "none" else f"{row['gpu']}, weights on {row['offload']}"


def _clipped(text: str | None) -> str:
    one_line = " ".join((text or "").split())
    return one_line if len(one_line) <= _SAMPLE_CHARS else one_line[: _SAMPLE_CHARS - 3] + "..."

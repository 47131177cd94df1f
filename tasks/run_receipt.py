"""A run's own receipt: its shards' added up over all replicas, and one sentence on the largest loss."""

from collections.abc import Sequence
from typing import Any

from tasks.history import START_PHASES, num_generated_tokens
from tasks.receipt import largest_loss, rate_text

Receipt = dict[str, Any]

_SHARES = {
    "prefill_share_of_flops": ("prefill",),
    "decode_share_of_bandwidth": ("decode", "tail"),
}


def run_seconds(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Return seconds by phase; together they are the replicas' whole time."""
    total: dict[str, float] = {}
    for receipt in receipts:
        for name, value in (receipt.get("seconds") or {}).items():
            total[name] = total.get(name, 0.0) + value
    return total


def run_rate(receipts: Sequence[Receipt]) -> float | None:
    """Return completion tokens per second of a replica, its start left out; None if it never ran."""
    working = sum(v for name, v in run_seconds(receipts).items() if name not in START_PHASES)
    return sum(map(num_generated_tokens, receipts)) / working if working > 0 else None


def run_roofline(receipts: Sequence[Receipt]) -> dict[str, float | None]:
    """Return shares of the roofline, weighted by the time they hold for; None where none is known."""
    found: dict[str, float | None] = {}
    for name, phases in _SHARES.items():
        weighted = seconds = 0.0
        for receipt in receipts:
            share = (receipt.get("roofline") or {}).get(name)
            took = sum(receipt["seconds"].get(p, 0.0) for p in phases) if share is not None else 0.0
            weighted, seconds = weighted + (share or 0.0) * took, seconds + took
        found[name] = weighted / seconds if seconds > 0 else None
    return found


def run_summary(receipts: Sequence[Receipt]) -> str:
    """Return where most of the run's time was lost, in one plain sentence."""
    rate, seconds = run_rate(receipts), run_seconds(receipts)
    if not rate:
        return "No tokens were generated."
    shares = run_roofline(receipts)
    lost = largest_loss(
        seconds, shares["prefill_share_of_flops"], shares["decode_share_of_bandwidth"]
    )
    return f"{rate_text(rate)} tokens/s per replica; {lost}."

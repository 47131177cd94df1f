"""The receipt of a shard: what was done, where each second went, and one plain sentence on it.

`seconds` splits the wall time from the end of this replica's previous shard to the end of this one:

    stage, load, warm_up   once, in the receipt of a replica's first shard
    start                  once: until the first rows came, most of it starting the tokenizer
    canary                 once: the sample that was run before, on the engine that went on
    read, tokenise         the engine had nothing to run: waiting for rows
    prefill, decode        inside the engine
    tail                   decoding while no sequence was waiting and the batch ran empty
    write                  waiting for a part to be written or committed
    other                  whatever is left

`reserved_device_bytes` is what the engine has set aside on each device, by purpose: weights, step (twice what the
largest step was measured to take), graphs, tally (of rows with penalties), spare, kv_cache. Empty for a backend
without a plan; receipts of older versions have none.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inference.backends.base import BackendInfo, EngineStats
from storage import records
from tasks.metering import Mark
from tasks.yardstick import Yardstick, losses

_WORDS = {
    "stage": "staging the weights",
    "load": "loading the model",
    "warm_up": "warming up",
    "start": "starting, until the first rows came",
    "canary": "the canary, a sample that ran before the rest",
    "read": "waiting for rows to be read",
    "tokenise": "waiting for prompts to be rendered and tokenised",
    "prefill": "prefill below the roofline",
    "decode": "decoding below the roofline",
    "tail": "the tail, while the last sequences ended and the batch ran empty",
    "write": "waiting for results to be written",
    "other": "work outside the engine",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """What was written of a shard, beside the engine's totals."""

    states: Counter[str]
    tokens: Counter[str]
    """Of all answers in the part: `prompt`, `completion`, and `context`: tokens before each decoded one,
    summed."""

    lengths: Mapping[str, int]
    reused: Counter[str] = field(default_factory=Counter)
    """Of the answers that were copied from an earlier run: `rows`, `completion`, `context`."""

    num_repetitive: int = 0
    read_s: float = 0.0
    tokenise_s: float = 0.0
    write_s: float = 0.0
    host_peak_bytes: int = 0
    device: dict[str, float] | None = None
    """What the driver said of the GPU meanwhile."""


def shard_receipt(
    *,
    info: BackendInfo,
    stats: EngineStats,
    before: Mark,
    after: Mark,
    facts: ShardFacts,
    yardstick: Yardstick,
) -> dict[str, Any]:
    """Return the receipt as strict JSON values: rates are null when nothing ran, never NaN.

    Reading and writing overlap the engine: what they took in all is under `overlapped_seconds`.
    """
    wall = after.at - before.at
    seconds, counts = _seconds(before, after, wall), _counts(before, after, facts)
    num_generated = counts["num_completion_tokens"] - counts["num_reused_completion_tokens"]
    num_steps = counts["num_steps"]
    prefill_share, decode_share = _shares(yardstick, facts, counts, seconds)
    usd = yardstick.usd(wall)
    return {
        **counts,
        "wall_s": _rounded(wall),
        "seconds": {name: _rounded(value) for name, value in seconds.items()},
        "overlapped_seconds": {
            "read": _rounded(max(0.0, facts.read_s - facts.tokenise_s)),
            "tokenise": _rounded(facts.tokenise_s),
            "write": _rounded(facts.write_s),
        },
        "completion_tokens_per_s": _rate(num_generated, wall) if num_steps else None,
        "roofline": {
            "gpu": yardstick.gpu.name if yardstick.gpu else None,
            "prefill_share_of_flops": _share(prefill_share),
            "decode_share_of_bandwidth": _share(decode_share),
        },
        "usd": None if usd is None else round(usd, 6),
        "peak_host_bytes": facts.host_peak_bytes,
        "peak_device_bytes": stats.peak_device_bytes,
        "reserved_device_bytes": dict(info.memory),
        "device": facts.device,
        "kv_occupancy": _rounded(stats.kv_occupancy),
        "engine": {
            "backend": info.backend,
            "device": info.device,
            "num_ranks": info.num_ranks,
            "dtype": info.dtype,
            "max_num_seqs": info.max_num_seqs,
            "max_model_len": info.max_model_len,
        },
        "summary": _sentence(seconds, num_steps, num_generated, prefill_share, decode_share),
    }


def _counts(before: Mark, after: Mark, facts: ShardFacts) -> dict[str, Any]:
    """Return the part of the receipt that counts rows, tokens and steps."""
    tokens, reused = facts.tokens, facts.reused
    num_prompt_tokens = after.num_prompt_tokens - before.num_prompt_tokens
    num_cached = after.num_cached_tokens - before.num_cached_tokens
    return {
        "rows_by_state": {s: facts.states[s] for s in records.STATES if facts.states[s]},
        "num_rows": sum(facts.states.values()),
        "num_sequences": sum(facts.lengths.values()) - reused["rows"],
        "num_reused_rows": reused["rows"],
        "num_repetitive": facts.num_repetitive,
        "num_prompt_tokens": tokens["prompt"],
        "num_completion_tokens": tokens["completion"],
        "num_reused_completion_tokens": reused["completion"],
        "num_tail_tokens": after.meter.tail_tokens - before.meter.tail_tokens,
        "num_prefilled_tokens": max(0, num_prompt_tokens - num_cached),
        "num_cached_prompt_tokens": num_cached,
        "completion_tokens_histogram": dict(facts.lengths),
        "num_steps": after.num_steps - before.num_steps,
        "num_preemptions": after.num_preemptions - before.num_preemptions,
    }


def _shares(
    yardstick: Yardstick,
    facts: ShardFacts,
    counts: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> tuple[float | None, float | None]:
    """Return what prefill reached of the arithmetic peak and decoding of the bandwidth, where known."""
    decode_s = seconds["decode"] + seconds["tail"]
    engine_s = decode_s + seconds["prefill"]
    prefill_share = yardstick.prefill_share(
        counts["num_prefilled_tokens"],
        facts.tokens["prompt"] / max(1, sum(facts.lengths.values())),
        seconds["prefill"],
    )
    decode_share = yardstick.decode_share(
        counts["num_steps"] * decode_s / engine_s if engine_s > 0 else 0.0,
        facts.tokens["context"] - facts.reused["context"],
        decode_s,
    )
    return prefill_share, decode_share


def _seconds(before: Mark, after: Mark, wall: float) -> dict[str, float]:
    def spent(name: str) -> float:
        return float(getattr(after.meter, name) - getattr(before.meter, name))

    step, tail = spent("step_s"), spent("tail_s")
    prefill = after.prefill_s - before.prefill_s
    counted = prefill + after.decode_s - before.decode_s
    # The engine says how its steps divide; how long they took is measured from outside.
    prefill = step * prefill / counted if counted > 0 else 0.0
    tail = min(tail, step - prefill)
    seconds = {
        "stage": spent("stage_s"),
        "load": spent("load_s"),
        "warm_up": spent("warmup_s"),
        "start": spent("start_s"),
        "canary": spent("canary_s"),
        "read": spent("read_s"),
        "tokenise": spent("tokenise_s"),
        "prefill": prefill,
        "decode": step - prefill - tail,
        "tail": tail,
        "write": spent("write_s"),
    }
    return seconds | {"other": max(0.0, wall - sum(seconds.values()))}


def _sentence(
    seconds: dict[str, float],
    num_steps: int,
    num_tokens: int,
    prefill_share: float | None,
    decode_share: float | None,
) -> str:
    wall = sum(seconds.values())
    if wall <= 0 or not num_tokens:
        return "No tokens were generated."
    if not num_steps:
        return "It ended in the same step as the shard before it, whose receipt has the time."
    rate = f"{rate_text(num_tokens / wall)} tokens/s over {wall:,.1f} s"
    return f"{rate}; {largest_loss(seconds, prefill_share, decode_share)}."


def largest_loss(
    seconds: Mapping[str, float], prefill_share: float | None, decode_share: float | None
) -> str:
    """Say what most of the time was lost to; the end of a sentence.

    Args:
        seconds: All of the time, by phase.
        prefill_share: Of the arithmetic peak, in prefill; None if it is not known.
        decode_share: Of the memory's bandwidth, in decoding; likewise.
    """
    name, lost = max(losses(seconds, prefill_share, decode_share).items(), key=lambda i: i[1])
    share = round(100 * lost / sum(seconds.values()))
    if share < 1:
        return "nothing was lost that is worth a per cent"
    what = _WORDS[name]
    if name == "decode" and decode_share is not None:
        what = f"decoding at {100 * decode_share:.0f} % of the memory's bandwidth"
    if name == "prefill" and prefill_share is not None:
        what = f"prefill at {100 * prefill_share:.0f} % of the arithmetic peak"
    return f"the largest loss, {share} %, was {what}"


def rate_text(value: float) -> str:
    """Return a rate as people read it."""
    return f"{value:,.0f}" if value >= 10 else f"{value:,.1f}"


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds > 0 else None


def _share(value: float | None) -> float | None:
    return None if value is None else _rounded(value)


def _rounded(value: float) -> float:
    return round(value, 4) if math.isfinite(value) else 0.0

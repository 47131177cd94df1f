"""The receipt of a shard: what was done, how long each phase took, and one plain sentence on it."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from inference.backends.base import BackendInfo, EngineStats
from storage import records


@dataclass(frozen=True, slots=True)
class EngineMark:
    """Engine totals at one moment; a receipt covers what lies between two."""

    at: float  # monotonic seconds
    prefill_s: float
    decode_s: float
    num_steps: int
    num_preemptions: int
    num_cached_tokens: int
    num_completion_tokens: int
    starved_s: float  # the engine had nothing to run: waiting for rows

    @classmethod
    def take(cls, stats: EngineStats, *, at: float, starved_s: float) -> "EngineMark":
        """Copy the running totals."""
        return cls(
            at=at,
            prefill_s=stats.prefill_s,
            decode_s=stats.decode_s,
            num_steps=stats.num_steps,
            num_preemptions=stats.num_preemptions,
            num_cached_tokens=stats.num_cached_tokens,
            num_completion_tokens=stats.num_completion_tokens,
            starved_s=starved_s,
        )


def shard_receipt(
    *,
    info: BackendInfo,
    stats: EngineStats,
    before: EngineMark,
    after: EngineMark,
    states: Counter[str],
    tokens: Counter[str],
    read_s: float,
    write_s: float,
    stage_s: float,
    host_peak_bytes: int,
) -> dict[str, Any]:
    """Return the receipt as strict JSON values: rates are null when nothing ran, never NaN.

    `seconds` splits the wall time since this replica's previous shard ended; reading and writing
    overlap the engine, so they stand beside it under `overlapped_seconds`.
    """
    wall = after.at - before.at
    prefill, decode = after.prefill_s - before.prefill_s, after.decode_s - before.decode_s
    starved = after.starved_s - before.starved_s
    seconds = {
        "prefill": prefill,
        "decode": decode,
        "waiting_for_rows": starved,
        "other": max(0.0, wall - prefill - decode - starved),
    }
    return {
        "rows_by_state": {state: states[state] for state in records.STATES if states[state]},
        "num_rows": sum(states.values()),
        "num_prompt_tokens": tokens["prompt"],
        "num_completion_tokens": tokens["completion"],
        "num_cached_prompt_tokens": after.num_cached_tokens - before.num_cached_tokens,
        "num_steps": after.num_steps - before.num_steps,
        "num_preemptions": after.num_preemptions - before.num_preemptions,
        "wall_s": _rounded(wall),
        "seconds": {name: _rounded(value) for name, value in seconds.items()},
        "overlapped_seconds": {"read_and_tokenise": _rounded(read_s), "write": _rounded(write_s)},
        "replica_seconds": {
            "stage": _rounded(stage_s),
            "load": _rounded(info.load_s),
            "warm_up": _rounded(info.warmup_s),
        },
        "completion_tokens_per_s": _rate(tokens["completion"], wall),
        "peak_host_bytes": host_peak_bytes,
        "peak_device_bytes": stats.peak_device_bytes,
        "kv_occupancy": _rounded(stats.kv_occupancy),
        "engine": {
            "backend": info.backend,
            "device": info.device,
            "dtype": info.dtype,
            "max_num_seqs": info.max_num_seqs,
            "max_model_len": info.max_model_len,
        },
        "summary": _sentence(seconds, wall, tokens["completion"]),
    }


def _sentence(seconds: dict[str, float], wall: float, num_tokens: int) -> str:
    if wall <= 0 or not num_tokens:
        return "No tokens were generated."
    words = {
        "prefill": "reading prompts (prefill)",
        "decode": "generating tokens (decode)",
        "waiting_for_rows": "waiting for rows to be read and tokenised",
        "other": "work outside the engine",
    }
    name, longest = max(seconds.items(), key=lambda item: item[1])
    share = round(100 * longest / wall)
    return (
        f"{share} % of {wall:.1f} s went into {words[name]}, at {num_tokens / wall:,.0f} tokens/s."
    )


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds > 0 else None


def _rounded(value: float) -> float:
    return round(value, 4) if math.isfinite(value) else 0.0

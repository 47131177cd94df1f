"""How long a replica takes for a whole workload: prefill, steady state, drain; static batches; or offloaded passes."""

import math
from dataclasses import dataclass

from inference.roofline import PREFILL_CHUNK_TOKENS, STATIC_PASS_TOKENS, Replica
from inference.workload import SequenceClass, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds of generation for one replica's share, start-up not counted."""

    prefill_s: float
    """Steps that only prefill; in the steady state prefill rides along and counts there."""

    steady_s: float
    drain_s: float
    num_running: float
    """Sequences that run at once while the batch is full."""

    @property
    def seconds(self) -> float:
        """All phases together."""
        return self.prefill_s + self.steady_s + self.drain_s


def predict(replica: Replica, workload: Workload) -> Prediction:
    """Predict one replica's time for `workload`; its KV room must hold the longest sequence.

    The engine spreads the work evenly over the steps that the longest completion needs anyway, if so many
    sequences fit at once. It does not where a mixture of experts would read all its weights for few tokens.
    The transformers backend runs batches one after the other.
    """
    mean = _Means.of(workload)
    if replica.backend == "transformers":
        return _in_batches(replica, workload, mean)
    held = mean.prompt - mean.reused + mean.age
    room = replica.kv_tokens / max(held, 1.0)
    if mean.completion > 0 and not replica.shape.is_moe:
        evenly = _evenly(replica, workload, mean)
        if evenly.num_running <= min(room, replica.max_num_seqs):
            return evenly
    running = max(min(room, replica.max_num_seqs, workload.num_sequences), min(1.0, mean.count))
    steady_tokens = mean.count * mean.completion - running * mean.residual
    if running >= workload.num_sequences or steady_tokens <= 0:
        return _all_at_once(replica, workload, mean, running)
    steps = steady_tokens / running
    prefill = mean.count * (mean.prompt - mean.reused) / steps
    steady = steps * replica.step_s(
        running, prefill, mean.prompt + mean.age, mean.prompt, shared=mean.reused
    )
    drain = _drain_s(replica, workload, _residual_survivors(workload, running, mean), mean.age)
    return Prediction(prefill_s=0.0, steady_s=steady, drain_s=drain, num_running=running)


def _in_batches(replica: Replica, workload: Workload, mean: "_Means") -> Prediction:
    """Batches of rows that start together, one after the other; each lasts as long as its longest completion."""
    longest = mean.prompt + workload.classes[-1].num_completion_tokens
    fits = (STATIC_PASS_TOKENS // max(mean.prompt, 1.0), replica.kv_tokens // max(longest, 1.0))
    rows = max(1.0, min(replica.max_num_seqs, mean.count, *fits))
    num_full, rest = divmod(mean.count, rows)
    num_steps = num_full * _longest_of(workload, rows)
    if rest:
        num_steps += _longest_of(workload, max(rest, 1.0))
    if rows * max(c.num_prompt_tokens for c in workload.classes) > STATIC_PASS_TOKENS:
        num_steps += mean.completion  # of the few longest prompts, which fit in no batch of so many
    chunk = min(mean.count * mean.prompt, STATIC_PASS_TOKENS)
    num_chunks = mean.count * mean.prompt / max(chunk, 1.0)
    num_open = mean.count * mean.completion / num_steps if num_steps else 0.0
    step_s = replica.step_s(num_open, 0, mean.prompt + mean.age, mean.prompt)
    return Prediction(
        prefill_s=num_chunks * replica.step_s(0, chunk, 0, mean.prompt),
        steady_s=num_steps * step_s,
        drain_s=0.0,
        num_running=rows,
    )


def _longest_of(workload: Workload, rows: float) -> float:
    """Expected longest completion of so many of the workload's rows."""
    count, found, before, shorter = workload.num_sequences, 0.0, 0.0, 0.0
    rows = min(rows, count)
    for c in workload.classes:
        shorter += c.count
        chance = 0.0
        if shorter > rows - 0.5:  # all of them are among these
            chance = math.exp(_log_choices(min(shorter, count), rows) - _log_choices(count, rows))
        found += c.num_completion_tokens * (chance - before)
        before = chance
    return found


def _log_choices(count: float, rows: float) -> float:
    """Logarithm of how many ways there are to choose so many rows."""
    left = max(count - rows, 0.0)
    return math.lgamma(count + 1) - math.lgamma(left + 1) - math.lgamma(rows + 1)


def predict_offloaded(
    replica: Replica, workload: Workload, *, source_bandwidth: float, num_ranks: int
) -> tuple[Prediction, float]:
    """Predict a replica whose weights pass through the GPU once a step, from host memory or NVMe.

    `source_bandwidth` is the bytes a second one rank gets; `num_ranks` GPUs each read their part of a
    layer and gather the rest. Returns the prediction for the whole workload and the seconds of a pass.
    """
    mean = _Means.of(workload)
    weights = replica.shape.weight_bytes(replica.dtype, replica.quantization)
    pass_s = weights / (source_bandwidth * num_ranks)
    # Two layers are on the card at a time, one at work and one arriving.
    resident = 2 * weights / replica.shape.num_layers
    room = (replica.gpu.usable_bytes - resident) / replica.kv_bytes_per_token_per_gpu
    held = max(mean.prompt - mean.reused + mean.age, 1.0)
    per_rank = mean.count / num_ranks
    running = max(min(room / held, replica.max_num_seqs, per_rank), min(1.0, per_rank))
    waves = max(per_rank / running, 1.0)
    longest = workload.classes[-1].num_completion_tokens
    # While sequences wait, the batch is full; the last wave lasts as long as its longest completion.
    steps = (waves - 1) * mean.completion + longest
    chunks = math.ceil(per_rank * (mean.prompt - mean.reused) / PREFILL_CHUNK_TOKENS)
    decode_s = max(pass_s, replica.step_s(running, 0, mean.prompt + mean.age, mean.prompt))
    prefill_s = max(pass_s, replica.step_s(0, PREFILL_CHUNK_TOKENS, 0, mean.prompt))
    prediction = Prediction(
        prefill_s=chunks * prefill_s,
        steady_s=(steps - longest) * decode_s,
        drain_s=longest * decode_s,
        num_running=running,
    )
    return prediction, pass_s


@dataclass(frozen=True, slots=True)
class _Means:
    """Means over a workload's sequences, in tokens."""

    count: float
    prompt: float
    reused: float
    completion: float
    age: float
    """Mean completion tokens a running sequence has so far: long ones are seen more often."""

    residual: float
    """Mean completion tokens a running sequence still has to go; by symmetry equal to `age`."""

    @classmethod
    def of(cls, workload: Workload) -> "_Means":
        count = workload.num_sequences
        completion = workload.num_completion_tokens / count
        square = sum(c.count * c.num_completion_tokens**2 for c in workload.classes) / count
        age = square / (2 * completion) if completion > 0 else 0.0
        return cls(
            count=count,
            prompt=workload.num_prompt_tokens / count,
            reused=workload.num_reused_prompt_tokens / count,
            completion=completion,
            age=age,
            residual=age,
        )


def _evenly(replica: Replica, workload: Workload, mean: _Means) -> Prediction:
    """As many steps as the longest completion has tokens, each with its share of all the work."""
    num_steps = workload.classes[-1].num_completion_tokens + 1
    completion = workload.num_completion_tokens
    context = sum(
        c.count * c.num_completion_tokens * (c.num_prompt_tokens + c.num_completion_tokens / 2)
        for c in workload.classes
    )
    num_decode = completion / num_steps
    prefill = mean.count * (mean.prompt - mean.reused) / num_steps
    step_s = replica.step_s(
        num_decode, prefill, context / completion, mean.prompt, shared=mean.reused
    )
    return Prediction(
        prefill_s=0.0, steady_s=num_steps * step_s, drain_s=0.0, num_running=num_decode
    )


def _all_at_once(replica: Replica, workload: Workload, mean: _Means, running: float) -> Prediction:
    """Everything runs from the first step on: prefill it all, then decode until the last one ends."""
    prefill_tokens = mean.count * (mean.prompt - mean.reused)
    chunk = min(prefill_tokens, PREFILL_CHUNK_TOKENS)
    prefill_s = 0.0
    if prefill_tokens > 0:
        prefill_s = (
            prefill_tokens / chunk * replica.step_s(0, chunk, 0, mean.prompt, shared=mean.reused)
        )
    survivors = [_survivors(workload.classes, index) for index in range(len(workload.classes))]
    return Prediction(
        prefill_s=prefill_s,
        steady_s=0.0,
        drain_s=_drain_s(replica, workload, survivors, 0.0),
        num_running=running,
    )


def _drain_s(replica: Replica, workload: Workload, survivors: list[float], age: float) -> float:
    """Seconds until the last sequence ends; `survivors[i]` run between completion lengths i-1 and i."""
    prompt = workload.num_prompt_tokens / workload.num_sequences
    shared = workload.num_reused_prompt_tokens / workload.num_sequences
    total, before = 0.0, 0.0
    for sequence_class, running in zip(workload.classes, survivors, strict=True):
        length = sequence_class.num_completion_tokens
        if running > 0 and length > before:
            context = prompt + age + (before + length) / 2
            step_s = replica.step_s(running, 0, context, prompt, shared=shared)
            total += (length - before) * step_s
        before = max(before, length)
    return total


def _survivors(classes: tuple[SequenceClass, ...], index: int) -> float:
    return sum(c.count for c in classes[index:])


def _residual_survivors(workload: Workload, running: float, mean: _Means) -> list[float]:
    """Of `running` sequences at random ages, how many still run in each interval of lengths."""
    classes, count = workload.classes, mean.count
    survivors, before = [], 0.0
    for sequence_class in classes:
        middle = (before + sequence_class.num_completion_tokens) / 2
        beyond = sum(c.count * max(c.num_completion_tokens - middle, 0.0) for c in classes) / count
        survivors.append(running * beyond / mean.completion)
        before = max(before, sequence_class.num_completion_tokens)
    return survivors

"""DummyBackend: the engine protocol without a model, for tests, demos and dry runs. No torch.

A completion is a pure function of the prompt's ids, the sampling and the draw seed: a few words, most often
ended by `stop` and now and then by `length`. Several sequences run at once, one token each per step.
"""

import hashlib
import heapq
import time
from array import array
from collections import deque
from collections.abc import Iterable

from inference.backends.base import BackendInfo, EngineStats
from inference.backends.checks import check_sequence
from inference.backends.dummy_tokenizer import FIRST_WORD_ID, WORDS, DummyTokenizer
from inference.config import EngineConfig
from inference.detokenise import StopChecker, finish_text
from inference.sampling import SamplingParams
from inference.sequence import Completion, FinishReason, Sequence, TokenLogprob

DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_MODEL_LEN = 32_768
_LONGEST_NATURAL = 96  # tokens; one completion in 16 never ends by itself


class DummyBackend:
    """A deterministic engine; see `inference.backends.base.Backend` for the protocol."""

    def __init__(self, config: EngineConfig, *, step_s: float = 0.0) -> None:
        """Build it at once; `step_s` makes every step last that long, to be interrupted by tests."""
        max_num_seqs = config.max_num_seqs
        max_model_len = config.max_model_len
        self._info = BackendInfo(
            backend="dummy",
            device="none",
            dtype="none",
            max_model_len=DEFAULT_MAX_MODEL_LEN if max_model_len == "auto" else max_model_len,
            max_num_seqs=DEFAULT_MAX_NUM_SEQS if max_num_seqs == "auto" else max_num_seqs,
        )
        self._stats = EngineStats()
        self._step_s = step_s
        self._tokenizer = DummyTokenizer()
        self._seq_ids: set[int] = set()
        self._waiting: deque[Sequence] = deque()
        self._running: list[tuple[int, int, Completion]] = []  # heap: (last step, start order, ...)
        self._num_started = 0

    @property
    def info(self) -> BackendInfo:
        """What was built."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """Totals so far; the same object, updated in place."""
        return self._stats

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned."""
        return len(self._seq_ids)

    @property
    def num_waiting(self) -> int:
        """Sequences submitted and not yet started."""
        return len(self._waiting)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences; see `inference.backends.checks.check_sequence` for what is refused."""
        for sequence in sequences:
            check_sequence(sequence, self._seq_ids, self._info.max_model_len)
            self._seq_ids.add(sequence.seq_id)
            self._waiting.append(sequence)

    def step(self) -> list[Completion]:
        """Start what there is room for, add one token to every running sequence, return the finished."""
        started_at = time.perf_counter()
        while self._waiting and len(self._running) < self._info.max_num_seqs:
            self._start(self._waiting.popleft())
        if not self._running:
            return []
        if self._step_s:
            time.sleep(self._step_s)
        self._stats.num_steps += 1
        finished: list[Completion] = []
        while self._running and self._running[0][0] <= self._stats.num_steps:
            completion = heapq.heappop(self._running)[2]
            self._seq_ids.remove(completion.seq_id)
            self._stats.num_completion_tokens += len(completion.token_ids)
            finished.append(completion)
        self._stats.decode_s += time.perf_counter() - started_at
        return finished

    def close(self) -> None:
        """Forget everything submitted. Safe to repeat."""
        self._waiting.clear()
        self._running.clear()
        self._seq_ids.clear()

    def _start(self, sequence: Sequence) -> None:
        completion = self._complete(sequence)
        last_step = self._stats.num_steps + max(1, len(completion.token_ids))
        heapq.heappush(self._running, (last_step, self._num_started, completion))
        self._num_started += 1
        self._stats.num_prompt_tokens += len(sequence.prompt_token_ids)

    def _complete(self, sequence: Sequence) -> Completion:
        sampling = sequence.sampling
        room = self._info.max_model_len - len(sequence.prompt_token_ids)
        max_tokens = min(sampling.max_tokens, room)
        draws = _draws(sequence, max_tokens)
        num_natural = max(sampling.min_tokens, 1 + draws[0] % _LONGEST_NATURAL)
        if sampling.ignore_eos or draws[1] % 16 == 0:
            num_natural = max_tokens + 1
        token_ids = [FIRST_WORD_ID + draw for draw in draws[2 : 2 + min(num_natural, max_tokens)]]
        finish_reason: FinishReason = "stop" if num_natural <= max_tokens else "length"
        token_ids, text, is_stopped = self._cut(token_ids, sampling)
        return Completion(
            seq_id=sequence.seq_id,
            token_ids=tuple(token_ids),
            text=text,
            finish_reason="stop" if is_stopped else finish_reason,
            logprobs=_logprobs(token_ids, sampling.logprobs),
        )

    def _cut(self, token_ids: list[int], sampling: SamplingParams) -> tuple[list[int], str, bool]:
        """Return (token_ids, text, is_stopped) up to the first stop token or stop string."""
        is_stopped = False
        for position in range(sampling.min_tokens, len(token_ids)):
            if token_ids[position] in sampling.stop_token_ids:
                token_ids, is_stopped = token_ids[:position], True
                break
        decode = self._tokenizer.decode
        text, is_cut = finish_text(decode, token_ids, sampling.stop, sampling.min_tokens)
        if not is_cut:
            return token_ids, text, is_stopped
        checker = StopChecker(decode, sampling.stop, sampling.min_tokens)
        num_read = next(i for i, token_id in enumerate(token_ids, 1) if checker.append(token_id))
        return token_ids[:num_read], text, True


def _draws(sequence: Sequence, max_tokens: int) -> bytes:
    """Return the bytes that decide the completion: its length, then one per token; more only add to them."""
    sampling = sequence.sampling
    text = "greedy"
    if not sampling.is_greedy:
        seed = sequence.draw_seed
        text = f"{seed} {sampling.temperature} {sampling.top_p} {sampling.top_k} {sampling.min_p}"
    penalties = (
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    digest = hashlib.shake_256(array("q", sequence.prompt_token_ids).tobytes())
    digest.update(f"{text} {penalties}".encode())
    return digest.digest(2 + max(max_tokens, _LONGEST_NATURAL))


def _logprobs(token_ids: list[int], num_top: int | None) -> tuple[TokenLogprob, ...] | None:
    if num_top is None:
        return None
    rows = []
    for token_id in token_ids:
        best = -0.01 * (1 + token_id % 16)
        ids = [FIRST_WORD_ID + (token_id - FIRST_WORD_ID + i) % len(WORDS) for i in range(num_top)]
        top = tuple((other, best - rank) for rank, other in enumerate(ids))
        rows.append(TokenLogprob(token_id, best, top))
    return tuple(rows)

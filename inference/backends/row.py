"""Row: one running sequence, token by token, until something ends it. Shared by the backends that run models."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from inference.detokenise import Decode, StopChecker, decoder_of, finish_text
from inference.end_tokens import special_token_ids
from inference.sequence import Completion, FinishReason, Sequence, TokenLogprob
from inference.stop_strings import StopStrings, StopWatch


@dataclass(slots=True, eq=False)
class Row:
    """One sequence and its completion so far.

    open --append--> open | finished (`stop`, `length`)
      `----fail----> finished (`error`)
    """

    sequence: Sequence
    decode: Decode
    end_token_ids: Collection[int]
    """The model's end tokens; they count unless `ignore_eos`."""

    stop_token_ids: Collection[int]
    """The caller's."""

    max_tokens: int
    """Most completion tokens, with max_model_len taken into account."""

    stop_watch: StopWatch | None = None
    """Of the sampling's stop strings, where the tokenizer allows one."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    _stop_checker: StopChecker = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sequence.sampling
        self._stop_checker = StopChecker(self.decode, sampling.stop, sampling.min_tokens)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens so far."""
        return len(self.sequence.prompt_token_ids) + len(self.token_ids)

    @property
    def max_num_tokens(self) -> int:
        """Most prompt and completion tokens it can come to."""
        return len(self.sequence.prompt_token_ids) + self.max_tokens

    @property
    def all_token_ids(self) -> list[int]:
        """Prompt, then completion so far."""
        return [*self.sequence.prompt_token_ids, *self.token_ids]

    def append(self, token_id: int, logprob: TokenLogprob | None) -> bool:
        """Take one sampled token; return whether it finished the sequence."""
        sampling = self.sequence.sampling
        is_end = not sampling.ignore_eos and token_id in self.end_token_ids
        if (is_end or token_id in self.stop_token_ids) and len(
            self.token_ids
        ) >= sampling.min_tokens:
            self.finish_reason = "stop"
            return True
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        # Candidates are found fast; the text decoded as a whole decides.
        if self._may_be_stopped(token_id) and self.is_stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def _may_be_stopped(self, token_id: int) -> bool:
        if self.stop_watch is None:
            return self._stop_checker.append(token_id)
        return self.stop_watch.may_end(token_id) and self.stop_watch.is_near(self.token_ids)

    @property
    def is_stopped(self) -> bool:
        """Whether the text so far holds a stop string that counts."""
        return self._finish_text()[1]

    def fail(self, error: str) -> None:
        """End the sequence with an error; what it has so far is kept."""
        self.finish_reason, self.error = "error", error

    def completion(self, num_cached_tokens: int = 0) -> Completion:
        """Return the finished sequence's completion."""
        if self.finish_reason is None:
            raise ValueError(f"seq_id {self.sequence.seq_id} is not finished; step the backend on")
        text, is_stopped = self._finish_text()
        finish_reason = self.finish_reason
        if is_stopped and finish_reason == "length":
            finish_reason = "stop"
        return Completion(
            seq_id=self.sequence.seq_id,
            token_ids=tuple(self.token_ids),
            text=text,
            finish_reason=finish_reason,
            error=self.error,
            logprobs=None if self.sequence.sampling.logprobs is None else tuple(self.logprobs),
            num_cached_tokens=num_cached_tokens,
        )

    def _finish_text(self) -> tuple[str, bool]:
        sampling = self.sequence.sampling
        return finish_text(self.decode, self.token_ids, sampling.stop, sampling.min_tokens)


class RowMaker:
    """Makes rows for one model: what its tokenizer decodes, what ends a completion, how long one may be."""

    def __init__(self, tokenizer: Any, end_token_ids: Collection[int], max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._decode = decoder_of(tokenizer)
        self._stop_strings = StopStrings(tokenizer)
        self._end_token_ids = frozenset(end_token_ids)
        self._max_model_len = max_model_len

    def __call__(self, sequence: Sequence) -> Row:
        """Return the row a sequence starts as."""
        sampling = sequence.sampling
        stop_token_ids = frozenset(sampling.stop_token_ids)
        if sampling.stop:
            stop_token_ids |= special_token_ids(self._tokenizer, sampling.stop)
        return Row(
            sequence=sequence,
            decode=self._decode,
            end_token_ids=self._end_token_ids,
            stop_token_ids=stop_token_ids,
            stop_watch=self._stop_strings.watch_of(sampling.stop) if sampling.stop else None,
            max_tokens=min(
                sampling.max_tokens, self._max_model_len - len(sequence.prompt_token_ids)
            ),
        )

"""Steps: what the scheduler knows of a sequence, and what one forward pass computes. No torch here."""

from dataclasses import dataclass, field

from inference.block_manager import ROOT
from inference.sequence import Sequence


@dataclass(slots=True, eq=False)
class Running:
    """A sequence with what the scheduler knows of it, from its submission to its last token."""

    sequence: Sequence
    token_ids: list[int]
    """What prefill computes: the prompt, after a preemption with the completion so far."""

    max_tokens: int
    """Most completion tokens, with max_model_len taken into account."""

    num_sampled: int = 0
    """Completion tokens already in `token_ids`."""

    slot: int = -1
    row: int = -1
    block_table: list[int] = field(default_factory=list)
    num_grown_blocks: int = 0
    """Blocks that were added to its table when it last grew."""

    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_shared_blocks: int = 0
    """Leading blocks that enough other rows hold too, as of when it began to decode."""

    prefix_id: int = ROOT
    num_registered_blocks: int = 0
    joined_at: int = -1
    """Step number of its first decode."""

    last_step: int = -1
    """Step number that samples its last allowed token."""

    num_expected_tokens: int = 0
    """Completion tokens planned for, counted from the start."""

    num_missing_blocks: int = 0
    """Blocks that its table would still get if it came to its longest."""

    num_planned_cached: int = 0
    """Prompt tokens that a sequence submitted before has in common, so that they should be cached."""

    is_finished: bool = False

    @property
    def num_tokens_left(self) -> int:
        """Completion tokens still to sample once prefill is through."""
        return self.max_tokens - self.num_sampled

    @property
    def num_most_tokens(self) -> int:
        """Tokens whose keys it stores if it comes to its limit; that of the last token is not needed."""
        return len(self.token_ids) + self.num_tokens_left - 1

    def num_stored(self, step: int) -> int:
        """Tokens whose keys are stored before a step, once prefill is through."""
        return len(self.token_ids) + (max(0, step - self.joined_at) if self.row >= 0 else 0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive prompt tokens of one sequence, computed in one step."""

    running: Running
    start: int
    num_tokens: int
    is_last: bool
    """Whether the step samples this sequence's first token."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes. Rows sampled: all decodes, then the chunks that are last."""

    number: int
    decodes: list[Running]
    has_new_rows: bool
    """Whether `decodes` differs from the step before in who is there or in what order."""

    chunks: list[Chunk]
    admitted: list[Running]
    """Sequences that got their slot and blocks in this step."""

    grown: list[Running]
    """Sequences that got more blocks in this step."""

    finishing: list[Running]
    """Sequences whose last allowed token this step samples; their blocks are free after it."""

    sampled: list[Running]
    """The sequences that get a token, in row order: all decodes, then the chunks that are last."""

"""What every backend refuses when sequences are submitted."""

from collections.abc import Container, Iterable

from inference.sequence import Sequence


def check_sequence(sequence: Sequence, seq_ids: Container[int], max_model_len: int) -> None:
    """Refuse a sequence no backend can take.

    Raises:
        ValueError: its seq_id is in `seq_ids`, its prompt is empty, or leaves no room for one token.
    """
    num_prompt_tokens = len(sequence.prompt_token_ids)
    if sequence.seq_id in seq_ids:
        raise ValueError(f"seq_id {sequence.seq_id} is already in use; number sequences uniquely")
    if num_prompt_tokens == 0:
        raise ValueError(f"seq_id {sequence.seq_id}: the prompt is empty; give at least one token")
    if num_prompt_tokens >= max_model_len:
        raise ValueError(
            f"seq_id {sequence.seq_id}: {num_prompt_tokens} prompt tokens leave no room in "
            f"max_model_len ({max_model_len}); shorten the prompt or raise engine.max_model_len"
        )


def check_sequences(
    sequences: Iterable[Sequence], seq_ids: Container[int], max_model_len: int
) -> list[Sequence]:
    """Return the sequences, once all of them can be taken beside those with `seq_ids`.

    Raises:
        ValueError: as `check_sequence`; then none is taken.
    """
    accepted: dict[int, Sequence] = {}
    for sequence in sequences:
        for taken in (seq_ids, accepted):
            check_sequence(sequence, taken, max_model_len)
        accepted[sequence.seq_id] = sequence
    return list(accepted.values())

"""Arrow schemas of what a run writes."""

from collections.abc import Mapping

import pyarrow as pa

# Row states. `invalid_output` is reserved for schema checks.
OK = "ok"
TRUNCATED = "truncated"
OVERLONG = "overlong"
INVALID_INPUT = "invalid_input"
ENGINE_ERROR = "engine_error"
STATES = (OK, TRUNCATED, OVERLONG, INVALID_INPUT, ENGINE_ERROR)
ANSWERED = frozenset({OK, TRUNCATED})


def num_unanswered(rows_by_state: Mapping[str, int]) -> int:
    """Count rows without an answer."""
    return sum(count for state, count in rows_by_state.items() if state not in ANSWERED)


_TOKEN_LOGPROB = pa.struct(
    [
        pa.field("token_id", pa.int32()),
        pa.field("logprob", pa.float32()),
        pa.field(
            "top",
            pa.list_(
                pa.struct([pa.field("token_id", pa.int32()), pa.field("logprob", pa.float32())])
            ),
        ),
    ]
)


def result_fields(*, token_ids: bool = False, logprobs: bool = False) -> list[pa.Field]:
    """Return the columns that follow the input's own, in order; the two last ones on request."""
    fields = [
        pa.field("row_index", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("completion", pa.large_string()),
        pa.field("reasoning", pa.large_string()),
        pa.field("finish_reason", pa.string()),
        pa.field("error", pa.string()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_completion_tokens", pa.int32(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
    ]
    if token_ids:
        fields.append(pa.field("token_ids", pa.list_(pa.int32())))
    if logprobs:
        fields.append(pa.field("logprobs", pa.list_(_TOKEN_LOGPROB)))
    return fields

"""Per-row parameters at the edge of what numbers can be: a row is answered or refused, its neighbours are right."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import Nightjar

REFUSED: list[dict[str, Any]] = [
    {"stop_token_ids": [2**40]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [10**30]},
    {"top_k": 2**62},
    {"max_tokens": 2**62},
    {"max_tokens": 10**30},
    {"max_tokens": 0},
    {"temperature": 1e300},
    {"repetition_penalty": 0.0},
    {"stop": [""]},
    {"min_tokens": 9, "max_tokens": 8},
]
ANSWERED: list[dict[str, Any]] = [
    {"stop_token_ids": [2**31 - 1]},
    {"stop_token_ids": list(range(10_000, 10_100))},
    {"top_k": 2**31 - 1, "temperature": 1.0},
    {"max_tokens": 2**31 - 1},
    {"min_tokens": 2**31 - 1, "max_tokens": 2**31 - 1},
    {"seed": -(2**63), "temperature": 1.0},
    {"seed": 10**30, "temperature": 1.0},
    {"temperature": 1e-300},
    {"temperature": 5e-324},
    {"temperature": 1e-40, "top_p": 0.5},
    {"temperature": 1.0, "repetition_penalty": 1e-300},
    {"repetition_penalty": 1e-45},
    {"temperature": 1.0, "repetition_penalty": 100.0},
    {"temperature": 1.0, "top_p": 1e-300},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 100.0, "min_p": 1e-300},
    {"stop": ["\0"]},
    {"stop": ["x" * 100_000]},
    {"stop": [f"{number:04d}" for number in range(1000)]},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0},
]


def requests(bodies: list[dict[str, Any]]) -> str:
    """OpenAI batch lines, whose numbers have no type but JSON's."""
    lines = [
        {
            "custom_id": str(index),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "Tell me 7"}], **body},
        }
        for index, body in enumerate(bodies)
    ]
    return "\n".join(map(json.dumps, lines))


@pytest.mark.parametrize("backend", ["dummy", "transformers", "paged"])
def test_extreme_parameters_harm_no_other_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    nightjar = Nightjar(tmp_path, capsys)
    path = tmp_path / "in.jsonl"
    bodies: list[dict[str, Any]] = [{}, *REFUSED, {}, *ANSWERED, {}]
    path.write_text(requests(bodies))
    done = nightjar.run(
        "chain-a", path, engine__backend=backend, engine__max_num_seqs=32, shards__max_attempts=1
    )
    assert done.code == 0, done.err
    rows = done.rows
    for body, row in zip(bodies, rows, strict=True):
        is_refused = row["state"] == "invalid_input"
        assert is_refused == (body in REFUSED), (body, row["state"], row["error"])
        if is_refused:
            assert any(name in row["error"] for name in body)
        else:
            assert row["state"] in ("ok", "truncated"), (body, row["error"])
    plain = [row["completion"] for body, row in zip(bodies, rows, strict=True) if not body]
    assert len(set(plain)) == 1
    assert plain[0] or backend == "dummy"

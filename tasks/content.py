"""What makes two answers the same answer: digests of everything a completion depends on.

    prompt    the rendered prompt's tokens, and whether it ends inside an open `<think>`
    row       prompt, sampling with the row's own overrides, and its draws where it is sampled
    answer    row, sample index, and the engine: weights, dtype, quantisation, backend, KV cache, ranks

Equal answers are equal completions, as far as a batch's make-up does not round differently. Where the
rows came from, what else stands in them and how they are sharded is not part of it.
"""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from inference.sampling import SamplingParams, draw_seed
from storage.answers import NUM_BYTES

NOT_RUN = bytes(NUM_BYTES)
"""Stands where a row has no answer to be known by."""

_ENGINE = ("model.", "engine.")


def prompt_digest(token_ids: Sequence[int], *, is_thinking: bool) -> bytes:
    """Name a prompt as the model is given it."""
    tokens = token_ids if isinstance(token_ids, array) else array("i", token_ids)
    return _digest(tokens.tobytes(), bytes([is_thinking]))


def row_digest(prompt: bytes, sampling: SamplingParams, row_key: int | str) -> bytes:
    """Name what is asked of a row; greedy rows do not depend on their seed, id or place."""
    drawn = (
        b"" if sampling.is_greedy else draw_seed(sampling.seed, row_key, 0).to_bytes(8, "little")
    )
    return _digest(prompt, _sampling(sampling), drawn)


def answer_digest(engine: bytes, row: bytes, sample_index: int) -> bytes:
    """Name one sample of a row on one engine."""
    return _digest(engine, row, sample_index.to_bytes(4, "little"))


def engine_digest(fingerprint_fields: Mapping[str, Any]) -> bytes:
    """Name the engine by a run's fingerprint: everything there of weights and engine."""
    return _digest(json.dumps(engine_fields(fingerprint_fields), sort_keys=True).encode())


def engine_fields(fingerprint_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a fingerprint that are not in a row's own digest."""
    return {n: v for n, v in fingerprint_fields.items() if n.startswith(_ENGINE)}


@lru_cache(maxsize=1024)
def _sampling(sampling: SamplingParams) -> bytes:
    values = dataclasses.asdict(sampling)
    del values["seed"], values["n"]
    return json.dumps(values, sort_keys=True).encode()


def _digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=NUM_BYTES)
    for part in parts:
        found.update(len(part).to_bytes(4, "little"))
        found.update(part)
    return found.digest()

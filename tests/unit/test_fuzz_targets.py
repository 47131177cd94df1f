"""Each fuzz target, for a moment: its seeds, those with bytes changed, and what earlier fuzzing found."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, seeds

NUM_MUTANTS = {"chat_template": 20, "parquet": 60, "arrow": 60, "job_file": 100}
INTERESTING = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"[",
    b'"',
    b"9" * 30,
    b"\xed\xa0\x80",
    b"\n",
    b"null",
    b"-",
]


def mutant(rng: random.Random, seed: bytes) -> bytes:
    """Change a few places: replace, cut, repeat, insert."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = data[max(0, at - 12) : at] * rng.randint(1, 3)
            case _:
                data[at:at] = rng.choice(INTERESTING)
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_their_mutants_break_no_promise(name: str) -> None:
    rng = random.Random(name)
    target = TARGETS[name]
    for seed in seeds(name):
        target(seed)
        for _ in range(NUM_MUTANTS.get(name, 200) // len(seeds(name))):
            changed = mutant(rng, seed)
            try:
                target(changed)
            except Exception as error:
                raise AssertionError(f"{name} on {changed!r}") from error


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"chat_template", "parquet", "arrow"}))
@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass")),
    )
)
def test_any_bytes_break_no_promise(name: str, data: bytes) -> None:
    TARGETS[name](data)

"""Doubles that ship with the product, for every test."""

import pytest

from storage.clock import FrozenClock
from storage.memory_store import MemoryStore


@pytest.fixture
def frozen_clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def memory_store(frozen_clock: FrozenClock) -> MemoryStore:
    return MemoryStore(clock=frozen_clock)

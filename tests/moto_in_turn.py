"""moto's AWS in this process, asked by one thread at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto import mock_aws
from moto.core.botocore_stubber import BotocoreStubber


@contextmanager
def moto_in_turn() -> Iterator[None]:
    """`mock_aws()` whose requests wait for each other, as a store's own do.

    By itself moto answers threads at once and without locks: it closes an object that another thread is reading, and
    two creations of one key may both succeed.
    """
    turn = threading.Lock()
    answer = BotocoreStubber.process_request

    def answer_in_turn(stubber: BotocoreStubber, request: Any) -> Any:
        with turn:
            return answer(stubber, request)

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setattr(BotocoreStubber, "process_request", answer_in_turn)
        yield

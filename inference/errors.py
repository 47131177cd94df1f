"""What can go wrong in the engine, and whether another attempt can help.

InferenceError
|-- ModelError            the model folder is wrong: missing file, bad config        (fatal)
|-- EngineConfigError     the settings cannot work on this model or machine          (fatal)
|-- PromptError           one prompt cannot be run; carries the row state it becomes (per row)
|-- OutOfMemory           the device is full even after shrinking                    (retryable)
|-- FilesLost             weights that were on their way to a rank stopped coming    (retryable)
`-- EngineFault           the engine broke: a dead rank, a CUDA error                (retryable)
"""

from collections.abc import Iterable
from typing import ClassVar


def printable(text: str) -> str:
    """Return text that fits in one line of a message: line breaks and the like are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class InferenceError(Exception):
    """Anything the inference room raises on purpose."""

    retryable: ClassVar[bool] = False


class ModelError(InferenceError):
    """The model folder cannot be used: a file is missing, unreadable or of a refused kind."""


class EngineConfigError(InferenceError):
    """The engine settings cannot work on this model or machine; the message carries the arithmetic."""


class PromptError(InferenceError):
    """One prompt cannot be run; the row gets `state` and this message, the others go on.

    The message becomes a cell of the results, so whatever names it holds are made printable.
    """

    def __init__(self, state: str, message: str) -> None:
        super().__init__(printable(message))
        self.state = state


class OutOfMemory(InferenceError):
    """The device is out of memory even after the engine shrank what it could."""

    retryable: ClassVar[bool] = True

    def __init__(self, message: str, *, seq_ids: Iterable[int] = ()) -> None:
        """`seq_ids`: of the sequences that ran when it was, as far as is known."""
        super().__init__(message)
        self.seq_ids = tuple(seq_ids)


class FilesLost(InferenceError):
    """The replica gave up staging while this rank loaded; why is the replica's to say."""

    retryable: ClassVar[bool] = True


class EngineFault(InferenceError):
    """The engine itself broke; a fresh one may succeed."""

    retryable: ClassVar[bool] = True

"""How a rank's process ends: the exit codes of `python -m inference`, a contract with whoever starts it.

0 finished          stopped when it was asked to
1 fault             a fault of ours; a traceback is on stderr
3 config error      the settings cannot work on this model or machine      (trying again cannot help)
4 model error       the model folder is unusable                           (trying again cannot help)
5 lost peer         another rank is gone or does not answer                (trying again can help)
6 out of memory     the device is full; over several hosts, any rank's     (all can start again, with less)
7 engine fault      the device or the engine broke                         (trying again can help)
8 orphaned          the replica's process is gone
9 files lost        the replica gave up staging the model; its own error says why
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from inference.errors import (
    EngineConfigError,
    EngineFault,
    FilesLost,
    InferenceError,
    ModelError,
    OutOfMemory,
)


class ExitCode(IntEnum):
    """See the module docstring."""

    FINISHED = 0
    FAULT = 1
    CONFIG_ERROR = 3
    MODEL_ERROR = 4
    LOST_PEER = 5
    OUT_OF_MEMORY = 6
    ENGINE_FAULT = 7
    ORPHANED = 8
    FILES_LOST = 9


_TELLING = [
    ExitCode.CONFIG_ERROR,
    ExitCode.MODEL_ERROR,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.FAULT,
    None,  # died without a word
    ExitCode.ENGINE_FAULT,
    ExitCode.LOST_PEER,
    ExitCode.FILES_LOST,
    ExitCode.ORPHANED,
    ExitCode.FINISHED,
]
"""Most telling first: the others are often consequences."""


def telling(code: int | None) -> int:
    """Return how far from the cause an ending is likely to be; None: the process died without a word."""
    return _TELLING.index(None if code is None else ExitCode(code))


def error_of(code: int | None, message: str, *, seq_ids: Iterable[int] = ()) -> InferenceError:
    """Return the error that a rank's ending is for the replica; `seq_ids`: what it ran when it was out of memory."""
    if code == ExitCode.CONFIG_ERROR:
        return EngineConfigError(message)
    if code == ExitCode.MODEL_ERROR:
        return ModelError(message)
    if code == ExitCode.OUT_OF_MEMORY:
        return OutOfMemory(message, seq_ids=seq_ids)
    return EngineFault(message)


def failure_of(error: BaseException) -> dict[str, Any]:
    """Return the `failed` message of a rank that ends on this error."""
    lines = str(error).strip().splitlines() or [""]
    is_ours = isinstance(error, InferenceError)
    text = lines[0] if is_ours else f"{type(error).__name__}: {lines[0]}"
    seq_ids = error.seq_ids if isinstance(error, OutOfMemory) else ()
    return {
        "kind": "failed",
        "code": int(code_of(error)),
        "error": text[:1000],
        "seq_ids": list(seq_ids),
    }


def code_of(error: BaseException) -> ExitCode:
    """Return how a rank ends that meets this error."""
    import torch
    import torch.distributed as dist

    if isinstance(error, EngineConfigError):
        return ExitCode.CONFIG_ERROR
    if isinstance(error, ModelError):
        return ExitCode.MODEL_ERROR
    if isinstance(error, FilesLost):
        return ExitCode.FILES_LOST
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(error, dist.DistError):
        is_full = "out of memory" in str(error)  # of NCCL's own buffers
        return ExitCode.OUT_OF_MEMORY if is_full else ExitCode.LOST_PEER
    if isinstance(error, EngineFault | RuntimeError):
        return ExitCode.ENGINE_FAULT
    return ExitCode.FAULT

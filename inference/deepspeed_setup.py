"""DeepSpeed, imported only when used: quiet, without its own shared-memory operator, in a process group of ours."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from inference.errors import EngineConfigError

INSTALL = "DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>=0.19,<0.20'"


def require_deepspeed() -> None:
    """Raise EngineConfigError where DeepSpeed is not installed; imports nothing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise EngineConfigError(f"engine.backend is zero: needs deepspeed; {INSTALL}")


def import_deepspeed() -> Any:
    """Return the module.

    On the CPU DeepSpeed compiles an all-reduce over shared memory when it first communicates: minutes of
    build, wrong in any group but the world. It is switched off; gloo does the work.

    Raises:
        EngineConfigError: it is not installed.
    """
    require_deepspeed()
    # Else it guesses, and says at length what it guessed.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with at_work():
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def ensure_world() -> None:
    """Make sure that this process is in a process group: the launcher's, or one of its own."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store: Any = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


@contextmanager
def at_work() -> Iterator[None]:
    """Within, DeepSpeed may be called: it asks the environment for a rank, and warns of old torch names."""
    had_rank = "LOCAL_RANK" in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if not had_rank:
            del os.environ["LOCAL_RANK"]

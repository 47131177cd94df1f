"""Kernels compiled while the weights load, by processes beside this one: `inference.compile_ahead`.

What they compile goes into Triton's cache on disk, where the engine's first launches find it. Without them, or when
they fail, the same launches compile it one after the other, as Triton always does.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from inference.config import EngineConfig
from inference.families import is_fused
from inference.sampling_needs import GREEDY

logger = logging.getLogger(__name__)

_MOST_PROCESSES = 8
_PATIENCE_S = 30.0
"""Longer than all kernels take one after the other; who has not finished then is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the choice and the compilation of our kernels depend on."""

    capability: int
    """90 for 9.0."""

    num_multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> "CardFacts":
        """Ask a CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        return cls(
            capability=10 * properties.major + properties.minor,
            num_multiprocessors=properties.multi_processor_count,
        )


class Precompile:
    """Processes that compile for one engine; leaving the `with` block ends what is left of them."""

    def __init__(self, task: Mapping[str, Any] | None) -> None:
        """Start them on a task of `task_for`. None: there are none, and nothing to wait for."""
        self._process = None if task is None else _start(task)

    @classmethod
    def beside(
        cls, model_config: Mapping[str, Any], config: EngineConfig, device: torch.device
    ) -> "Precompile":
        """Start them where that helps: on CUDA, for one rank of a model that runs on our kernels, the first time.

        Args:
            model_config: the parsed config.json.
            config: the engine's.
            device: what to compile for.
        """
        if not _is_worth_it(model_config, config, device):
            return cls(None)
        num_processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2)
        task = task_for(CardFacts.of(device), model_config, config, num_processes)
        return cls(None if num_processes < 1 or is_done(task) else task)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def wait(self, patience_s: float = _PATIENCE_S) -> float:
        """Wait until all is compiled, or has failed, or for `patience_s`; return the seconds that took."""
        if self._process is None:
            return 0.0
        started_at = time.perf_counter()
        try:
            output, errors = self._process.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            logger.debug("compiling ahead was stopped: not done after %.0f s more", patience_s)
        else:
            code = self._process.returncode
            lines = (errors if code else output).decode(errors="replace").splitlines()
            logger.debug("compiling ahead ended with %d: %s", code, (lines or [""])[-1])
        self._stop()
        return time.perf_counter() - started_at

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its children as well
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def task_for(
    card: CardFacts, model_config: Mapping[str, Any], config: EngineConfig, num_processes: int
) -> dict[str, Any]:
    """Return what `inference.compile_ahead` reads. Needs Triton, whose cache it names."""
    import triton

    task = {
        "card": dataclasses.asdict(card),
        "model_config": dict(model_config),
        # Kernels of every kind of sampling are compiled, so none is told apart.
        "config": dataclasses.asdict(dataclasses.replace(config, model="", sampling_needs=GREEDY)),
    }
    versions = (torch.__version__, triton.__version__, sys.version)
    digest = hashlib.sha256(json.dumps([task, versions], sort_keys=True).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    done = Path(triton.knobs.cache.dir, f"nightjar-{digest.hexdigest()[:32]}")
    return {**task, "num_processes": num_processes, "done": str(done)}


def is_done(task: Mapping[str, Any]) -> bool:
    """Whether all of it has been compiled before; should some be lost, the engine compiles that."""
    return Path(task["done"]).exists()


def _is_worth_it(
    model_config: Mapping[str, Any], config: EngineConfig, device: torch.device
) -> bool:
    text_config = model_config.get("text_config") or model_config
    return (
        device.type == "cuda"
        and torch.version.cuda is not None  # ROCm's devices go by that name too
        and config.tensor_parallel_size == 1
        and is_fused({**model_config, **text_config}, config.quantization)
        and os.environ.get("TRITON_INTERPRET", "0") != "1"
    )


def _start(task: Mapping[str, Any]) -> "subprocess.Popen[bytes] | None":
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # No device, so that no context can be made on it; one thread, so that the process can be forked.
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "inference.compile_ahead"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **alone},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:  # no interpreter to be found, as in some embedded ones; no memory
        logger.debug("kernels are not compiled ahead: %s", error)
        return None
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already; `wait` says why
        process.stdin.write(json.dumps(task).encode() + b"\n")
        process.stdin.flush()
    return process

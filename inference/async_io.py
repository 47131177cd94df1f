"""DeepSpeed's async_io operator, which reads and writes NVMe: built before it is needed, and never waited for in vain.

torch builds an operator under a lock file and waits for as long as that file exists. A build that was killed
leaves it behind, and every later one would hang. So the lock is looked at first: whoever builds keeps it
open, and one that nobody has open is removed; one that somebody has is waited for, but not for ever.

    python -m inference.async_io              build it now: minutes on a small machine; no GPU is needed
    python -m inference.async_io --portable   for whichever CPU, as an image must

Where it cannot be built, as in an image without a compiler's headers, what lies built in the folder
(`TORCH_EXTENSIONS_DIR`) is loaded as it is.
"""

import ctypes
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inference.errors import EngineConfigError, EngineFault, InferenceError

logger = logging.getLogger(__name__)

BUILD_DEADLINE_S = 1200.0
_OPERATORS = ("pin_memory", "async_io")  # in the order they are built
_LEAN = ["-g0", "-DTORCH_INDUCTOR_CPP_WRAPPER"]
"""Without debug symbols and without torch's C++ front end, which the operators only include: 0.4 of the time."""
_POLL_S = 0.5


def load_async_io(deadline_s: float = BUILD_DEADLINE_S) -> Any:
    """Return the operator, built if it is not yet.

    Raises:
        EngineConfigError: this machine lacks what it is built from.
        EngineFault: the build failed, or another process has been at it for longer than `deadline_s`.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder: Any = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        if _load_built():
            return builder.load(verbose=False)
        raise EngineConfigError(
            "engine.offload is nvme: needs libaio and its headers; apt-get install libaio-dev, or use "
            "engine.offload cpu"
        )
    for name in _OPERATORS:
        clear_build_lock(build_folder(name) / "lock", deadline_s)
    try:
        with _building():
            return builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise EngineFault(
            f"engine.offload is nvme: async_io does not build: {line}; see `ds_report`, or use "
            f"engine.offload cpu"
        ) from error


@contextmanager
def _building() -> Iterator[None]:
    """Within, operators are compiled without what they do not use, by the ninja that is installed beside Python."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    builders: list[Any] = [AsyncIOBuilder, PinMemoryBuilder]
    given = [builder.cxx_args for builder in builders]
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    for builder, cxx_args in zip(builders, given, strict=True):
        builder.cxx_args = lambda self, cxx_args=cxx_args: [*cxx_args(self), *_LEAN]
    try:
        yield
    finally:
        for builder, cxx_args in zip(builders, given, strict=True):
            builder.cxx_args = cxx_args
        os.environ["PATH"] = path


def _load_built() -> bool:
    """Give DeepSpeed the operators that were built before, without a compiler; False where there are none."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    libraries = {name: build_folder(name) / f"{name}.so" for name in _OPERATORS}
    if not all(library.exists() for library in libraries.values()):
        return False
    for name, library in libraries.items():
        if name not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[name] = _module(name, library)
    return True


def _module(name: str, library: Path) -> Any:
    """Import one operator's library; its symbols are for the next one to find. Raises EngineFault."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None, "a library's name says how it is loaded"
    assert spec.loader is not None
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise EngineFault(
            f"{library}: built for another torch or without libaio ({error}); build it again by "
            "`python -m inference.async_io`, or use engine.offload cpu"
        ) from error
    return module


def build_portable() -> None:
    """From here on build for any CPU of this kind, not for this one with what only it has."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder.cpu_arch = lambda self: ""
    OpBuilder.simd_width = lambda self: "-D__SCALAR__"


def build_folder(name: str) -> Path:
    """Return the folder where torch builds an operator."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is not None:
        return Path(root) / name
    default: str = cpp_extension._get_build_directory(name, verbose=False)
    return Path(default)


def clear_build_lock(lock: Path, deadline_s: float = BUILD_DEADLINE_S) -> None:
    """Return once no build holds the lock; one that was left behind is removed.

    Raises:
        EngineFault: another process still holds it after `deadline_s`; the message says which and where.
    """
    waited_since = time.monotonic()
    while lock.exists():
        holders = list(_holders(lock))
        if not holders:
            logger.warning("%s was left behind by a build that was killed: removing it", lock)
            lock.unlink(missing_ok=True)
            return
        if time.monotonic() - waited_since > deadline_s:
            raise EngineFault(
                f"{lock}: process {holders[0]} has been building for over {deadline_s:.0f} s; end it and "
                f"remove the file"
            )
        time.sleep(_POLL_S)


def _holders(lock: Path) -> Iterator[int]:
    """Processes of this machine that have the file open, as far as they may be seen."""
    target = str(lock.resolve())
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            is_holder = any(os.readlink(fd) == target for fd in (process / "fd").iterdir())
        except OSError:  # it ended, or is another user's
            continue
        if is_holder:
            yield int(process.name)


if __name__ == "__main__":
    from inference.deepspeed_setup import import_deepspeed

    import_deepspeed()
    if "--portable" in sys.argv[1:]:
        build_portable()
    started_at = time.monotonic()
    try:
        load_async_io()
    except InferenceError as error:
        sys.exit(str(error))
    sys.stdout.write(f"async_io is built, {time.monotonic() - started_at:.0f} s\n")

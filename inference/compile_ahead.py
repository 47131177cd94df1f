"""One short process that compiles the engine's kernels before the engine needs them: `python -m inference.compile_ahead`.

It is told the engine's settings and the card on stdin, runs the engine's own warm-up on a model without numbers
(`inference.absent_model`) for a card that is not there (`inference.kernels.absent_card`), notes what Triton is asked to
compile, and has as many processes as it is given compile that into Triton's cache on disk. No transformers, no context
on the device. The last line of stdout is one JSON document.
"""

import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.config import EngineConfig, config_from_json


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of one kernel, as Triton writes it down."""

    module: str
    name: str
    specialization: str
    """For `JITFunction.preload`."""


def _compile(variant: Variant) -> None:
    """Compile it and build its launcher, unless Triton's cache has them."""
    import triton

    function = getattr(importlib.import_module(variant.module), variant.name)
    kernel = function.preload(variant.specialization)
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


def variants(model_config: Mapping[str, Any], config: EngineConfig) -> list[Variant]:
    """Return what warming up an engine on the active card would compile, the longest kernels first.

    Args:
        model_config: the parsed config.json.
        config: the engine's.

    Raises:
        InferenceError: the settings cannot work on this model.
    """
    from inference.absent_model import AbsentModel
    from inference.build_engine import run_all
    from inference.kernels import fused
    from inference.model import FusedModel
    from inference.paged_settings import PagedSettings

    absent = AbsentModel(model_config, config.dtype)
    model = FusedModel(absent, fused, is_fp8=config.quantization == "fp8")
    with noted_instead_of_compiled() as found:
        run_all(model, PagedSettings.of(config, model))
    return sorted(found, key=lambda variant: -found[variant])


@contextmanager
def noted_instead_of_compiled() -> Iterator[dict[Variant, int]]:
    """Compile and launch nothing meanwhile; yield what Triton was asked for, with the length of its source."""
    import triton

    found: dict[Variant, int] = {}

    def note(*, fn: Any, **asked: Any) -> bool:
        variant = Variant(fn.module, fn.name, asked["compile"]["specialization_data"])
        found[variant] = len(fn.jit_function.src)
        return True  # which Triton takes for: do not compile, and so do not launch

    knobs = triton.knobs.runtime
    hook, knobs.jit_cache_hook = knobs.jit_cache_hook, note
    try:
        yield found
    finally:
        knobs.jit_cache_hook = hook


def _build_extension() -> None:
    """Build what Triton needs of a device at all, unless its cache has that."""
    import triton

    triton.runtime.driver.active.utils.extension()


def compile_all(found: list[Variant], num_processes: int) -> None:
    """Compile in so many processes, forked from this one, which must have one thread.

    Raises:
        Exception: the first of what went wrong in any of them, once the others are done.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [
            pool.submit(_build_extension),
            *(pool.submit(_compile, variant) for variant in found),
        ]
    for future in futures:
        future.result()


def main() -> None:
    """Read the task from stdin, compile, report."""
    import triton  # noqa: F401  (heavy, as torch below is: imported while the task is on its way)

    from inference.kernels.absent_card import AbsentCard
    from inference.precompile import CardFacts

    task = json.loads(sys.stdin.readline())
    started_at = time.perf_counter()
    AbsentCard(CardFacts(**task["card"])).activate()
    found = variants(task["model_config"], config_from_json(task["config"]))
    listed_s = time.perf_counter() - started_at
    compile_all(found, task["num_processes"])
    Path(task["done"]).touch()
    compile_s = time.perf_counter() - started_at - listed_s
    print(json.dumps({"variants": len(found), "list_s": listed_s, "compile_s": compile_s}))


if __name__ == "__main__":
    main()

"""One rank of a replica whose weights are random: `python -m tests.benchmarks.random_rank`, under a launcher.

As `python -m inference`, except that no weights are read: each rank fills its part on its device. What it prints
goes to rank-N.log in the folder NIGHTJAR_BENCH_LOGS names, with the stacks of all threads once a minute.
"""

import dataclasses
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import inference.__main__ as rank_process
from inference import quantised_loading
from inference.arriving import Arriving
from inference.backends import paged
from inference.build_engine import build_engine
from inference.config import EngineConfig
from inference.model import PagedModel
from inference.paged_settings import PagedSettings
from inference.partition import allocate, empty_part
from inference.rank_exit import ExitCode
from inference.tensor_parallel import TensorParallel
from inference.weight_reader import Slice
from tests.benchmarks.random_model import fill_randomly

logger = logging.getLogger("bench")


def random_part(
    files: Arriving, config: EngineConfig, ranks: TensorParallel, device: torch.device
) -> Any:
    """Return this rank's part of the model with random weights, on the device."""
    started_at = time.perf_counter()
    model, _ = empty_part(files, config, ranks)
    allocate(model, device)
    fill_randomly(model)
    _say(f"weights in {time.perf_counter() - started_at:.1f} s")
    return model.eval()


def random_fill(
    model: Any,
    parts: dict[str, Slice],
    files: Arriving,
    device: torch.device,
    take_layer: Callable[[int], None],
) -> None:
    """Stand in for `fill`: layers have random values, and are quantised one by one."""
    started_at = time.perf_counter()
    for index in range(len(model.base_model.layers)):
        layer = model.base_model.layers[index]
        allocate(layer, device)
        fill_randomly(layer, seed=1 + index)
        take_layer(index)
    allocate(model, device)
    fill_randomly(model)
    _say(f"weights in {time.perf_counter() - started_at:.1f} s")


def reported_build(model: PagedModel, settings: PagedSettings, make_row: Any) -> Any:
    """Build the engine; say how long it took and what is left of the device."""
    started_at = time.perf_counter()
    if least := os.environ.get("NIGHTJAR_BENCH_MIN_STEP_TOKENS"):
        settings = dataclasses.replace(settings, min_step_tokens=int(least))
    engine, plan, warmup_s = build_engine(model, settings, make_row)
    graphs = engine.runner._graphs
    _say(
        f"engine in {time.perf_counter() - started_at:.1f} s: {plan}, {graphs.num_graphs} graphs, "
        f"{len(graphs._uncapturable)} not captured"
    )
    return engine, plan, warmup_s


def _say(text: str) -> None:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        text += f"; {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    logger.warning("rank %s: %s", os.environ.get("RANK"), text)


def main(arguments: list[str]) -> ExitCode:
    """Run one rank to its end."""
    log = Path(os.environ["NIGHTJAR_BENCH_LOGS"]) / f"rank-{os.environ['RANK']}.log"
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(60, repeat=True)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    paged._load = random_part
    quantised_loading.fill = random_fill
    paged.build_engine = reported_build
    return rank_process.main(arguments)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)

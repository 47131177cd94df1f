"""One rank of a replica: `python -m inference [DOCUMENT]`, started once a device by a launcher.

DOCUMENT is a JSON file with the engine's configuration, written by `inference.backends.ranked`; only the first
rank reads it and tells the others. So further hosts of a replica need no more than

    torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr HOST0 --master-port PORT -m inference

with the model's folder at the same path, or named by NIGHTJAR_MODEL. Ranks that are out of memory end to be started
again with less, by whoever started them on each host: `tasks.follow` does, and stages the model. How a rank's process
ends is a contract: see `inference.rank_exit`.
"""

import json
import logging
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from inference.arriving import Arriving
from inference.backends.base import Backend
from inference.config import DistributedConfig, EngineConfig, config_from_json
from inference.errors import InferenceError
from inference.launch import MODEL_VARIABLE
from inference.preflight_collective import check_fabric
from inference.rank_alarm import RankAlarm
from inference.rank_exit import ExitCode, code_of, failure_of
from inference.rank_group import SOCKET_VARIABLE
from inference.rank_link import LinkHandler, RankLink
from inference.rank_loop import serve
from inference.tensor_parallel import TensorParallel
from inference.world import (
    Place,
    current_device,
    join_world,
    leave_world,
    tensor_parallel_group,
)


def main(arguments: list[str]) -> ExitCode:
    """Run one rank to its end."""
    link: RankLink | None = None
    alarm: RankAlarm | None = None
    try:
        place = Place.from_environment()
        path = os.environ.get(SOCKET_VARIABLE)
        link = RankLink(path, place.rank) if path else None
        if link is not None and place.rank == 0:
            logging.getLogger().addHandler(LinkHandler(link))
        alarm = RankAlarm(place, link)
        run_rank(Path(arguments[0]).read_text() if place.rank == 0 else "", place, link, alarm)
    except Exception as error:  # whatever it is, the replica must hear of it
        code = code_of(error)
        if code == ExitCode.FAULT or not isinstance(error, InferenceError):
            traceback.print_exc()
        failure = failure_of(error)
        if alarm is not None:
            alarm.settle(failure)
        if link is not None:
            link.send(failure)
            link.flush()
        return code
    return ExitCode.FINISHED


def run_rank(document: str, place: Place, link: RankLink | None, alarm: RankAlarm) -> None:
    """Join the world, build this rank's part of the engine and serve until told to stop.

    `document` is the first rank's.
    """
    config = meet(document, place)
    if config.distributed.num_hosts > 1:
        alarm.listen()
    timeout_s = config.distributed.timeout_s
    ranks = tensor_parallel_group(config.tensor_parallel_size, timeout_s=timeout_s)
    fabric = check_fabric(ranks, current_device(), config.distributed)
    backend = _build(config, ranks, link.files if link else None)
    backend.stats.extra["all_reduce_gb_per_s"] = round(fabric.bandwidth, 3)
    serve(backend, ranks, link, waited_s=link.files.waited_s if link else 0.0)
    backend.close()
    leave_world()


def _build(config: EngineConfig, ranks: TensorParallel, files: Arriving | None) -> Backend:
    """Build this rank's part of the engine; its device is chosen by now.

    Args:
        config: what to build.
        ranks: this rank and its peers.
        files: the model's, as the replica's process tells of them; None: they are all in the folder.
    """
    if config.backend == "zero":
        from inference.backends.zero import ZeroBackend

        return ZeroBackend(config)
    from inference.backends.paged import PagedBackend

    return PagedBackend(config, ranks=ranks, arriving=files)


def meet(document: str, place: Place) -> EngineConfig:
    """Join the world and hear from its first rank what is to be built, of the model's folder on this host."""
    config = config_from_json(json.loads(document)) if document else None
    timeout_s = config.distributed.timeout_s if config else DistributedConfig().timeout_s
    join_world(place, timeout_s=timeout_s)
    told = TensorParallel.of(dist.group.WORLD).broadcast(document.encode())
    config = config or config_from_json(json.loads(told))
    return replace(config, model=os.environ.get(MODEL_VARIABLE, config.model))


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of a broken process group must not keep a failed rank alive.
    os._exit(exit_code)

"""One rank of a replica: `python -m inference DOCUMENT`, started once a device by a launcher.

DOCUMENT is a JSON file with the engine's configuration (`inference.backends.ranked` writes it). How a rank's
process ends is a contract: see `inference.rank_exit`.
"""

import json
import logging
import os
import sys
import traceback
from pathlib import Path

from inference.config import EngineConfig, config_from_json
from inference.errors import InferenceError
from inference.rank_exit import ExitCode, code_of
from inference.rank_group import SOCKET_VARIABLE
from inference.rank_link import LinkHandler, RankLink
from inference.rank_loop import serve
from inference.world import Place, join_world, leave_world, tensor_parallel_group


def main(arguments: list[str]) -> ExitCode:
    """Run one rank to its end."""
    link: RankLink | None = None
    try:
        place = Place.from_environment()
        path = os.environ.get(SOCKET_VARIABLE)
        link = RankLink(path, place.rank) if path else None
        if link is not None and place.rank == 0:
            logging.getLogger().addHandler(LinkHandler(link))
        run_rank(config_from_json(json.loads(Path(arguments[0]).read_text())), place, link)
    except Exception as error:  # whatever it is, the replica must hear of it
        code = code_of(error)
        if code == ExitCode.FAULT or not isinstance(error, InferenceError):
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        if link is not None:
            text = (
                lines[0]
                if isinstance(error, InferenceError)
                else f"{type(error).__name__}: {lines[0]}"
            )
            link.send({"kind": "failed", "code": int(code), "error": text[:1000]})
        return code
    return ExitCode.FINISHED


def run_rank(config: EngineConfig, place: Place, link: RankLink | None) -> None:
    """Join the world, build this rank's part of the engine and serve until told to stop."""
    timeout_s = config.distributed.timeout_s
    join_world(place, timeout_s=timeout_s)
    ranks = tensor_parallel_group(config.tensor_parallel_size, timeout_s=timeout_s)
    from inference.backends.paged import PagedBackend  # after the device is chosen

    backend = PagedBackend(config, ranks)
    serve(backend, ranks, link)
    backend.close()
    leave_world()


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of a broken process group must not keep a failed rank alive.
    os._exit(exit_code)

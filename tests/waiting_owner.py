"""A process whose ranks wait for weights that never come, for tests that kill it.

`python -m tests.waiting_owner FOLDER NAME`: of the model in FOLDER, only the weight file NAME is whole.
"""

import sys
from pathlib import Path

from inference.arriving import Arriving
from inference.backends.ranked import RankedBackend
from inference.config import EngineConfig


def main(folder: str, name: str) -> None:
    files = Arriving()
    files.begin(Path(folder))
    files.add(Path(folder, name))
    config = EngineConfig(model=folder, backend="paged", dtype="float32", tensor_parallel_size=2)
    RankedBackend(config, arriving=files, module="tests.watching_rank")


if __name__ == "__main__":
    main(*sys.argv[1:])

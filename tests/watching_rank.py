"""A rank that notes which weight files it opens: `python -m tests.watching_rank`, under a launcher.

As `python -m inference`; the names go, one a line, to the file that NIGHTJAR_TEST_OPENED names.
"""

import os
import sys
from pathlib import Path
from typing import Any

import inference.__main__ as rank_process


def watch(log: int) -> None:
    def see(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | Path):
            name = Path(args[0]).name
            if name.endswith((".safetensors", ".partial", ".journal")):
                os.write(log, f"{os.environ['RANK']} {name}\n".encode())

    sys.addaudithook(see)


if __name__ == "__main__":
    watch(os.open(os.environ["NIGHTJAR_TEST_OPENED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    exit_code = rank_process.main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)

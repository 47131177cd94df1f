"""A rank that ends as it is told: `python -m tests.ending_rank`, under a launcher.

As `python -m inference`, but for what it runs: the ranks meet, the last one ends with NIGHTJAR_TEST_ENDING, an exit code,
and the others wait to be ended. Each adds a line to the file NIGHTJAR_TEST_STARTS.
"""

import os
import sys
import time
from pathlib import Path

import inference.__main__ as rank_process
from inference.rank_alarm import RankAlarm
from inference.rank_exit import ExitCode, error_of
from inference.rank_link import RankLink
from inference.world import Place, join_world

PATIENCE_S = 60.0


def end(document: str, place: Place, link: RankLink | None, alarm: RankAlarm) -> None:
    with Path(os.environ["NIGHTJAR_TEST_STARTS"]).open("a") as file:
        file.write("started\n")
    join_world(place, timeout_s=PATIENCE_S)
    alarm.listen()
    if place.rank < place.size - 1:
        time.sleep(PATIENCE_S)
    code = ExitCode(int(os.environ["NIGHTJAR_TEST_ENDING"]))
    if code != ExitCode.FINISHED:
        raise error_of(code, "as it was told", seq_ids=[3, 5])


if __name__ == "__main__":
    rank_process.run_rank = end
    os._exit(rank_process.main(sys.argv[1:]))

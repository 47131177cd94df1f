"""A further host's pod of a replica of which one rank has little memory: `python -m tests.small_follower`.

As `python -m tasks.follow`, but for what the ranks run: `tests.small_rank`.
"""

import sys

from tasks import follow

if __name__ == "__main__":
    sys.exit(follow.main(module="tests.small_rank"))

"""`nightjar`: run a job, look at a run, redo what failed, prove it whole.

Only the standard library is imported here; each command imports what it needs. Exit codes, whether a
summary can be written or not:

    0 published   1 our own fault   2 nothing was run, the job or input is wrong   3 partial
    4 verification failed   5 more failed rows than allowed   130, 143 stopped by a signal
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from flows.parser import build_parser
from flows.streams import losable_streams, output_error

EXIT_OK = 0
EXIT_BUG = 1
EXIT_REFUSED = 2
EXIT_PARTIAL = 3
EXIT_UNVERIFIED = 4
EXIT_FAILED_ROWS = 5

_ONLY_TELL = frozenset({"plan", "status", "tiers", "bench"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; faults of the user's are one line on stderr."""
    _fill_standard_streams()
    with losable_streams():
        args = build_parser().parse_args(argv)
        code = _run(args)
        if code == EXIT_OK and args.command in _ONLY_TELL and output_error() is not None:
            return EXIT_BUG
        return code


def _run(args: argparse.Namespace) -> int:
    from flows import commands

    handler = getattr(commands, args.command.replace("-", "_"))
    try:
        code: int = handler(args)
    except commands.REFUSALS as error:
        return commands.refuse(args, error)
    except commands.STOPS as stop:
        return commands.stopped(args, stop)
    except Exception:
        # The one place where anything unexpected ends: with its traceback, as a fault of ours.
        traceback.print_exc()
        print(
            "nightjar: this is a fault of Nightjar's own; please report the lines above",
            file=sys.stderr,
        )
        return EXIT_BUG
    return code


def _fill_standard_streams() -> None:
    """Open what the caller has closed of 0, 1 and 2, or the next file opened would take its place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    sys.exit(main())

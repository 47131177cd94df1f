"""Standard output and error that may be lost: their reader has seen enough, or their disk is full.

What a command did stands all the same, so its exit code tells that and not whether it could be printed; but where
what is printed is all that it does, a full disk is its failure.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class Stream:
    """A standard stream; once a write fails, this and all later ones go nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        """Why it is lost; None while it works."""

    def write(self, text: str) -> int:
        """Write, or lose the stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or lose the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        # What is still buffered would fail once more as the interpreter ends, and make the exit code 120.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def losable_streams() -> Iterator[None]:
    """Let output that cannot be written end nothing while the body runs; stderr then says so in one line."""
    out, err = sys.stdout, sys.stderr
    # A stream that was closed before Python started is None, and printing to it does nothing.
    sys.stdout, sys.stderr = (cast(TextIO, s and Stream(s)) for s in (out, err))
    try:
        yield
    finally:
        failed = output_error()
        if failed is not None:
            print(
                f"nightjar: standard output could not be written: {failed.strerror}; only what was to be "
                "printed is lost, the exit code tells how the command ended",
                file=sys.stderr,
            )
        if sys.stderr is not None:
            sys.stderr.flush()
        sys.stdout, sys.stderr = out, err


def output_is_lost() -> bool:
    """Whether what is printed no longer arrives anywhere."""
    return _why_lost() is not None


def output_error() -> OSError | None:
    """Why what was printed could not be written; None too if only its reader has gone."""
    if sys.stdout is not None:
        sys.stdout.flush()
    lost = _why_lost()
    return None if lost is None or lost.errno == errno.EPIPE else lost


def _why_lost() -> OSError | None:
    return sys.stdout.lost if isinstance(sys.stdout, Stream) else None

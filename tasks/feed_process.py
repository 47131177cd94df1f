"""FeedProcess: the parent's side of one feed child. Starts it, asks it, outlives it.

A child that dies or falls silent is started again. Its flight recorder tells what it was doing, and
the rows or the file at fault are named:

    rendering row r    tried once more, then row r becomes `invalid_input`
    encoding a batch   repeated row by row; the next death names the row
    reading a file     tried once more, then the file is refused

The second try is for a child that somebody else ended, such as the kernel on a full machine.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import inference.errors
import storage.errors
import tasks
from inference.errors import EngineConfigError, EngineFault, InferenceError
from storage.errors import BadInput, StorageError
from storage.local_errors import translate
from tasks.feed_spec import FeedLimits, FeedSpec, too_many_hard_rows
from tasks.frames import (
    ENCODING,
    RENDERING,
    Deadline,
    Flight,
    Frame,
    Recorder,
    read_frame,
    write_frame,
)
from tasks.job import RunConfig
from tasks.prompt_columns import PromptColumns

_STDERR_TAIL = 2000
_MAX_THREADS = 8
_KNOWN = {
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME", "HF_HOME", "NIGHTJAR_FAILPOINT",
}  # fmt: skip
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)


class ChildDied(Exception):
    """The child is gone; carries what it was doing and how it ended."""

    def __init__(self, flight: Flight, reason: str, *, was_killed: bool) -> None:
        super().__init__(reason)
        self.flight = flight
        self.reason = reason
        self.was_killed = was_killed
        """By SIGKILL or SIGTERM: more likely somebody else's doing than the request's."""


class FeedProcess:
    """One child process. Close it, or use it as a context manager."""

    def __init__(self, spec: FeedSpec, limits: FeedLimits) -> None:
        self._spec = spec
        self._limits = limits
        self._loading: dict[str, Any] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._is_asking = False
        self._num_hard = 0
        self.warnings: list[str] = []

    @classmethod
    def of(
        cls,
        job: RunConfig,
        *,
        model_dir: Path,
        max_model_len: int,
        limits: FeedLimits | None = None,
    ) -> "FeedProcess":
        """Make the process for one job on one model; it starts with the first request."""
        limits = limits or FeedLimits()
        spec = FeedSpec.of(
            job, model_dir=str(model_dir), max_model_len=max_model_len, limits=limits
        )
        return cls(spec, limits)

    def begin_pass(self) -> None:
        """Count hard rows anew: each pass over the input meets the same ones."""
        self._num_hard = 0

    def __enter__(self) -> "FeedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; safe to repeat."""
        if self._child is None:
            return
        child, self._child = self._child, None
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        self._stderr.close()
        self._recorder.close()
        self._is_asking = False

    def load(self, columns: PromptColumns) -> None:
        """Load the tokenizer and the chat template, once.

        Raises:
            ModelError, EngineConfigError: the model folder or the chat template is wrong.
        """
        request = {"op": "load", "columns": columns.to_json()}
        if self._loading == request:
            return
        self._loading = None
        try:
            frame = self._ask_once(request, self._limits.start_s)
        except ChildDied as died:
            raise EngineConfigError(
                f"the tokenizer or chat template in {self._spec.model_dir} cannot be loaded: "
                f"the process {died.reason}"
            ) from None
        self._loading = request
        self.warnings = frame.header["warnings"]

    def ask_file(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask for one thing about one file (`schema` or `convert`).

        Raises:
            BadInput: the file is damaged, or the child died of it.
        """
        try:
            frame = self._ask_once(
                request, None if request["op"] == "convert" else self._limits.reply_s
            )
        except ChildDied as died:
            raise BadInput(
                f"{request['name']}: cannot be read: the process {died.reason}"
            ) from None
        return frame.header

    def prepare(self, request: dict[str, Any]) -> Iterator[Frame]:
        """Yield the batches of a `prepare` request, whatever rows do to the child.

        Raises:
            BadInput: the file is damaged, or the child died reading it.
            EngineConfigError: too many rows ran into the limits.
        """
        position, end = request["row_start"], request["row_end"]
        poison: dict[str, str] = {}
        careful_until = -1
        died_before: Flight | None = None
        while position < end:
            extra = {"row_start": position, "poison": poison, "careful_until": careful_until}
            try:
                for frame in self._ask({**request, **extra}, self._limits.reply_s):
                    self._count_hard(frame.header["num_hard"])
                    position = frame.header["row_start"] + frame.header["num_rows"]
                    yield frame
                return
            except ChildDied as died:
                stage, row, row_end = flight = died.flight
                is_again = flight == died_before
                died_before = flight
                if stage == ENCODING and row >= careful_until:
                    careful_until = row_end
                elif stage in (RENDERING, ENCODING) and (is_again or stage == ENCODING):
                    self._count_hard(1)
                    poison[str(row)] = f"preparing the prompt failed: the process {died.reason}"
                elif is_again:
                    near = position - request["first"]
                    raise BadInput(
                        f"{request['name']}: cannot be read near row {near}: the process {died.reason}"
                    ) from None

    def _count_hard(self, num_rows: int) -> None:
        self._num_hard += num_rows
        if self._num_hard > self._limits.max_hard_rows:
            raise too_many_hard_rows(self._limits.max_hard_rows)

    def _ask_once(self, request: dict[str, Any], timeout_s: float | None) -> Frame:
        """Send a request that has one frame for an answer; again if the child was killed."""
        try:
            (frame,) = self._ask(request, timeout_s)
        except ChildDied as died:
            if not died.was_killed:
                raise
            (frame,) = self._ask(request, timeout_s)
        return frame

    def _ask(self, request: dict[str, Any], timeout_s: float | None) -> Iterator[Frame]:
        """Send one request and yield its frames up to `done`. Restarts the child if need be."""
        if self._is_asking:
            self.close()  # the last request was given up in the middle
        if self._child is None:
            self._start()
            if request["op"] == "prepare" and self._loading is not None:
                list(self._ask(self._loading, self._limits.start_s))
        self._is_asking = True
        try:
            write_frame(self._requests, request)
        except BrokenPipeError:
            raise self._died("ended") from None
        while True:
            frame = self._receive(timeout_s)
            kind = frame.header["kind"]
            if kind in ("done", "error"):
                self._is_asking = False
            if kind == "done":
                return
            if kind == "error":
                raise _error(frame.header)
            if kind != "progress":
                yield frame

    def _receive(self, timeout_s: float | None) -> Frame:
        try:
            frame = read_frame(self._replies, timeout_s)
        except Deadline:
            raise self._died(f"took more than {timeout_s:g} s") from None
        if frame is None:
            raise self._died("ended")
        return frame

    def _died(self, what: str) -> ChildDied:
        child = self._child
        assert child is not None
        code = 0
        if what == "ended":
            code = child.wait()
            what = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            what += " (out of memory?)" if code < 0 else f": {self._stderr_tail()}"
        flight = self._recorder.read()
        self.close()
        return ChildDied(flight, what, was_killed=code in _KILLED)

    def _stderr_tail(self) -> str:
        """Return the last line of what the child wrote to stderr; only ever its own start-up faults."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].partition(":")[0] if lines else "no message"

    def _start(self) -> None:
        configure = {"op": "configure", "spec": asdict(self._spec)}
        for is_last in (False, True):
            self._spawn()
            try:
                list(self._ask(configure, self._limits.start_s))
                return
            except ChildDied as died:
                if is_last or not died.was_killed:
                    raise EngineFault(
                        f"the feed's process does not start: it {died.reason}"
                    ) from None

    def _spawn(self) -> None:
        with translate(Path(tempfile.gettempdir()) / "nightjar-feed"):
            self._recorder = Recorder()
            self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            # -P: the current folder may hold another `tasks`.
            [sys.executable, "-P", "-m", "tasks.feed_child", str(self._recorder.descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(self._limits),
            pass_fds=(self._recorder.descriptor,),
            start_new_session=True,  # a Ctrl-C is the parent's to handle
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._requests = self._child.stdin.fileno()
        self._replies = self._child.stdout.fileno()


def _is_needed(name: str) -> bool:
    """What the child may know of this process's environment: no credentials, by whatever name."""
    return name in _KNOWN or name.startswith(("PYTHON", "LC_"))


def _environment(limits: FeedLimits) -> dict[str, str]:
    num_threads = limits.num_threads or min(_MAX_THREADS, os.cpu_count() or 1)
    root = str(Path(tasks.__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    known = {name: value for name, value in os.environ.items() if _is_needed(name)}
    return {
        **known,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONHASHSEED": "0",
        # Arenas reserve address space that would count against the limit.
        "MALLOC_ARENA_MAX": "2",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "RAYON_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "true" if num_threads > 1 else "false",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _error(header: dict[str, Any]) -> Exception:
    name, message = header["type"], header["message"]
    for module, base in ((storage.errors, StorageError), (inference.errors, InferenceError)):
        kind = getattr(module, name, None)
        if isinstance(kind, type) and issubclass(kind, base):
            return kind(message)
    return EngineFault(f"{name}: {message}")

"""RankGroup: the replica's end: this host's ranks, what they say, and how they ended.

start --> hello from every rank --> messages ... --> close
                \\___________________\\__ one rank ends: all end, and the error says which and why
"""

import contextlib
import json
import logging
import os
import selectors
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from inference.errors import InferenceError
from inference.launch import Launch, RankProcesses
from inference.rank_exit import ExitCode, error_of, telling
from inference.rank_messages import Decoder, Message, encode, receive

logger = logging.getLogger(__name__)

SOCKET_VARIABLE = "NIGHTJAR_RANK_SOCKET"
"""Where ranks find the path of the socket they connect to."""

_LOG_TAIL_BYTES = 4_000
_VERDICT_S = 2.0
_WAIT_POLL_S = 0.5
_MAX_PATH = 100  # of a Unix socket, less a margin


class _Ending(NamedTuple):
    """How a rank ended."""

    code: int | None
    text: str
    seq_ids: Sequence[int] = ()
    """What it ran when it was out of memory."""


class RankGroup:
    """Starts ranks on construction. One thread uses it."""

    def __init__(
        self, launch: Launch, document: Mapping[str, Any], *, output: int | None = None
    ) -> None:
        """Start them.

        Args:
            launch: what to start.
            document: given to the ranks as the file in their last argument.
            output: where launcher and ranks print; None: kept, and logged if they fail.
        """
        self._folder = _private_folder()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._folder / "ranks"))
        self._listener.listen(launch.num_ranks)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._decoders: dict[socket.socket, Decoder] = {}
        self._ranks: dict[socket.socket, Message] = {}
        self._inbox: deque[Message] = deque()
        self._endings: dict[str, _Ending] = {}
        self._first: socket.socket | None = None
        self._told: list[Message] = []
        self._is_closed = False
        path = self._folder / "document.json"
        path.write_text(json.dumps(document))
        self._log_path = self._folder / "output"
        with self._log_path.open("wb") as kept:
            self._processes = RankProcesses(
                replace(
                    launch,
                    args=[*launch.args, str(path)],
                    env={**launch.env, SOCKET_VARIABLE: str(self._folder / "ranks")},
                ),
                kept.fileno() if output is None else output,
            )

    @property
    def launcher_pid(self) -> int:
        """The launcher's process id."""
        return self._processes.pid

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that have said hello, by rank."""
        return {message["rank"]: message["pid"] for message in self._ranks.values()}

    def send(self, message: Message) -> None:
        """Send to the first rank of this host. A rank that is gone is met by `take`."""
        assert self._first is not None, "no first rank yet: wait for its first message"
        _send(self._first, message)

    def tell(self, message: Message) -> None:
        """Send to every rank of this host; those that have not said hello yet are told when they do."""
        self._told.append(message)
        for connection in self._ranks.keys() & self._decoders.keys():
            _send(connection, message)

    def take(self, timeout_s: float) -> list[Message]:
        """Return the messages that have come, waiting up to `timeout_s` for the first.

        Raises:
            InferenceError: a rank ended; typed by how, and all others have been ended too.
        """
        if not self._inbox:
            self._poll(timeout_s)
        if not self._inbox and (self._endings or self._processes.poll() is not None):
            raise self._verdict()
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def wait(self) -> int:
        """Wait until all have ended.

        Returns:
            The launcher's exit code; `ExitCode.OUT_OF_MEMORY` if any rank ended with that.
        """
        while self._processes.poll() is None:
            self._poll(_WAIT_POLL_S)
        self._hear_out()
        exit_code = self._processes.wait()
        if exit_code:
            self._log_endings(logging.WARNING)
        is_full = any(ending.code == ExitCode.OUT_OF_MEMORY for ending in self._endings.values())
        return ExitCode.OUT_OF_MEMORY if is_full else exit_code

    def close(self) -> None:
        """End all ranks. Safe to repeat."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._first in self._decoders and not self._endings:
            self.send({"kind": "stop"})
        for connection in list(self._decoders):
            self._forget(connection)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._processes.stop()
        self._selector.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def dismiss(self, message: Message) -> None:
        """Tell every rank something that it ends on, hear how each does, and end whoever is left."""
        self.tell(message)
        self._hear_out()
        self._log_endings(logging.INFO)
        self.close()

    def _poll(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            connection: Any = key.fileobj
            if connection is self._listener:
                with contextlib.suppress(OSError):
                    accepted, _ = self._listener.accept()
                    accepted.setblocking(False)
                    self._decoders[accepted] = Decoder()
                    self._selector.register(accepted, selectors.EVENT_READ)
                continue
            messages = receive(connection, self._decoders[connection])
            if messages is None:
                self._ended(connection)
                continue
            for message in messages:
                self._take_in(connection, message)

    def _take_in(self, connection: socket.socket, message: Message) -> None:
        kind = message["kind"]
        if kind == "hello":
            self._ranks[connection] = message
            if self._first is None or message["rank"] < self._ranks[self._first]["rank"]:
                self._first = connection
            for told in self._told:
                _send(connection, told)
        elif kind == "failed":
            ending = _Ending(message["code"], message["error"], message["seq_ids"])
            self._endings[self._name(connection)] = ending
        elif kind == "log":
            logging.getLogger(message["name"]).log(message["level"], "%s", message["text"])
        else:
            self._inbox.append(message)

    def _name(self, connection: socket.socket) -> str:
        hello = self._ranks[connection]
        return f"rank {hello['rank']} (process {hello['pid']})"

    def _ended(self, connection: socket.socket) -> None:
        if connection in self._ranks:
            name = self._name(connection)
            self._endings.setdefault(name, _Ending(None, "died without a word"))
        self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._decoders[connection]

    def _verdict(self) -> InferenceError:
        """Hear the other ranks out, end all, and say which ending is the likeliest cause."""
        self._hear_out()
        exit_code = self._processes.poll()
        output = self._output()
        if self._endings:
            name, ending = min(self._endings.items(), key=lambda item: telling(item[1].code))
        else:
            name, ending = "the launcher", _Ending(None, f"ended with exit code {exit_code}")
        code, text, seq_ids = ending
        is_plain = code in (ExitCode.CONFIG_ERROR, ExitCode.MODEL_ERROR)
        if output and not is_plain:
            logger.warning("the ranks printed: %s", output)
        self.close()
        if not is_plain:
            text = f"{name}: {text}; all ranks were stopped"
        return error_of(code, text, seq_ids=seq_ids)

    def _hear_out(self) -> None:
        """Give the ranks that have said hello a moment to say how they end."""
        deadline = time.monotonic() + _VERDICT_S
        while self._decoders and time.monotonic() < deadline:
            self._poll(0.1)
            if all(self._name(c) in self._endings for c in self._decoders if c in self._ranks):
                break

    def _log_endings(self, level: int) -> None:
        for name, ending in sorted(self._endings.items()):
            logger.log(level, "%s: ended with exit code %s: %s", name, ending.code, ending.text)

    def _output(self) -> str:
        """The end of what launcher and ranks printed."""
        with self._log_path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip()


def _send(connection: socket.socket, message: Message) -> None:
    connection.setblocking(True)
    with contextlib.suppress(OSError):  # a rank that is gone is met by the reader
        connection.sendall(encode(message))
    connection.setblocking(False)


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nightjar-ranks-"))
    if len(str(folder)) < _MAX_PATH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="nightjar-ranks-", dir="/tmp"))

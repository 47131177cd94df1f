"""RankLink: a rank's end of the socket to the replica's process.

A thread of its own reads it, so that the rank ends when the replica's process is gone, whatever the main thread
waits for: a step, a peer, a device, a weight file.
"""

import contextlib
import logging
import os
import queue
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

from inference.arriving import Arriving
from inference.rank_exit import ExitCode
from inference.rank_files import hear
from inference.rank_messages import Decoder, Message, encode, receive


class RankLink:
    """Connected on construction. Messages are written by a thread: a replica that is busy holds up no step."""

    def __init__(self, path: str, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._folder = Path(path).parent
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.Queue[Message] = queue.Queue()
        self.files = Arriving()
        """The model's files, as the replica tells of them."""

        self.send({"kind": "hello", "rank": rank, "pid": os.getpid()})
        for target in (self._read, self._write):
            threading.Thread(target=target, name="nightjar-rank-link", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send one message, in order, soon. Any thread may."""
        self._outbox.put(message)

    def flush(self) -> None:
        """Wait until all that was sent is on its way."""
        self._outbox.join()

    def take(self, timeout_s: float) -> list[Message]:
        """Return the messages that have come, waiting up to `timeout_s` for the first."""
        found: list[Message] = []
        try:
            found.append(
                self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get_nowait()
            )
            while True:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            return found

    def _write(self) -> None:
        while True:
            message = self._outbox.get()
            with contextlib.suppress(OSError):  # a replica that is gone is met by the reader
                self._socket.sendall(encode(message))
            self._outbox.task_done()

    def _read(self) -> None:
        decoder = Decoder()
        while (messages := receive(self._socket, decoder)) is not None:
            for message in messages:
                if not hear(self.files, message):
                    self._inbox.put(message)
        shutil.rmtree(self._folder, ignore_errors=True)  # the replica cannot any more
        # Not sys.exit: the main thread may be inside a collective that never ends.
        os._exit(ExitCode.ORPHANED)


class LinkHandler(logging.Handler):
    """Sends warnings to the replica's process, which logs them as its own."""

    def __init__(self, link: RankLink) -> None:
        super().__init__(logging.WARNING)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record's text."""
        message: dict[str, Any] = {
            "kind": "log",
            "level": record.levelno,
            "name": record.name,
            "text": record.getMessage(),
        }
        self._link.send(message)

"""One process of a node stages a model; what the others who want it do meanwhile.

Of a model that is copied they are told file by file, each as it is verified. A GGUF file is converted
in one piece: its files are written when every weight is unpacked, and appear together.
"""

import logging
import time

from storage.file_lock import FileLock
from storage.model_cache import ModelCache
from storage.model_fill import FillOptions
from storage.model_listing import Listing

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_SAY_EVERY_S = 60.0


class StageTurn:
    """The wish of one process to stage one model."""

    def __init__(self, cache: ModelCache, listing: Listing, options: FillOptions) -> None:
        self._cache = cache
        self._listing = listing
        self._options = options
        self._told: set[str] = set()

    def take(self) -> FileLock:
        """Become the one process that stages the model, when no other is at it any more."""
        name = self._listing.content_id
        level, say_at = logging.INFO, time.monotonic()
        while (turn := self._cache.stage(name)) is None:
            if time.monotonic() >= say_at:
                logger.log(level, "model %s: %s", name, self._why_waiting())
                level, say_at = logging.WARNING, time.monotonic() + _SAY_EVERY_S
            self._options.on_progress(0, self._listing.num_bytes)
            if self._cache.is_ready(name):
                self._tell()
            time.sleep(_LOOK_EVERY_S)
        return turn

    def _tell(self) -> None:
        """Tell of the files that the other process has verified."""
        folder = self._cache.path(self._listing.content_id)
        if not self._told:
            self._options.on_ready(folder)
        there = {file.name for file in self._listing.files if (folder / file.name).exists()}
        for name in sorted(there - self._told):
            self._options.on_file(folder / name)
        self._told |= there

    def _why_waiting(self) -> str:
        stager = self._cache.stager(self._listing.content_id)
        who, doing = "another process", "converting" if self._listing.is_gguf else "copying"
        for_s = ""
        if stager:
            who = f"process {stager.pid} of {stager.host}"
            for_s = f" for {max(0.0, time.time() - stager.began_at):.0f} s"
        meanwhile = (
            "none of its files can be read before all are there, so this process waits"
            if self._listing.is_gguf
            else "each file can be read here once it is verified"
        )
        return f"{who} has been {doing} {self._listing.source.uri}{for_s}; {meanwhile}"

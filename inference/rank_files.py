"""Which of the model's files a rank may read: the replica, which has them staged, tells all its ranks.

    replica   FileNews(files).since_last() -> messages -> every rank's socket
    rank      hear(files, message)

    files {folder, names, is_whole}   these are verified and final; is_whole: so is all that the folder lacks
    no_more {error}                   staging has ended early: nothing more is read

A rank opens no weight file that it has not been told of, so it reads nothing that is not verified.
"""

from pathlib import Path

from inference.arriving import Arriving
from inference.errors import FilesLost, ModelError
from inference.rank_messages import Message

_FILES = "files"
_NO_MORE = "no_more"


class FileNews:
    """What is new of files on their way, as messages for ranks."""

    def __init__(self, files: Arriving) -> None:
        self._files = files
        self._told: frozenset[str] = frozenset()
        self._has_begun = False
        self.is_over = False
        """Whether all has been told."""

    def since_last(self) -> list[Message]:
        """Return the messages that say what has come since the last call, none if nothing has."""
        known = self._files.known()
        if self.is_over or known.folder is None:
            return []
        names = known.names - self._told
        if not names and not known.is_whole and self._has_begun:
            return []
        self._told, self._has_begun, self.is_over = known.names, True, known.is_whole
        return [
            {
                "kind": _FILES,
                "folder": str(known.folder),
                "names": sorted(names),
                "is_whole": known.is_whole,
            }
        ]


def no_more(error: BaseException) -> Message:
    """Return the message that staging has ended with this error."""
    lines = str(error).strip().splitlines() or [""]
    return {"kind": _NO_MORE, "error": f"{type(error).__name__}: {lines[0][:500]}"}


def hear(files: Arriving, message: Message) -> bool:
    """Take in what the replica says of the files; False if the message is about something else."""
    if message["kind"] == _NO_MORE:
        files.fail(FilesLost(f"the model's files are no longer on their way: {message['error']}"))
        return True
    if message["kind"] != _FILES:
        return False
    folder = Path(message["folder"])
    try:
        files.begin(folder)
        for name in message["names"]:
            files.add(folder / name)
        if message["is_whole"]:
            files.finish(folder)
    except ModelError as error:
        files.fail(error)
    return True

"""Local scratch folders: one per process, removed at the end, swept when their owner died."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import BadInput
from tasks.holder import holder_name, is_dead

_PREFIX = "nightjar-work-"
_ENCODED = str.maketrans({"/": "+"})


@contextmanager
def scratch_folder(root: Path | None = None) -> Iterator[Path]:
    """Yield a private folder under `root`, `$NIGHTJAR_WORK_DIR` or the system's temporary folder.

    Raises:
        BadInput: there can be none; says what to set.
    """
    base = root or Path(os.environ.get("NIGHTJAR_WORK_DIR") or tempfile.gettempdir())
    folder = base / (_PREFIX + holder_name().translate(_ENCODED))
    try:
        base.mkdir(parents=True, exist_ok=True)
        _sweep(base)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise BadInput(
            f"{base}: holds no scratch files: {error.strerror}; set NIGHTJAR_WORK_DIR to a folder "
            "that can be written"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(base: Path) -> None:
    for entry in base.glob(_PREFIX + "*"):
        holder = re.sub(r"\+", "/", entry.name.removeprefix(_PREFIX))
        if is_dead(holder):
            shutil.rmtree(entry, ignore_errors=True)

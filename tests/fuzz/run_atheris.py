"""Fuzz one target for as long as wanted, guided by coverage of our own code.

    pip install --target FOLDER atheris
    PYTHONPATH=FOLDER python -m tests.fuzz.run_atheris jsonl -max_total_time=300 [CORPUS_FOLDER]

Everything after the target's name is libFuzzer's. A finding is written to ./crash-*; run the target
on it again by giving that file instead of a folder.
"""

import resource
import sys
import tempfile
from pathlib import Path

import atheris

MAX_MEMORY_BYTES = 6 << 30


def main() -> None:
    """Set the target up and hand over to libFuzzer."""
    name, options = sys.argv[1], sys.argv[2:]
    with atheris.instrument_imports(include=["flows", "inference", "storage", "tasks"]):
        from tests.fuzz.targets import TARGETS, seeds
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    folders = [item for item in options if not item.startswith("-")]
    if not folders:
        folders = [tempfile.mkdtemp(prefix=f"nightjar-corpus-{name}-")]
        options += folders
    if Path(folders[0]).is_dir():
        for index, seed in enumerate(seeds(name)):
            (Path(folders[0]) / f"seed-{index}").write_bytes(seed)
    target = TARGETS[name]
    atheris.Setup(["run_atheris", "-timeout=20", "-rss_limit_mb=8192", *options], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

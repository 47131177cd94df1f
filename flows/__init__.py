"""Flows: order in time.

Owns the job file, the command line and the Prefect flows. Reads like a table of contents.
May import tasks, storage and inference.config. Never imports torch when imported itself.

    flows -> tasks -> inference | storage
    ^^^^^
"""

import sys
from pathlib import PurePath

# Prefect runs a flow's hooks by a script in its own folder prefect/runner; that folder then comes first
# on the path, and its storage.py would stand for our room of that name.
sys.path[:] = [path for path in sys.path if PurePath(path).parts[-2:] != ("prefect", "runner")]

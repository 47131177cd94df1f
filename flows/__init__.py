"""Flows: order in time.

Owns the job file, the command line and the Prefect flows. Reads like a table of contents.
May import tasks, storage and inference.config. Never imports torch when imported itself.

    flows -> tasks -> inference | storage
    ^^^^^
"""

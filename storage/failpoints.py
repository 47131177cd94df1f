"""Failpoints: named moments between two durable steps, at which a test can kill the process.

    NIGHTJAR_FAILPOINT=after_data:kill:0.12:7        name:action:probability:seed
    NIGHTJAR_FAILPOINT=a:kill:0.1:7,b:sleep:0.5:7    several, by commas

Actions: `kill` (SIGKILL of this very process, nothing is cleaned up), `exit` (status 70), `sleep`
(50 ms, to widen a race), `hang` (ten minutes, a store that does not answer). Without the variable a failpoint does nothing. It is read once, at the
first failpoint that is passed.
"""

import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from functools import cache

VARIABLE = "NIGHTJAR_FAILPOINT"
_ACTIONS = ("kill", "exit", "sleep", "hang")
_EXIT_STATUS = 70
_SLEEP_S = 0.05
_HANG_S = 600.0


@dataclass(frozen=True, slots=True)
class _Failpoint:
    action: str
    probability: float
    random: random.Random
    lock: threading.Lock


def failpoint(name: str) -> None:
    """Die here if the environment says so."""
    armed = _armed().get(name)
    if armed is None:
        return
    with armed.lock:
        if armed.random.random() >= armed.probability:
            return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif armed.action == "exit":
        os._exit(_EXIT_STATUS)
    else:
        time.sleep(_HANG_S if armed.action == "hang" else _SLEEP_S)


@cache
def _armed() -> dict[str, _Failpoint]:
    return parse(os.environ.get(VARIABLE, ""))


def parse(text: str) -> dict[str, _Failpoint]:
    """Read the variable's text.

    Raises:
        ValueError: not `name:action:probability:seed`, or an unknown action.
    """
    armed = {}
    for item in filter(None, text.split(",")):
        try:
            name, action, probability, seed = item.split(":")
            if action not in _ACTIONS:
                raise ValueError(f"unknown action {action!r}")
            armed[name] = _Failpoint(
                action, float(probability), random.Random(f"{seed}:{name}"), threading.Lock()
            )
        except ValueError as error:
            raise ValueError(
                f"{VARIABLE}: {item!r} is not name:action:probability:seed ({error}); "
                f"actions are {', '.join(_ACTIONS)}"
            ) from error
    return armed

"""An automation that stands as wanted is told from one that does not, by what it says alone."""

import json
from itertools import islice, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefect.automations import AutomationCore

from flows.deploy import Settings, _automation, _automations


class Standing:
    """The client of a server on which one automation stands."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._standing = AutomationCore.model_validate(document)
        self.updates: list[AutomationCore] = []

    def read_automations_by_name(self, name: str) -> list[Any]:
        fields = {field: getattr(self._standing, field) for field in AutomationCore.model_fields}
        dumped = self._standing.model_dump
        return [SimpleNamespace(id="1", model_dump=dumped, **fields)]

    def update_automation(self, number: str, wanted: AutomationCore) -> None:
        self.updates.append(wanted)


def wanted() -> AutomationCore:
    (silent,) = _automations(None, Settings(folder=Path()))  # type: ignore[arg-type]  # no blocks
    return silent


def test_events_in_another_order_are_no_change() -> None:
    document = json.loads(wanted().model_dump_json())
    # Where names collide, a set's order follows that in which they came: other for some of these.
    for order in islice(permutations(document["trigger"]["expect"]), 720):
        document["trigger"]["expect"] = list(order)
        client = Standing(document)
        _automation(client, wanted())  # type: ignore[arg-type]
        assert client.updates == []


def test_another_event_is_a_change() -> None:
    document = json.loads(wanted().model_dump_json())
    document["trigger"]["expect"].append("prefect.flow-run.Paused")
    client = Standing(document)
    _automation(client, wanted())  # type: ignore[arg-type]
    assert len(client.updates) == 1

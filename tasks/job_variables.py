"""Checks job variables against a work pool's base job template: Prefect drops unknown ones silently."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar


class ProvisionError(ValueError):
    """A tier cannot be provisioned this way; the message says what to change."""

    retryable: ClassVar[bool] = False


def check_job_variables(job_variables: Mapping[str, Any], template: Mapping[str, Any]) -> None:
    """Refuse a variable that the base job template does not name, or of another type.

    Raises:
        ProvisionError: names the variable and the nearest one the template knows.
    """
    properties: Mapping[str, Any] = template.get("variables", {}).get("properties", {})
    for name, value in job_variables.items():
        if name not in properties:
            near = difflib.get_close_matches(name, properties, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"it knows {', '.join(sorted(properties))}"
            )
            raise ProvisionError(
                f"job variable {name!r} is not in the work pool's base job template, and Prefect would "
                f"drop it silently; {hint}"
            )
        kinds = _kinds(properties[name])
        if kinds and not any(_is_kind(value, kind) for kind in kinds):
            raise ProvisionError(
                f"job variable {name} is {value!r} ({type(value).__name__}); "
                f"the base job template takes {' or '.join(kinds)}"
            )


def unused_variables(template: Mapping[str, Any]) -> set[str]:
    """Variables that the template declares and never reads, or reads and never declares."""
    declared = set(template["variables"]["properties"])
    read = set(re.findall(r"{{\s*([\w]+)\s*}}", str(template["job_configuration"])))
    return declared ^ read


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """JSON types a variable may have; empty when the schema does not say."""
    options = schema.get("anyOf", [schema])
    if not all("type" in option for option in options):
        return []
    return [str(option["type"]) for option in options]


def _is_kind(value: Any, kind: str) -> bool:
    types: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
        "object": (dict,),
        "null": (type(None),),
    }
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, types[kind])

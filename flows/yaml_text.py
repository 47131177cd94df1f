"""YAML as people mean it: `on`, `no` and `22:30` are text, `1e6` is a number, dates stay text.

PyYAML follows YAML 1.1, where `stop: [on]` is a list with `True` and `deadline: 20:00` is 1200. These
are the scalar rules of YAML 1.2's core schema, with `_` allowed between digits.
"""

import re
from typing import Any

import yaml


class YamlError(ValueError):
    """Not YAML; the message begins with the place, such as ` line 3: ...`."""


class _Loader(yaml.SafeLoader):
    """A safe loader whose plain scalars follow YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own shape


_RULES = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)
for _tag, _pattern, _first in _RULES:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
# An empty scalar is null, too; PyYAML looks it up under the empty string.
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 reads 010 as eight; here it is ten.
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _number)


def parse_yaml(text: str) -> Any:
    """Parse one document into plain values. Raises YamlError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise YamlError(f"{place}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    except ValueError as error:
        raise YamlError(f": {error}") from error

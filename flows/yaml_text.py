"""YAML as people mean it: `on`, `no` and `22:30` are text, `1e6` is a number, dates stay text.

PyYAML follows YAML 1.1, where `stop: [on]` is a list with `True` and `deadline: 20:00` is 1200. These
are the scalar rules of YAML 1.2's core schema, with `_` allowed between digits.
"""

import re
from typing import Any

import yaml

MAX_CHARS = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""What a job file may come to; beyond it, somebody means harm or has taken the wrong file."""


_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
}


class YamlError(ValueError):
    """Not YAML; the message begins with the place, such as `, line 3: ...`."""


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
    """Parse one document into plain values, no larger than a job can need.

    Raises:
        YamlError: not YAML, or it is huge, nested deeply, or grows huge by repeating itself.
    """
    if len(text) > MAX_CHARS:
        raise YamlError(f": {len(text)} characters, a job file has at most {MAX_CHARS}")
    try:
        return _load(text)
    except YamlError:
        raise
    except RecursionError as error:
        raise YamlError(": nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise YamlError(f"{place}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    except (ValueError, OverflowError) as error:
        raise YamlError(f": {error}") from error


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _num_nodes(node, 0, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_name(node: yaml.Node) -> None:
    """Refuse a key that is not text: what is written to JSON would come back as another one."""
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
        line = node.start_mark.line + 1
        raise YamlError(f", line {line}: a key that is not text; put it in quotes")


def _check_names(node: yaml.MappingNode) -> None:
    """Refuse a key that is there twice: PyYAML would take the last one without a word."""
    seen: set[str] = set()
    for key, _ in node.value:
        _check_name(key)
        if key.value in seen:
            line = key.start_mark.line + 1
            raise YamlError(f", line {line}: {key.value[:100]!a} is there twice; keep one")
        seen.add(key.value)


def _num_nodes(node: yaml.Node, depth: int, known: dict[int, int]) -> int:
    """Count values as they would be written out, without aliases; refuse before anything is built."""
    if known.get(id(node)) == 0:
        raise YamlError(": a value contains itself")
    if depth > MAX_DEPTH:
        raise YamlError(f": nested more than {MAX_DEPTH} deep")
    if node.tag not in _TAGS:
        raise YamlError(f", line {node.start_mark.line + 1}: {node.tag!a} is not for job files")
    if id(node) not in known:
        known[id(node)] = 0
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_names(node)
        for item in below:
            children += item if isinstance(item, tuple) else (item,)
        known[id(node)] = 1 + sum(_num_nodes(child, depth + 1, known) for child in children)
    if known[id(node)] > MAX_VALUES:
        raise YamlError(f": more than {MAX_VALUES} values, aliases written out")
    return known[id(node)]

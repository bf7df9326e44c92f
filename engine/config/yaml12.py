"""YAML 1.2, restricted to what a config needs.

PyYAML reads version 1.1, where `1e-4` is a string, `010` is 8, `on` is true and `12:30` is 750. Here scalars follow the core
schema of 1.2; duplicate keys, tags that would build Python objects, and anchors that expand without bound are errors.
"""

import re
from typing import Any

import yaml

MAX_NODES = 20_000  # with aliases expanded; a config has hundreds
MAX_DEPTH = 50
TOO_LARGE = f"it expands to more than {MAX_NODES:,} values"

FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
SCALARS = (  # tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("merge", r"<<", "<"),
)


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.n_nodes = getattr(self, "n_nodes", 0) + 1
        if self.n_nodes > MAX_NODES:  # before the rest is read, which is slow
            raise yaml.constructor.ConstructorError(None, None, TOO_LARGE, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


class Dumper(yaml.SafeDumper):
    """Quotes strings that version 1.1 or 1.2 would read as another type."""

    yaml_implicit_resolvers = {first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, indentless=False)


for _tag, _pattern, _first in SCALARS:
    for _kind in (Loader, Dumper):
        first = ["" if c == "\0" else c for c in _first]
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), first)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True))
Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True))


def parse(text: str) -> Any:
    """Return the value of a YAML document. Anything else raises ValueError with one line."""
    loader = None
    try:
        loader = Loader(text)
        if (node := loader.get_single_node()) is None:
            return None
        _measure(node, {}, depth=0)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _measure(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Count the nodes below `node`, with aliases expanded."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if id(node) in known:
        if (size := known[id(node)]) is None:
            raise ValueError("an anchor contains itself")
        return size
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    size = 1 + sum(_measure(child, known, depth + 1) for child in children)
    if size > MAX_NODES:
        raise ValueError(TOO_LARGE)
    known[id(node)] = size
    return size

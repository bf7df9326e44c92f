#!/usr/bin/env python
"""Write what documents derive: the keys of a config and an editor's schema of them, and tables by the programs that make them."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import RunError
from engine.config.schema import REQUIRED, Config
from engine.plugins import Parser

EXAMPLES = """
A table in README.md or docs/ stands between two comments that name the command it is made by. What takes long to measure, the
fault campaign and the benchmark, is written to docs/measured/ by `make faults` and `make bench`, and taken from there.

examples:
  python tools/document.py            write all of it
  python tools/document.py --check    write nothing; exit code 1 if something would change
"""
ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured"
BLOCK = re.compile(r"<!-- (?P<command>[^\n]+): begin -->\n(?P<content>.*?)<!-- (?P=command): end -->", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="document.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    args = parser.parse_args(argv)
    changed = {path: text for path, text in documents() if not path.is_file() or path.read_text() != text}
    if args.check and changed:
        raise RunError(f"out of date, `make docs` writes them: {', '.join(str(path.relative_to(ROOT)) for path in changed)}")
    for path, text in changed.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def documents() -> Iterator[tuple[Path, str]]:
    """Every derived file, with the text that it must have."""
    yield ROOT / "docs" / "configuration.md", configuration()
    yield ROOT / "configs" / "schema.json", json.dumps(json_schema(), indent=2) + "\n"
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        if BLOCK.search(text):
            yield path, BLOCK.sub(_made_anew, text)


# Tables


def _made_anew(block: re.Match[str]) -> str:
    command, content = block["command"], block["content"]
    if command in TABLES:
        content = TABLES[command]().rstrip() + "\n"
    return f"<!-- {command}: begin -->\n{content}<!-- {command}: end -->"


def _models() -> str:
    from tools.count_macs import CONFIGS, of_configs, table

    return table(of_configs(sorted(str(path) for path in CONFIGS.glob("*.yaml")), {}))


def _measured(name: str) -> Callable[[], str]:
    return lambda: (MEASURED / name).read_text()


TABLES: dict[str, Callable[[], str]] = {
    "python tools/count_macs.py": _models,
    "make faults": _measured("faults.md"),
    "make accuracies": _measured("accuracies.md"),
    "make bench": _measured("benchmark.md"),
}


# The keys of a config


def configuration() -> str:
    lines = [
        "# Every key of a config",
        "",
        "`make docs` writes this from [engine/config/schema.py](../engine/config/schema.py). Each key is an option: "
        "`--train.optim.lr 0.01`.",
        "",
        "A file may begin with `base:`, another file or a list of them, relative to itself, and then holds only what differs.",
    ]
    for name, section in _sections(Config):
        lines += ["", f"## {name or 'At the top'}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        hints = get_type_hints(section)
        for spec in _keys(section):
            path = f"{name}.{spec.name}".lstrip(".")
            meaning = spec.metadata["meaning"].replace("<", "&lt;")
            if spec.name == "args":
                lines.append(f"| `{name}.…` | | | {meaning} |")
            else:
                lines.append(f"| `{path}` | {_words(hints[spec.name])}{_bounds(spec)} | {_default(spec)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _sections(section: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    yield prefix, section
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _sections(hint, f"{prefix}.{name}".lstrip("."))


def _keys(section: type) -> list[Field]:
    return [spec for spec in fields(section) if not is_dataclass(get_type_hints(section)[spec.name])]


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(f"`{json.dumps(option) if isinstance(option, bool) else option}`" for option in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_words(get_args(hint)[0])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}[hint]


def _bounds(spec: Field) -> str:
    signs = {"above": ">", "least": "≥", "below": "<", "most": "≤"}
    return "".join(f", {signs[kind]} {bound:g}" for kind, bound in spec.metadata["bounds"].items())


def _value(spec: Field) -> Any:
    return spec.default if spec.default is not MISSING else spec.default_factory()


def _default(spec: Field) -> str:
    value = _value(spec)
    return "must be given" if value == REQUIRED else f"`{value if isinstance(value, str) else json.dumps(value)}`"


# For editors


def json_schema() -> dict[str, Any]:
    base = {"type": ["string", "array"], "items": {"type": "string"}, "description": "a file, or several, that this one changes"}
    schema = _object(Config)
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A config of this project", **schema}


def _object(section: type) -> dict[str, Any]:
    hints, properties = get_type_hints(section), {}
    for spec in fields(section):
        if is_dataclass(hints[spec.name]):
            properties[spec.name] = {**_object(hints[spec.name]), "type": ["object", "null"]}
        elif spec.name != "args":
            properties[spec.name] = {**_of_type(hints[spec.name], spec), "description": spec.metadata["meaning"]}
            if _value(spec) != REQUIRED:
                properties[spec.name]["default"] = _value(spec)
    return {"type": "object", "properties": properties, "additionalProperties": "args" in hints}


def _of_type(hint: Any, spec: Field) -> dict[str, Any]:
    if get_origin(hint) in (Union, UnionType):
        return {"anyOf": [_of_type(option, spec) for option in get_args(hint)]}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is list:
        return {"type": "array", "items": _of_type(get_args(hint)[0], spec)}
    kind = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}[hint]
    words = {"above": "exclusiveMinimum", "least": "minimum", "below": "exclusiveMaximum", "most": "maximum"}
    bounds = {words[name]: bound for name, bound in spec.metadata["bounds"].items()} if kind in ("integer", "number") else {}
    return {"type": kind, **bounds}


if __name__ == "__main__":
    sys.exit(run_tool(main))

#!/usr/bin/env python
"""Write the generated parts of the documents: the page of config keys, the JSON schema for editors, and tables."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import RunError
from engine.config.schema import REQUIRED, Config
from engine.plugins import Parser
from tools import results

EXAMPLES = """
A generated table in README.md or docs/ lies between two comments that name its command. Tables that take long to measure are
written to docs/measured/ by `make faults`, `make exam`, `make planted`, `make results` and `make bench`, and copied from there.

examples:
  python tools/document.py            write all of them
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
    """Yield every generated file and the text that it must have."""
    yield ROOT / "docs" / "configuration.md", configuration()
    yield ROOT / "configs" / "schema.json", json.dumps(json_schema(), indent=2) + "\n"
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), MEASURED / "gpu.md"):
        text = path.read_text()
        if BLOCK.search(text):
            yield path, BLOCK.sub(_regenerated, text)


# Tables


def _regenerated(block: re.Match[str]) -> str:
    command, content = block["command"], block["content"]
    if command in TABLES:
        content = TABLES[command]().rstrip() + "\n"
    return f"<!-- {command}: begin -->\n{content}<!-- {command}: end -->"


def _models() -> str:
    from tools.count_macs import model_tables, of_models  # imports torch: --help needn't

    return model_tables(of_models())


def _on_gpu(file: str) -> str:
    """Return the table of a measurement on a GPU and name the machine."""
    from tools.tables import markdown

    if not (path := MEASURED / file).is_file():
        return "Not measured yet."
    measured = json.loads(path.read_text())
    rows = [row for row in measured["table"] if not row[-1].startswith("not measured")]
    left_out = "; ".join(row[0] for row in measured["table"] if row not in rows)
    table = markdown(rows, right=range(1, len(rows[0]) - 1))
    return f"{measured['machine']}:\n\n{table}" + (f"\n\nNot measured, for want of time: {left_out}." if left_out else "")


TABLES: dict[str, Callable[[], str]] = {
    "python tools/count_macs.py": _models,
    "python tools/gpu_speed.py": partial(_on_gpu, "gpu-speed.json"),
    "python tools/gpu_results.py": partial(_on_gpu, "gpu-results.json"),
    "make faults": (MEASURED / "faults.md").read_text,
    "make exam": (MEASURED / "exam.md").read_text,
    "make planted": (MEASURED / "trajectories.md").read_text,
    "make results": partial(results.table, "classification"),
    "make results: short": partial(results.table, "classification", short=True),
    "make results: masks and boxes": partial(results.table, "masks and boxes"),
    "make results: ablation": results.ablation,
    "make bench": (MEASURED / "benchmark.md").read_text,
    "python tools/benchmark.py data --images FOLDER --busy 2 --output docs/measured": (MEASURED / "data.md").read_text,
}


# The keys of a config

SIGNS = {"above": ">", "least": "≥", "below": "<", "most": "≤"}


def configuration() -> str:
    """Return docs/configuration.md: a table of keys for every section of the schema."""
    lines = [
        "# Every key of a config",
        "",
        "`make docs` writes this page from [engine/config/schema.py](../engine/config/schema.py). Each key is an option: "
        "`--train.optim.lr 0.01`.",
        "",
        "A config may begin with `base:`, a file or a list of files relative to itself, and then contains only the differences.",
    ]
    for name, section in _sections(Config):
        lines += ["", f"## {name or 'At the top'}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        hints = get_type_hints(section)
        for spec in fields(section):
            if is_dataclass(hints[spec.name]):
                continue
            meaning = spec.metadata["meaning"].replace("<", "&lt;")
            if spec.name == "args":
                lines.append(f"| `{name}.…` | | | {meaning} |")
                continue
            path, value = f"{name}.{spec.name}".lstrip("."), _value(spec)
            words = [_words(hints[spec.name]), *(f"{SIGNS[kind]} {bound:g}" for kind, bound in spec.metadata["bounds"].items())]
            default = "must be given" if value == REQUIRED else f"`{value if isinstance(value, str) else json.dumps(value)}`"
            lines.append(f"| `{path}` | {', '.join(words)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _sections(section: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the section and those nested in it, each with its path, such as `train.optim`."""
    yield prefix, section
    for name, hint in get_type_hints(section).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _sections(hint, f"{prefix}.{name}".lstrip("."))


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(f"`{json.dumps(option) if isinstance(option, bool) else option}`" for option in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_words(get_args(hint)[0])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}[hint]


def _value(spec: Field) -> Any:
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


# For editors


def json_schema() -> dict[str, Any]:
    """Return configs/schema.json, by which an editor completes and checks the keys of a config."""
    base = {"type": ["string", "array"], "items": {"type": "string"}, "description": "a config, or several, to build upon"}
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

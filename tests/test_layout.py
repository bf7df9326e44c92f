"""The layout of the code: imports go down only, without a cycle, and the top of a folder holds what belongs there."""

import ast
from functools import cache
from pathlib import Path

import pytest

from datasets.pipeline.catalog import DATASETS
from models.loading.factory import MODELS
from tests.running import ROOT

# From the ground up. A module may import from its own room and from lower floors; models and datasets don't know the engine.
FLOORS = (
    ("engine.config", "models.loading"),
    ("models.heads", "datasets.pipeline", "engine.devices"),
    ("models", "datasets", "engine.plots"),
    ("engine.run", "engine.tasks"),
    ("engine.optim", "engine.plugins"),
    ("engine.state", "engine.evaluate"),
    ("engine.update",),
    ("engine.build",),
    ("engine.train",),
    ("engine",),
    ("engine.inference",),
    ("main", "tools"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def modules() -> dict[str, Path]:
    """Return every module of the program by its dotted name; a package by that of the folder."""
    paths = [ROOT / "main.py", *(p for top in ("engine", "models", "datasets", "tools") for p in (ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports() -> dict[str, set[str]]:
    """Return, for each module, those of the program that it imports: anywhere, also inside functions and for annotations."""
    found = {}
    for name, path in modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import, of {package}"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found[name] |= {known for imported in names if (known := _module(imported)) and known != name}
    return found


def _module(name: str) -> str | None:
    """Return the module that an imported name is, or is defined in; None outside of this program."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def room(module: str) -> str:
    """Return the longest entry of FLOORS that the module lies in."""
    while module not in FLOOR_OF:
        assert "." in module, f"{module} is in no room"
        module = module.rpartition(".")[0]
    return module


def test_imports_go_down():
    upward = [
        f"{module} imports {imported}"
        for module, names in imports().items()
        for imported in names
        if room(module) != room(imported) and FLOOR_OF[room(imported)] >= FLOOR_OF[room(module)]
    ]
    assert not upward


def test_no_module_imports_itself_by_way_of_others():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a cycle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for imported in sorted(imports()[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in imports():
        visit(module, ())


@pytest.mark.parametrize(
    ("folder", "entries"),
    [
        ("models", lambda: {f"{constructor.__module__}" for constructor in map(_class, MODELS.entries.values())}),
        ("datasets", lambda: {_function(spec.load).__module__ for spec in DATASETS.entries.values()}),
    ],
)
def test_every_module_at_the_top_is_a_family_or_a_dataset(folder, entries):
    at_the_top = {f"{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py")} - {f"{folder}.__init__"}
    assert at_the_top <= entries()


def _class(constructor):
    return getattr(constructor, "func", constructor)


def _function(load):
    while hasattr(load, "func"):
        load = load.func
    return load


def test_the_top_of_the_engine_is_the_pages_that_a_newcomer_reads():
    at_the_top = {path.stem for path in (ROOT / "engine").glob("*.py")}
    assert at_the_top == {"__init__", "train", "build", "update", "evaluate", "state", "plugins"}
    tasks = {path.stem for path in (ROOT / "engine" / "tasks").glob("*.py")}
    assert tasks == {"__init__", "classification", "segmentation", "detection"}


def test_the_config_imports_no_torch():
    forbidden = ("torch", "accelerate", "timm", "torchvision", "numpy", "models", "datasets")
    for name, path in modules().items():
        if name.startswith("engine.config"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.partition(".")[0] in forbidden], path

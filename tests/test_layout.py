"""The layout of the code: modules import only from lower layers, without cycles, and few modules are at the top level."""

import ast
from functools import cache
from pathlib import Path

import pytest

from datasets.pipeline.catalog import DATASETS
from models.loading.factory import MODELS
from tests.running import ROOT

# From the bottom up. A module may import from its own package and from lower layers; models and datasets don't import the engine.
LAYERS = (
    ("engine.config", "models.loading"),
    ("models.heads", "datasets.pipeline"),
    ("engine.devices",),
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
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}


@cache
def modules() -> dict[str, Path]:
    """Return {dotted name: path} of every module of the program; a package has the name of its folder."""
    paths = [ROOT / "main.py", *(p for top in ("engine", "models", "datasets", "tools") for p in (ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports() -> dict[str, set[str]]:
    """Return the modules of the program that each module imports, including imports inside functions and for annotations."""
    found = {}
    for name, path in modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import in {package}"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found[name] |= {known for imported in names if (known := _module_of(imported)) and known != name}
    return found


def _module_of(name: str) -> str | None:
    """Return the module with an imported name or the module that defines it; None outside this program."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def package_of(module: str) -> str:
    """Return the longest entry of LAYERS that contains the module."""
    while module not in LAYER_OF:
        assert "." in module, f"{module} is in no layer"
        module = module.rpartition(".")[0]
    return module


def test_modules_import_only_from_lower_layers():
    upward = [
        f"{module} imports {imported}"
        for module, names in imports().items()
        for imported in names
        if package_of(module) != package_of(imported) and LAYER_OF[package_of(imported)] >= LAYER_OF[package_of(module)]
    ]
    assert not upward


def test_there_are_no_import_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path[path.index(module) :], module))}"
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
def test_every_top_level_module_is_a_model_family_or_a_dataset(folder, entries):
    top_level = {f"{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py")} - {f"{folder}.__init__"}
    assert top_level <= entries()


def _class(constructor):
    return getattr(constructor, "func", constructor)


def _function(load):
    while hasattr(load, "func"):
        load = load.func
    return load


def test_the_engine_has_few_top_level_modules():
    top_level = {path.stem for path in (ROOT / "engine").glob("*.py")}
    assert top_level == {"__init__", "train", "build", "update", "evaluate", "state", "plugins"}
    tasks = {path.stem for path in (ROOT / "engine" / "tasks").glob("*.py")}
    assert tasks == {"__init__", "classification", "multilabel", "segmentation", "detection"}


def test_engine_config_does_not_import_torch():
    forbidden = ("torch", "accelerate", "timm", "torchvision", "numpy", "models", "datasets")
    for name, path in modules().items():
        if name.startswith("engine.config"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.partition(".")[0] in forbidden], path

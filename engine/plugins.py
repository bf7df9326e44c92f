"""Models, data sets and tasks of a person's own, from Python files that the command line names.

Such a file holds what the files of this project hold: a table MODELS, DATASETS or TASKS, or several of them. A config never names
one: reading a config runs no code.
"""

import hashlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from engine.config.errors import ConfigError

if TYPE_CHECKING:
    from models.loading.registry import Registry

TABLES = ("MODELS", "DATASETS", "TASKS")

_loaded: dict[Path, str] = {}  # each file with the sha256 of what was run


def load_plugin(path: str | Path) -> None:
    """Make what the file holds available by name; a second time it is there already."""
    file = Path(path).expanduser().resolve()
    if file in _loaded:
        return
    module, digest = _run(file, said=f"--plugin {path}")
    tables = {name: getattr(module, name) for name in TABLES if hasattr(module, name)}
    if not tables:
        raise ConfigError(f"--plugin {path}: it has none of the tables {', '.join(TABLES)}, so it offers nothing")
    try:
        _register(tables, str(path))
    except ValueError as error:
        raise ConfigError(f"--plugin {error}; give it another name") from error
    _loaded[file] = digest


def loaded() -> dict[str, str]:
    """The files, with the sha256 of each, for the record of a run."""
    return {str(file): digest for file, digest in _loaded.items()}


def expect_those_of(run_dir: Path) -> None:
    """A run that was trained with plugins needs them again, by name of the file; it may have moved."""
    environment = run_dir / "environment.json"
    if not environment.is_file():
        return
    there = {file.name for file in _loaded}
    for path in json.loads(environment.read_text()).get("plugins", {}):
        if Path(path).name not in there:
            raise ConfigError(f"{run_dir} was trained with a plugin; add --plugin {path}")


def _run(file: Path, said: str) -> tuple[ModuleType, str]:
    name = f"plugin_{file.stem}"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{said}: can't be read ({error.strerror})") from error
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, file))
    sys.modules[name] = module  # where pickle and dataclasses look for it
    try:
        exec(compile(content, file, "exec"), module.__dict__)  # the very bytes whose digest is noted
    except Exception as error:  # whatever a person's own code raises
        del sys.modules[name]
        line = error.lineno if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ConfigError(f"{said}: doesn't import ({type(error).__name__}: {error}, line {line})") from error
    return module, hashlib.sha256(content).hexdigest()


def _register(tables: dict[str, object], source: str) -> None:
    from datasets.pipeline.catalog import DATASETS  # imports torch, which --help does without
    from engine.tasks import TASKS
    from models.loading.factory import MODELS

    registries: dict[str, Registry] = {"MODELS": MODELS, "DATASETS": DATASETS, "TASKS": TASKS}
    for name, table in tables.items():
        registries[name].register(table, source)

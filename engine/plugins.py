"""A user's models, datasets and tasks, from Python files that the command line names.

A plugin has the same tables as the files of this project: MODELS, DATASETS, TASKS, or several of them. A config can't name one,
so that reading a config runs no code.
"""

import argparse
import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.command_line import OverrideParser
from engine.config.errors import ConfigError
from engine.run.folder import ENVIRONMENT, plugins_in, read_replaceable

if TYPE_CHECKING:
    from models.loading.registry import Registry


class Parser(OverrideParser):
    """The parser of main.py and of every tool: keys of the config are options, and --plugin loads files."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        help = "models, datasets or tasks of your own; may be given several times"
        self.add_argument("--plugin", action=_Load, default=[], metavar="FILE.py", help=help)


class _Load(argparse.Action):
    """Loads a plugin as soon as its option is parsed."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        load_plugin(value)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), value])


_loaded: dict[Path, str] = {}  # each file with the sha256 of what was run


def load_plugin(path: str | Path) -> None:
    """Make the models, datasets and tasks of a file available by name. Loading it again does nothing."""
    file = Path(path).expanduser().resolve()
    if file in _loaded:
        return
    option, name = f"--plugin {path}", f"plugin_{file.stem}"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(option, f"can't be read ({error.strerror})") from error
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise ConfigError(option, "is not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle and dataclasses look for it
    try:
        exec(compile(content, file, "exec"), module.__dict__)  # the same bytes whose digest is recorded
    except Exception as error:  # whatever a user's code raises
        del sys.modules[name]
        line = error.lineno if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ConfigError(option, f"doesn't import ({type(error).__name__}: {error}, line {line})") from error
    from datasets.pipeline.catalog import DATASETS  # imports torch, which --help does without
    from engine.tasks import TASKS
    from models.loading.factory import MODELS

    registries: dict[str, Registry] = {"MODELS": MODELS, "DATASETS": DATASETS, "TASKS": TASKS}
    tables = {name: getattr(module, name) for name in registries if hasattr(module, name)}
    if not tables:
        raise ConfigError(option, f"it has none of the tables {', '.join(registries)}, so it offers nothing")
    try:
        for name, table in tables.items():
            registries[name].register(table, str(path))
    except ValueError as error:
        raise ConfigError(f"--plugin {error}; give it another name") from error
    _loaded[file] = hashlib.sha256(content).hexdigest()


def loaded_plugins() -> dict[str, str]:
    """Return the files with the sha256 of each, for the record of a run."""
    return {str(file): digest for file, digest in _loaded.items()}


def require_run_plugins(run_dir: Path) -> None:
    """Require the plugins that the run was started with. They are recognized by file name, so they may have moved."""
    environment = read_replaceable(run_dir, ENVIRONMENT, dict)
    names = {file.name for file in _loaded}
    for path in plugins_in(environment):
        if Path(path).name not in names:
            raise ConfigError(f"{run_dir} was trained with a plugin; add --plugin {path}")

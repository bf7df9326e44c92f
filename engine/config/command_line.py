"""Command-line options: a few of each program, and every key of the config."""

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from engine.config import yaml12
from engine.config.errors import ConfigError, RunError
from engine.config.schema import keys
from engine.config.suggestions import nearest, nearest_key
from engine.config.text import printable

MAX_LINE = 4_000  # characters of an error message, which may quote a file


class OverrideParser(argparse.ArgumentParser):
    """An ArgumentParser that treats every option it does not declare as a key of the config."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_with_overrides(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Return the declared options, and {"train.optim.lr": 0.1, ...} for the rest."""
        argv = list(sys.argv[1:] if argv is None else argv)
        declared = {option for action in self._actions for option in action.option_strings}
        declared_tokens: list[str] = []
        override_tokens: list[str] = []
        while argv:
            token = argv.pop(0)
            name = token.partition("=")[0]
            if not token.startswith("--") or token == "--" or name in declared:
                declared_tokens.append(token)
                takes_value = name in declared and "=" not in token and self._option_string_actions[name].nargs != 0
                if takes_value and argv:
                    declared_tokens.append(argv.pop(0))
                continue
            override_tokens.append(token)
            if "=" not in token and argv and not _is_option(argv[0]):
                override_tokens.append(argv.pop(0))
        overrides = parse_overrides(override_tokens, declared)
        return self.parse_intermixed_args(declared_tokens), overrides


def run_tool(main: Callable[[], int]) -> int:
    """Run a program's main. A user's mistake becomes one line on stderr and an exit code; a bug keeps its traceback."""
    rank = os.environ.get("RANK", "0")
    try:
        return main()
    except (ConfigError, RunError) as error:
        if rank == "0" or not error.on_every_rank:
            print(printable(f"error{f' on rank {rank}' if rank != '0' else ''}: {error}")[:MAX_LINE], file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the first step, or in a tool: there is nothing to save
        print("interrupted", file=sys.stderr)
        return 130


def require_packages(*modules: str, needed_by: str, listed_in: str = "requirements-extra.txt") -> None:
    """Raise RunError unless these packages are installed."""
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        raise RunError(f"{needed_by} needs packages that are not installed: {', '.join(missing)}; pip install -r {listed_in}")


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ValueError, ModuleNotFoundError):  # sys.modules has None for it: the import is blocked; or its package is missing
        return False


def parse_overrides(tokens: Sequence[str], declared: Collection[str] = ()) -> dict[str, Any]:
    """Return {"train.optim.lr": 0.1} for ["--train.optim.lr", "0.1"], ["--train.optim.lr=0.1"] or ["train.optim.lr=0.1"]."""
    tokens = list(tokens)
    overrides: dict[str, Any] = {}
    while tokens:
        token = tokens.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") and not equals:
            raise ConfigError(f"{token}: expected --key value or key=value (a list with spaces in it needs quotes)")
        sections = {key.partition(".")[0] for key in keys()}
        if not name or name.partition(".")[0] not in sections:
            hint = nearest(f"--{name}", declared) or nearest_key(name, keys(), sorted(sections))
            raise ConfigError(f"--{name}", "no such option or config key", hint)
        if not equals:
            if not tokens or _is_option(tokens[0]):
                raise ConfigError(f"--{name}: needs a value")
            text = tokens.pop(0)
        try:
            overrides[name] = yaml12.parse(text)
        except ValueError as error:
            raise ConfigError(f"--{name}: {text!r} can't be read: {error}") from error
    return overrides


def _is_option(token: str) -> bool:
    """Tell -c and --key from the values -1, -1e-4 and -.inf."""
    return token.startswith("--") or (len(token) > 1 and token[0] == "-" and not (token[1].isdigit() or token[1] == "."))

"""Command-line options: a few of the program's own, and every key of the config."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, NoReturn

from engine.config import yaml12
from engine.config.errors import ConfigError, RunError
from engine.plugins import load_plugin


class Parser(argparse.ArgumentParser):
    """argparse, with every option it doesn't know taken as a key of the config."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="FILE.py",
            help="models, data sets or tasks of your own; may be given again",
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_with_overrides(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """This program's options, and {"train.optim.lr": 0.1, ...} for the rest."""
        argv = list(sys.argv[1:] if argv is None else argv)
        own = {option for action in self._actions for option in action.option_strings}
        own_tokens: list[str] = []
        override_tokens: list[str] = []
        while argv:
            token = argv.pop(0)
            name = token.partition("=")[0]
            if not token.startswith("--") or token == "--" or name in own:
                own_tokens.append(token)
                takes_value = name in own and "=" not in token and self._option_string_actions[name].nargs != 0
                if takes_value and argv:
                    own_tokens.append(argv.pop(0))
                continue
            override_tokens.append(token)
            if "=" not in token and argv and not _is_option(argv[0]):
                override_tokens.append(argv.pop(0))
        overrides = parse_overrides(override_tokens, own)
        return self.parse_intermixed_args(own_tokens), overrides

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        """Every other way to parse comes by here."""
        parsed, rest = super().parse_known_args(*args, **kwargs)
        for file in parsed.plugin:
            load_plugin(file)
        return parsed, rest


def run_tool(main: Callable[[], int]) -> int:
    """Run a program's main; a mistake of its user becomes one line on stderr and an exit code, a bug keeps its traceback."""
    rank = os.environ.get("RANK", "0")
    try:
        return main()
    except (ConfigError, RunError) as error:
        if rank == "0" or not error.is_of_all_ranks:
            print(f"error{f' on rank {rank}' if rank != '0' else ''}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the first step, or of a tool: there is nothing to save
        print("interrupted", file=sys.stderr)
        return 130


def expect_installed(*modules: str, asked_by: str) -> None:
    """The packages of requirements-extra.txt that `asked_by`, a tool or an option of one, imports."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        said = f"{asked_by} needs what is not installed: {', '.join(missing)}"
        raise RunError(f"{said}; pip install -r requirements-extra.txt")


def parse_overrides(tokens: Sequence[str], own: Sequence[str] | set[str] = ()) -> dict[str, Any]:
    """{"train.optim.lr": 0.1} from ["--train.optim.lr", "0.1"], ["--train.optim.lr=0.1"] or ["train.optim.lr=0.1"]."""
    tokens = list(tokens)
    overrides: dict[str, Any] = {}
    while tokens:
        token = tokens.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") and not equals:
            raise ConfigError(f"{token}: expected --key value or key=value (a list with spaces in it needs quotes)")
        if not equals:
            if not tokens or _is_option(tokens[0]):
                _expect_key(name, own)
                raise ConfigError(f"--{name}: needs a value")
            text = tokens.pop(0)
        _expect_key(name, own)
        try:
            overrides[name] = yaml12.parse(text)
        except ValueError as error:
            raise ConfigError(f"--{name}: {text!r} can't be read: {error}") from error
    return overrides


def _is_option(token: str) -> bool:
    """-c and --key are options; -1, -1e-4 and -.inf are values."""
    return token.startswith("--") or (len(token) > 1 and token[0] == "-" and not (token[1].isdigit() or token[1] == "."))


def _expect_key(name: str, own: Sequence[str] | set[str]) -> None:
    from engine.config.resolve import did_you_mean, keys

    sections = {key.partition(".")[0] for key in keys()}
    if not name or name.partition(".")[0] not in sections:
        near = get_close_matches(f"--{name}", own, n=1)
        hint = f"; did you mean {near[0]}?" if near else did_you_mean(name, keys(), sorted(sections))
        raise ConfigError(f"--{name}: no such option or config key{hint}")

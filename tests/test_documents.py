"""What README and docs/ say can be done: links lead somewhere, and commands are ones that the programs take."""

import re
import shlex
from pathlib import Path

import pytest

from engine import check, load_config
from engine.command_line import Parser
from engine.config import keys
from tests.running import ROOT, run_command

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"```sh\n(.+?)```", re.DOTALL)
KEY = re.compile(r"`(?:--)?((?:data|augment|dataloader|model|train|eval|distill|tracking|segmentation|detection)\.[a-z0-9_.]+)")
OPEN = ("model.", "data.", "train.optim.", "distill.")  # sections whose other keys are somebody's arguments


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(FENCED.findall(page.read_text())).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


ALL = [(page.stem, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_that_are_named_exist(page):
    known = keys()
    for key in KEY.findall(page.read_text()):
        key = key.rstrip(".")
        is_known = key in known or any(name.startswith(f"{key}.") for name in known)
        assert is_known or key.startswith(OPEN), key


@pytest.mark.parametrize(("page", "words"), ALL, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])
def test_a_command_names_files_that_exist_and_options_that_are_taken(page, words):
    for word in words:
        if re.fullmatch(r"(?:configs|tools|tests)/[\w/.*]+", word):
            assert list(ROOT.glob(word)), word
    if "main.py" in words and "--plugin" not in words:
        argv = words[words.index("main.py") + 1 :]
        parser = Parser(prog="main.py")
        for option in ("-c", "-e", "-r"):
            parser.add_argument(option)
        for option in ("--print_config", "--dry_run"):
            parser.add_argument(option, action="store_true")
        args, overrides = parser.parse_with_overrides(argv)
        if args.c is not None or args.r is None:
            check(load_config(ROOT / args.c if args.c else None, overrides))


RUN_HERE = re.compile(r"digits|shapes|schedule|count_macs.py --model|--list")


@pytest.mark.long
@pytest.mark.parametrize(
    "words", [words for _, words in ALL if RUN_HERE.search(" ".join(words)) and words[0] == "python"], ids=str
)
def test_a_command_that_needs_no_data_runs(words, tmp_path):
    words = [tmp_path / "run" if word.startswith("runs/") else word for word in words]
    trains = "main.py" in words and not {"--print_config", "--dry_run"} & set(words)
    words += ["--train.n_epochs", 1, "-e", tmp_path / "run"] if trains else []
    words += ["-o", tmp_path / "picture.png"] if {"tools/visualize.py", "tools/find_lr.py"} & set(words) else []
    finished = run_command(*words)
    assert finished.returncode == 0, finished.stderr

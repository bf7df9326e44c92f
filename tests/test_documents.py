"""What README and docs/ say can be done: links lead somewhere, and commands are ones that the programs take."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import check, load_config
from engine.command_line import Parser
from engine.config import keys
from tests.running import ROOT, run_command, run_main

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


# What a command needs that isn't here: a download, several devices, a cluster, a package index, an end
ELSEWHERE = re.compile(
    r"cifar|imagenet|imagefolder|coco_|voc|convnext|multi_gpu|fsdp|torchrun|accelerate|runs/large|runs/mine|--plugin"
)
NO_DATA = re.compile(r"visualize.py (schedule|model) -c|count_macs.py|--print_config")
SHORTER = {
    "main.py": "--train.n_epochs 1",
    "find_lr.py": "--n_updates 20",
    "sweep.py": "--trials 2 --train.n_steps 20 --train.eval_freq 10",
}
OF_SHAPES = "--data.n_train 64 --data.n_test 32 --train.batch_size 16"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The project as somebody has it who has trained a few times, in a folder of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("main.py", "configs", "engine", "models", "datasets", "tools", "tests", "docs", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    digits = ("-c", "configs/lenet_digits.yaml", "--train.n_epochs", 2)
    scenes = (
        "--model.layers",
        "[1,1,1,1]",
        "--data.n_train",
        16,
        "--data.n_test",
        8,
        "--train.batch_size",
        8,
        "--train.n_steps",
        2,
    )
    for name, argv in {
        "first": digits,
        "second": (*digits, "--seed", 2),
        "segmenter": ("-c", "configs/segmentation_resnet18_shapes.yaml", *scenes),
        "detector": ("-c", "configs/detection_resnet18_shapes.yaml", *scenes),
    }.items():
        assert run_main("-e", folder / "runs" / name, *argv) == 0
    pictures = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), dtype=np.uint8)
    for i, (place, pixels) in enumerate(zip(("my_pictures/train/a", "my_pictures/val/b", "photos"), pictures, strict=False)):
        (folder / place).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / place / f"{i}.jpg")
    return folder


def runnable(page: Path) -> list[str]:
    lines = "\n".join(FENCED.findall(page.read_text())).replace("\\\n", " ").splitlines()
    here = (line for line in lines if line.startswith("python ") and (NO_DATA.search(line) or not ELSEWHERE.search(line)))
    return [line.partition("  #")[0].strip() for line in here]


def test_most_commands_need_nothing_that_is_not_here():
    assert sum(len(runnable(page)) for page in PAGES) > 40


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_a_page_can_be_followed(page, checkout):
    """Each command literally, one after the other; what trains long is made shorter by options at its end."""
    for line in runnable(page):
        program = line.split()[1].rpartition("/")[2]
        is_training = "--print_config" not in line and " -r " not in line
        more = SHORTER.get(program, "") if is_training else ""
        more += f" {OF_SHAPES}" if more and "shapes" in line else ""
        finished = run_command("bash", "-c", f"{line} {more}", cwd=checkout)
        assert finished.returncode == 0, f"{line} {more}: {finished.stderr}"

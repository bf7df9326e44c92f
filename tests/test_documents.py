"""README and docs/ are correct: linked files and named keys exist, and the programs accept the commands."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import load_config
from engine.config.schema import keys
from engine.plugins import Parser
from tests import on_disk
from tests.faults.children import run_script
from tests.running import ROOT, run_command, run_main

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"```sh\n(.+?)```", re.DOTALL)
KEY = re.compile(r"`(?:--)?((?:data|augment|dataloader|model|train|eval|distill|tracking|segmentation|detection)\.[a-z0-9_.]+)")
OPEN = ("model.", "data.", "train.optim.", "distill.")  # sections whose other keys are arguments of a model, dataset or optimizer


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(FENCED.findall(page.read_text())).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


ALL = [(page.stem, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_keys_exist(page):
    known = keys()
    for key in KEY.findall(page.read_text()):
        key = key.rstrip(".")
        is_known = key in known or any(name.startswith(f"{key}.") for name in known)
        assert is_known or key.startswith(OPEN), key


@pytest.mark.parametrize(("page", "words"), ALL, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])
def test_a_command_names_existing_files_and_accepted_options(page, words):
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
            load_config(ROOT / args.c if args.c else None, overrides)


# Commands that need something a test machine lacks: a large download, several GPUs, a cluster, hours, a file shown on the page
ELSEWHERE = re.compile(
    r"coco_|voc|convnext|multi_gpu|one_gpu|fsdp|_imagenet|benchmark.py model|vgg1\[|runs/large|--plugin|seed-\*|--until"
)
NO_DATA = re.compile(r"visualize.py (schedule|model) -c|count_macs.py|--print_config")
SHORTER = {
    "main.py": "--train.n_epochs 1",
    "find_lr.py": "--n_updates 20",
    "verify_dataset.py": "",
    "sweep.py": "--trials 2 --train.n_steps 20 --train.eval_freq 10",
}
SMALLER_DATA = {
    "shapes": "--data.n_train 64 --data.n_test 32 --train.batch_size 16",
    "cifar": "--data.verify false --train.n_steps 2 --train.n_epochs null --train.batch_size 8",
    "own_": "--data.img_size 32 --train.n_steps 2 --train.n_epochs null --train.batch_size 4",
    "own_classes": "--model.pretrained false",
    "own_table": "--model.pretrained false",
    "finetune": "--model.pretrained false --train.n_steps 2 --train.n_epochs null --train.batch_size 4",
}


def write_own_data(folder: Path) -> None:
    """Write data in every layout of docs/own-data.md."""
    pictures = on_disk.write_image_folder(folder / "my_pictures", n_classes=3)
    on_disk.write_table(folder / "my_table")
    on_disk.write_parquet(folder / "my_parquet", pictures)
    on_disk.write_shards(folder / "my_shards", pictures)
    images = sorted(pictures.glob("train/*/*.jpg"))
    lines = [f"{path.relative_to(folder)},{'|'.join(('cat', 'dog', 'bird')[: 1 + i % 3])}" for i, path in enumerate(images)]
    (folder / "my_tags.csv").write_text("\n".join(["path,tags", *lines]))
    on_disk.write_yolo(folder / "my_yolo", 16, 8)
    on_disk.write_coco(folder / "my_coco", 16, 8)
    on_disk.write_voc(folder / "voc", 16, 8)
    (folder / "voc" / "VOCdevkit" / "VOC2012").rename(folder / "my_voc")
    for part in ("train", "val"):
        on_disk.write_pairs(folder / "my_masks" / part)
        (folder / "CamVid").mkdir(exist_ok=True)
        made = on_disk.write_pairs(folder / "made" / part, n_classes=3)
        shutil.copytree(made / "images", folder / "CamVid" / part)
        shutil.copytree(made / "masks", folder / "CamVid" / f"{part}annot")
    colors = np.array([(128, 64, 128), (0, 0, 192), (64, 0, 128), (0, 0, 0)], np.uint8)
    (folder / "my_colors" / "pictures").mkdir(parents=True)
    (folder / "my_colors" / "label_colors.txt").write_text("128 64 128 road\n0 0 192 sidewalk\n64 0 128 car\n0 0 0 void\n")
    for path in (folder / "made" / "train" / "masks").iterdir():
        shutil.copy(path.parent.parent / "images" / f"{path.stem}.jpg", folder / "my_colors" / "pictures")
        classes = np.minimum(np.array(Image.open(path)), 3)
        Image.fromarray(colors[classes]).save(folder / "my_colors" / "pictures" / f"{path.stem}_mask.png")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, data_root):
    """A folder with the project, some finished runs, the user's images, and a home directory with the datasets."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("main.py", "configs", "engine", "models", "datasets", "tools", "tests", "docs", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    digits = ("-c", "configs/lenet_digits.yaml", "--train.n_epochs", 2)
    scenes = ("--model.layers", "[1,1,1,1]", "--data.n_train", 16, "--data.n_test", 8, "--train.batch_size", 8)
    for name, argv in {
        "first": digits,
        "second": (*digits, "--seed", 2),
        "segmenter": ("-c", "configs/segmentation_resnet18_shapes.yaml", *scenes, "--train.n_steps", 2),
        "detector": ("-c", "configs/detection_resnet18_shapes.yaml", *scenes, "--train.n_steps", 2),
    }.items():
        assert run_main("-e", folder / "runs" / name, *argv) == 0
    write_own_data(folder)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    (folder / "photos").mkdir()
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.jpg")
    (folder / "home").mkdir()
    (folder / "home" / "data").symlink_to(data_root)
    return folder


def runnable(page: Path) -> list[str]:
    lines = "\n".join(FENCED.findall(page.read_text())).replace("\\\n", " ").splitlines()
    programs = ("python ", "torchrun ")
    selected = (line for line in lines if line.startswith(programs) and (NO_DATA.search(line) or not ELSEWHERE.search(line)))
    return [line.partition("  #")[0].strip() for line in selected]


def shortened(line: str) -> str:
    """Return the command with more options, which make the training short and the datasets small."""
    program = re.search(r"[\w]+\.py", line)[0]
    if program not in SHORTER or "--print_config" in line or " -r " in line:
        return line
    return " ".join([line, SHORTER[program], *(options for word, options in SMALLER_DATA.items() if word in line)])


def test_most_commands_can_run_on_a_test_machine():
    assert sum(len(runnable(page)) for page in PAGES) > 50


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, checkout):
    """Run the printed commands one after the other, with the options that `shortened` adds."""
    for line in runnable(page):
        if (run_dir := re.search(r" -e (\S+)", line)) and " -r " not in line:
            shutil.rmtree(checkout / run_dir[1], ignore_errors=True)
        home = {"HOME": str(checkout / "home"), "XDG_CACHE_HOME": str(checkout.parent / "cache")}
        program, *words = shlex.split(shortened(line), comments=True)
        if program == "python" and "*" not in line:
            finished = run_script(*words, timeout=300, cwd=checkout, **home)
        else:
            finished = run_command("bash", "-c", shortened(line), cwd=checkout, **home)
        assert finished.returncode == 0, f"{shortened(line)}: {finished.stderr}"

"""Compare input pipelines in images per second: this project's and those of other packages, on generated images."""

import os
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from datasets import shards
from datasets.pipeline.loaders import Preparation, Workers, eval_loader, train_loader
from datasets.pipeline.order import Order
from datasets.pipeline.splits import Files, Images, Source, Split
from tools.benchmarks.random_sets import HEIGHT, WIDTH, write_jpegs, write_shards
from tools.benchmarks.report import N_CORES, Options, Ratio, Report, report
from tools.benchmarks.rivals import Transformed, new_loader
from tools.benchmarks.sides import OURS, Length, Turns, Work, race, speed_ratio
from tools.tables import plain

MEAN, STD, SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224
CPU, NORMALIZED = torch.device("cpu"), [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
CROPPED = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
BATCH = {"in memory": 256, "in files": 64}
IN_MEMORY, IN_FILES = "CIFAR-sized images in memory, training", f"JPEGs of {WIDTH}x{HEIGHT} to {SIZE}x{SIZE}"
IN_SHARDS = f"{IN_FILES} in tar shards, training"
PIL, TIMM, SHARDS = "torchvision's transforms on PIL", "timm's create_loader", "webdataset's loader, torchvision's transforms"
AT_LEAST = {(IN_MEMORY, f"{PIL}, 2 workers"): 30.0, (f"{IN_FILES}, training", TIMM): 2.5}
COLUMNS = ("images", "pipeline", "images/s", "lowest", "highest", "times", "core ms/image", "times")
FORMATS = ("", "", ",.0f", ",.0f", ",.0f", ".2f", ".4f", ".2f")


def measure(options: Options) -> Report:
    n_images, workers = options.choose(50_000, 2_048), options.num_workers
    root, in_tar = options.folder / "jpegs", options.folder / "shards"
    root.mkdir()
    write_jpegs(root, options.choose(65_536, 4_096))
    comparisons: dict[str, dict[str, Work]] = {
        IN_MEMORY: {
            OURS: partial(in_memory, n_images),
            **{f"{PIL}, {n} workers": partial(torchvision_in_memory, n_images, n) for n in (0, 2)},
            "the limit: gathered and normalized only": partial(in_memory, n_images, augment=False),
        }
    }
    files = {OURS: in_files, **({TIMM: timm_in_files} if find_spec("timm") else {}), PIL: torchvision_in_files}
    for kind in ("training", "evaluation"):
        is_training = kind == "training"
        comparisons[f"{IN_FILES}, {kind}"] = {name: partial(f, root, workers, is_training) for name, f in files.items()}
    write_shards(in_tar, root / "class", options.choose(4_096, 512))
    streams = {SHARDS: webdataset_in_shards} if find_spec("webdataset") else {}
    comparisons[IN_SHARDS] = {name: partial(f, in_tar, workers) for name, f in {OURS: in_shards, **streams}.items()}
    length = options.choose(Length(12, turns=3, seconds=2.0), Length(2, turns=1, seconds=0.2))
    threads = options.num_threads or torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    ratios: list[Ratio] = []
    for title, works in comparisons.items():
        speeds = race(works, length, threads, title)
        ours = speeds[OURS]
        for name, speed in speeds.items():
            rates = {"images_per_sec": speed.steady, "lowest": speed.lowest, "highest": speed.highest}
            cores = {"core_ms_per_image": speed.core_ms, "fewer_core_ms_by": speed.core_ms / ours.core_ms}
            rows.append({"comparison": title, "pipeline": name, **rates, "faster_by": ours.steady / speed.steady, **cores})
        ratios += [speed_ratio(title, name, speeds, AT_LEAST.get((title, name))) for name in speeds if name != OURS]
    left_out = [f"{name}, which is not installed" for name in ("timm", "webdataset") if not find_spec(name)]
    head = f"{N_CORES} cores, {threads} threads in the main process, {workers} workers for files"
    cells = [[format(value, spec) for value, spec in zip(row.values(), FORMATS, strict=True)] for row in rows]
    table = plain([COLUMNS, *cells], right=range(2, len(COLUMNS)))
    text = "\n".join([head, *(f"left out: {name}" for name in left_out), table])
    return report(ratios, left_out, text, threads=threads, workers=workers, batch_size=BATCH, rows=rows)


# The pipelines, each of which reads batches until it is stopped


def in_memory(n: int, turns: Turns, *, augment: bool = True) -> None:
    """Read CIFAR-sized images by this project: a random crop of the padded image, half of them mirrored."""
    prepare = Preparation(32, MEAN, STD, augment, crop_padding=4, padding_mode="constant", hflip=True, cutout=0)
    loader = train_loader(Images(*_random_images(n)), Order(n, BATCH["in memory"], seed=0), prepare, Workers(), CPU)
    _read(loader.batches(0, sys.maxsize), "in memory", turns)


def torchvision_in_memory(n: int, workers: int, turns: Turns) -> None:
    images, labels = _random_images(n)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]  # C H W -> H W C
    steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *NORMALIZED]
    data = Transformed(pictures, labels.tolist(), transforms.Compose(steps))
    _read(new_loader(data, BATCH["in memory"], workers), "in memory", turns)


def in_files(root: Path, n_workers: int, is_training: bool, turns: Turns) -> None:
    """Read JPEGs by this project: random crops and mirroring for training, the center for evaluation."""
    paths = np.array([os.fsencode(path) for path in sorted(root.glob("*/*.jpg"))])
    _read_split(Files(paths, torch.zeros(len(paths), dtype=torch.int64)), n_workers, is_training, turns)


def in_shards(root: Path, n_workers: int, turns: Turns) -> None:
    _read_split(shards.load(Source(root), several=False).train, n_workers, True, turns)


def _read_split(split: Split, n_workers: int, is_training: bool, turns: Turns) -> None:
    workers, batch_size = Workers(n_workers), BATCH["in files"]
    prepare = Preparation(SIZE, MEAN, STD, augment=True, crop_padding=0, padding_mode="constant", hflip=True, cutout=0)
    if is_training:
        loader = train_loader(split, Order(len(split), batch_size, seed=0), prepare, workers, CPU)
        _read(loader.batches(0, sys.maxsize), "in files", turns)
    else:
        _read(eval_loader(split, batch_size, 0, 1, prepare, workers, CPU).batches(), "in files", turns)


def torchvision_in_files(root: Path, workers: int, is_training: bool, turns: Turns) -> None:
    evaluation = [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    data = ImageFolder(root, transforms.Compose([*(CROPPED if is_training else evaluation), *NORMALIZED]))
    _read(new_loader(data, BATCH["in files"], workers), "in files", turns)


def timm_in_files(root: Path, workers: int, is_training: bool, turns: Turns) -> None:
    from timm.data import create_dataset, create_loader

    warnings.simplefilter("ignore")  # pinned memory without a GPU
    training: dict[str, Any] = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": None}
    steps = {"interpolation": "bilinear", "mean": MEAN, "std": STD, **(training if is_training else {"crop_pct": 0.875})}
    loading: dict[str, Any] = {"num_workers": workers, "persistent_workers": False, "device": CPU}
    data = create_dataset("", str(root))
    loader = create_loader(data, (3, SIZE, SIZE), BATCH["in files"], is_training=is_training, **steps, **loading)
    _read(loader, "in files", turns)


def webdataset_in_shards(root: Path, workers: int, turns: Turns) -> None:
    """Read tar files by webdataset: any shard at any time, and samples shuffled among 1,000."""
    import webdataset

    data = webdataset.WebDataset(sorted(map(str, root.glob("*.tar"))), resampled=True).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg", "cls").map_tuple(transforms.Compose([*CROPPED, *NORMALIZED]), int).batched(BATCH["in files"])
    _read(webdataset.WebLoader(data, batch_size=None, num_workers=workers), "in files", turns)


def _read(batches: Iterable[Any], where: str, turns: Turns) -> None:
    for _ in turns.counted(batches, BATCH[where]):
        pass


def _random_images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(n) % 10

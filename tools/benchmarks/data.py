"""Compare input pipelines: this project's and those of other packages, on generated images or on a folder of JPEGs."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from datasets import shards
from datasets.pipeline.loaders import Preparation, Workers, eval_loader, train_loader
from datasets.pipeline.order import Order
from datasets.pipeline.splits import Files, Images, Source, Split
from engine.config.errors import ConfigError
from tools.benchmarks.random_sets import HEIGHT, WIDTH, write_cifar10, write_jpegs, write_shards
from tools.benchmarks.report import Options, Report, report
from tools.benchmarks.rivals import Job, cifar10_loader, new_loader
from tools.benchmarks.sides import OURS, Length, Turns, Work, installed, race, speed_ratios

MEAN, STD, SIZE, BATCH_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 64
IN_MEMORY, IN_MEMORY_BATCH_SIZE = "CIFAR-sized images in memory, training", 256
PLAIN, PLAIN_2 = (f"torchvision's transforms on PIL, {n} workers" for n in (0, 2))
TIMM, SHARDS, DALI, TURBO = "timm's create_loader", "webdataset, torchvision on PIL", "NVIDIA DALI on the CPU", "turboloader"
TORCHCODEC = "torchcodec, torchvision's transforms v2"
MODULES = {TIMM: "timm", SHARDS: "webdataset", DALI: "nvidia.dali", TURBO: "turboloader", TORCHCODEC: "torchcodec"}
AT_LEAST = {PLAIN_2: 30.0, TIMM: 2.5}  # in training


def measure(options: Options) -> Report:
    root, in_tar, workers = options.folder / "jpegs", options.folder / "shards", options.num_workers
    pictures = [path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")] if options.images else []
    if options.images and not pictures:
        raise ConfigError(f"--images {options.images}", "it has no JPEGs")
    write_jpegs(root, options.choose(65_536, 4_096), pictures)
    write_shards(in_tar, root / "class", options.choose(4_096, 512))
    jpegs = f"{f'{len(pictures):,} JPEGs' if pictures else f'JPEGs of {WIDTH}x{HEIGHT}'} to {SIZE}x{SIZE}"
    comparisons = {} if pictures else {IN_MEMORY: works_in_memory(options)}
    decoders = {"torchvision's transforms on PIL": default_loader, "torchvision's decode_jpeg and transforms v2": by_torchvision}
    in_torchvision = {name: partial(torchvision_in_files, load) for name, load in {**decoders, TORCHCODEC: by_torchcodec}.items()}
    files: dict[str, Callable[..., None]] = {OURS: in_files, TIMM: timm_in_files, DALI: dali_in_files, **in_torchvision}
    for kind in ("training", "evaluation"):
        comparisons[f"{jpegs}, {kind}"] = {name: partial(f, root, workers, kind == "training") for name, f in files.items()}
    streams = {OURS: in_shards, SHARDS: webdataset_in_shards, TURBO: turboloader_in_shards}
    comparisons[f"{jpegs} in tar shards, training"] = {name: partial(f, in_tar, workers) for name, f in streams.items()}

    length = options.choose(Length(12, turns=3, seconds=2.0), Length(2, turns=1, seconds=0.2))
    threads, ratios, left_out = options.num_threads or torch.get_num_threads(), [], dict[str, None]()
    for title, works in comparisons.items():
        works, missing = installed(works, MODULES)
        left_out |= dict.fromkeys(missing)
        speeds = race(works, length, threads, title, options.busy)
        for name in list(speeds)[1:]:
            aim = AT_LEAST.get(name) if "training" in title else None
            ratios += speed_ratios(title, name, speeds, aim, kept=name == PLAIN)
    setting = f"{threads} threads in the main process, {workers} workers for files, {options.busy} busy processes"
    return report(ratios, setting, [*left_out])


# The pipelines, each of which reads batches until it is stopped


def works_in_memory(options: Options) -> dict[str, Work]:
    n, root = options.choose(50_000, 2_000), options.folder / "cifar"
    job = Job("none", root=write_cifar10(root, n, 100), batch_size=IN_MEMORY_BATCH_SIZE)
    return {
        OURS: partial(in_memory, n),
        **{name: partial(plain_in_memory, replace(job, workers=w)) for name, w in ((PLAIN, 0), (PLAIN_2, 2))},
        "the limit: gathered and normalized only": partial(in_memory, n, augment=False),
    }


def in_memory(n: int, turns: Turns, *, augment: bool = True) -> None:
    """Read CIFAR-sized images by this project: a random crop of the padded image, half of them mirrored."""
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepare = Preparation(32, MEAN, STD, augment, crop_padding=4, padding_mode="constant", hflip=True, cutout=0)
    split, order = Images(images, torch.arange(n) % 10), Order(n, IN_MEMORY_BATCH_SIZE, seed=0)
    _read(train_loader(split, order, prepare, Workers(), torch.device("cpu")).batches(0, sys.maxsize), turns, order.batch_size)


def plain_in_memory(job: Job, turns: Turns) -> None:
    _read(cifar10_loader(job), turns, job.batch_size)


def in_files(root: Path, n_workers: int, is_training: bool, turns: Turns) -> None:
    """Read JPEGs by this project: random crops and mirroring for training, the center for evaluation."""
    paths = np.array([os.fsencode(path) for path in sorted(root.glob("*/*.jpg"))])
    _read_split(Files(paths, torch.zeros(len(paths), dtype=torch.int64)), n_workers, is_training, turns)


def in_shards(root: Path, n_workers: int, turns: Turns) -> None:
    _read_split(shards.load(Source(root), several=False).train, n_workers, True, turns)


def _read_split(split: Split, n_workers: int, is_training: bool, turns: Turns) -> None:
    prepare = Preparation(SIZE, MEAN, STD, augment=True, crop_padding=0, padding_mode="constant", hflip=True, cutout=0)
    workers, device = Workers(n_workers), torch.device("cpu")
    if is_training:
        _read(train_loader(split, Order(len(split), BATCH_SIZE, 0), prepare, workers, device).batches(0, sys.maxsize), turns)
    else:
        _read(eval_loader(split, BATCH_SIZE, 0, 1, prepare, workers, device).batches(), turns)


def by_torchvision(path: str) -> torch.Tensor:
    return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


def by_torchcodec(path: str) -> torch.Tensor:
    from torchcodec import decoders

    return decoders.decode_jpeg(path)


def torchvision_in_files(load: Callable[[str], Any], root: Path, workers: int, is_training: bool, turns: Turns) -> None:
    data = ImageFolder(root, _steps(is_training, on_pil=load is default_loader), loader=load)
    _read(new_loader(data, BATCH_SIZE, workers), turns)


def _steps(is_training: bool, *, on_pil: bool) -> Any:
    t = transforms if on_pil else v2
    crop = [t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()] if is_training else [t.Resize(256), t.CenterCrop(SIZE)]
    return t.Compose([*crop, t.ToTensor() if on_pil else t.ToDtype(torch.float32, scale=True), t.Normalize(MEAN, STD)])


def timm_in_files(root: Path, workers: int, is_training: bool, turns: Turns) -> None:
    from timm.data import create_dataset, create_loader

    warnings.simplefilter("ignore")  # pinned memory without a GPU
    training: dict[str, Any] = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": None}
    steps = {"interpolation": "bilinear", "mean": MEAN, "std": STD, **(training if is_training else {"crop_pct": 0.875})}
    loading: dict[str, Any] = {"num_workers": workers, "persistent_workers": False, "device": torch.device("cpu")}
    data = create_dataset("", str(root))
    _read(create_loader(data, (3, SIZE, SIZE), BATCH_SIZE, is_training=is_training, **steps, **loading), turns)


def dali_in_files(root: Path, workers: int, is_training: bool, turns: Turns) -> None:
    """Read JPEGs by DALI, which in training decodes only the random crop."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=workers, device_id=None, seed=0)
    def pipeline() -> Any:
        files, labels = fn.readers.file(file_root=str(root), random_shuffle=is_training, name="files")
        if is_training:
            images = fn.resize(fn.decoders.image_random_crop(files), size=(SIZE, SIZE))
        else:
            images = fn.resize(fn.decoders.image(files), resize_shorter=256)
        mirror, scale = (
            fn.random.coin_flip() if is_training else 0,
            {"mean": [255 * m for m in MEAN], "std": [255 * s for s in STD]},
        )
        return fn.crop_mirror_normalize(images, crop=(SIZE, SIZE), mirror=mirror, dtype=types.FLOAT, **scale), labels

    _read(DALIGenericIterator([pipeline()], ["images", "labels"], reader_name="files"), turns)


def webdataset_in_shards(root: Path, workers: int, turns: Turns) -> None:
    """Read tar files by webdataset: any shard at any time, and samples shuffled among 1,000."""
    import webdataset

    data = webdataset.WebDataset(sorted(map(str, root.glob("*.tar"))), resampled=True).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg", "cls").map_tuple(_steps(True, on_pil=True), int).batched(BATCH_SIZE)
    _read(webdataset.WebLoader(data, batch_size=None, num_workers=workers), turns)


def turboloader_in_shards(root: Path, workers: int, turns: Turns) -> None:
    """Read tar files by turboloader, one after the other; it decodes only the random crop."""
    import turboloader

    steps = {"image_size": SIZE, "train_aug": True, "antialias": True, "transform": turboloader.ImageNetNormalize()}
    options = {"output_format": "pytorch", "shuffle": True, "drop_last": True, "num_workers": workers}
    loaders = [turboloader.DataLoader(str(path), BATCH_SIZE, **steps, **options) for path in sorted(root.glob("*.tar"))]
    _read(chain.from_iterable(cycle(loaders)), turns)


def _read(batches: Iterable[Any], turns: Turns, batch_size: int = BATCH_SIZE) -> None:
    for _ in turns.counted(batches, batch_size):
        pass

"""Compare input pipelines: this project's and those of other packages, on generated images or on a folder of JPEGs."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from engine.config.errors import ConfigError
from tools.benchmarks import ours
from tools.benchmarks.random_sets import HEIGHT, WIDTH, write_cifar10, write_jpegs, write_shards
from tools.benchmarks.report import Options, Ratio, Report, report
from tools.benchmarks.rivals import LENET, Job, cifar10_loader, new_loader
from tools.benchmarks.sides import OURS, Length, Turns, Work, installed, race, speed_ratios

MEAN, STD, SIZE, BATCH_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 64
PLAIN, PLAIN_2, ON_PIL = (f"torchvision's transforms on PIL{workers}" for workers in (", 0 workers", ", 2 workers", ""))
TORCHVISION, TORCHCODEC = (f"{decoder}, torchvision's transforms v2" for decoder in ("torchvision's decode_jpeg", "torchcodec"))
TIMM, DALI, SHARDS, TURBO = "timm's create_loader", "NVIDIA DALI on the CPU", f"webdataset, {ON_PIL}", "turboloader"
MODULES = {TIMM: "timm", SHARDS: "webdataset", DALI: "nvidia.dali", TURBO: "turboloader", TORCHCODEC: "torchcodec"}
FAST = "evaluation, eval.resize torch"
AT_LEAST = {PLAIN_2: 30.0, TIMM: 2.5}  # in training


def measure(options: Options) -> Report:
    root, in_tar, n_workers = options.folder / "jpegs", options.folder / "shards", options.num_workers
    job, found = replace(LENET, root=root, batch_size=BATCH_SIZE), options.images.rglob("*") if options.images else ()
    pictures = sorted(path for path in found if path.suffix.lower() in (".jpg", ".jpeg"))
    if options.images and not pictures:
        raise ConfigError(f"--images {options.images}", "it has no JPEGs")
    write_jpegs(root / "train", options.choose(65_536, 4_096), pictures)
    (root / "val").symlink_to("train")
    write_shards(in_tar, root / "train" / "class", options.choose(4_096, 512))
    jpegs = f"{f'{len(pictures):,} JPEGs' if pictures else f'JPEGs of {WIDTH}x{HEIGHT}'} to {SIZE}x{SIZE}"
    comparisons: dict[str, dict[str, Work]] = {} if pictures else {"CIFAR-sized images in memory, training": in_memory(options)}
    rivals = {TIMM: timm_in_files, DALI: dali_in_files}
    rivals |= {name: partial(torchvision_in_files, name) for name in (ON_PIL, TORCHVISION, TORCHCODEC)}
    keys = {"data.img_size": SIZE, "dataloader.num_workers": n_workers, "eval.batch_size": BATCH_SIZE}
    in_files, in_shards = ({**keys, "data.name": name} for name in ("imagefolder", "shards"))
    kinds: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
        "training": ("train", in_files, rivals),
        "evaluation": ("valid", in_files, rivals),
        FAST: ("valid", {**in_files, "eval.resize": "torch"}, {DALI: dali_in_files}),
    }
    for kind, (split, chosen, others) in kinds.items():
        comparisons[f"{jpegs}, {kind}"] = {
            OURS: partial(ours.read, job, chosen, split),
            **{name: partial(read, root / "train", n_workers, split == "train") for name, read in others.items()},
        }
    comparisons[f"{jpegs} in tar shards, training"] = {
        OURS: partial(ours.read, replace(job, root=in_tar), in_shards, "train"),
        SHARDS: partial(webdataset_in_shards, in_tar, n_workers),
        TURBO: partial(turboloader_in_shards, in_tar, n_workers),
    }
    length = options.choose(Length(12, turns=3, seconds=2.0), Length(2, turns=1, seconds=0.2))
    ratios, left_out = list[Ratio](), list[str]()
    for title, works in comparisons.items():
        works, missing = installed(works, MODULES)
        left_out += missing
        if len(works) == 1:
            continue
        speeds = race(works, length, options.num_threads, title, options.busy)
        for name in [*works][1:]:
            aim = AT_LEAST.get(name) if "training" in title else 1.0 if FAST in title else None
            ratios += speed_ratios(title, name, speeds, aim, kept=name == PLAIN)
    return report(ratios, f"{options.setting}, workers for files: {n_workers}", sorted(set(left_out)))


def in_memory(options: Options) -> dict[str, Work]:
    job = replace(LENET, root=write_cifar10(options.folder / "cifar", options.choose(50_000, 5_000), 100))
    plain = {name: partial(plain_in_memory, replace(job, workers=n)) for name, n in ((PLAIN, 0), (PLAIN_2, 2))}
    limit = partial(ours.read, job, {"augment.enabled": False}, "train")
    return {OURS: partial(ours.read, job, {}, "train"), **plain, "the limit: gathered and normalized only": limit}


def plain_in_memory(job: Job, turns: Turns) -> None:
    _read(cifar10_loader(job), turns, job.batch_size)


def torchvision_in_files(name: str, root: Path, workers: int, is_training: bool, turns: Turns) -> None:
    load = default_loader if name == ON_PIL else partial(_decode, name)
    _read(new_loader(ImageFolder(root, _steps(is_training, on_pil=name == ON_PIL), loader=load), BATCH_SIZE, workers), turns)


def _decode(name: str, path: str) -> torch.Tensor:
    if name == TORCHVISION:
        return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
    return import_module("torchcodec.decoders").decode_jpeg(path)


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
        decoded = fn.decoders.image_random_crop(files) if is_training else fn.decoders.image(files)
        images = fn.resize(decoded, **({"size": (SIZE, SIZE)} if is_training else {"resize_shorter": 256}))
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

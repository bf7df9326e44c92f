"""Input pipelines: images per second beside torchvision's and timm's, on data generated for it; each is warmed up apart."""

import json
import os
import sys
import tempfile
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.benchmarks.measure import FULL, QUICK, Batches, Comparison, Ratio, Row, measure, n_cores, ratio, table

OURS = "this project"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_MEMORY_BATCH, FILES_BATCH = 256, 64
HEIGHT, WIDTH, QUALITY, IMG_SIZE = 375, 500, 88, 224  # of the generated JPEGs: about 60 kB each
DIFFERENT_JPEGS = 64
PREFETCHED = 2  # batches for each worker, everywhere
IN_MEMORY, IN_FILES = "CIFAR-sized images in memory, training", f"JPEGs of {WIDTH}x{HEIGHT} to {IMG_SIZE}x{IMG_SIZE}"
PIL, TIMM = "torchvision's transforms on PIL", "timm's create_loader"
AT_LEAST = {(IN_MEMORY, f"{PIL}, 2 workers"): 30.0, (f"{IN_FILES}, training", TIMM): 2.5}


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("data", description=__doc__, help="input pipelines beside torchvision's and timm's")
    command.add_argument("--num_workers", type=int, default=2, help="for images in files (default: 2)")
    command.add_argument("--num_threads", type=int, help="of torch in the main process (default: torch's own choice)")
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    import torch

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    n_images, n_files = (2_048, 1_024) if args.quick else (50_000, 16_384)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        write_jpegs(Path(folder), n_files)
        comparisons = [in_memory(n_images), *from_files(Path(folder), args.num_workers)]
        rows = [row for comparison in comparisons for row in measure(comparison, QUICK if args.quick else FULL)]
    setting = {
        "cores": n_cores(),
        "threads": torch.get_num_threads(),
        "workers": args.num_workers,
        "batch_size": {"in memory": IN_MEMORY_BATCH, "in files": FILES_BATCH},
        "left_out": [] if find_spec("timm") else ["timm, which is not installed"],
    }
    if args.json:
        ratios = [asdict(one) for one in beside_ours(rows)]
        print(json.dumps({**setting, "rows": [asdict(row) for row in rows], "ratios": ratios}, indent=2))
        return 0
    print("{cores} cores, {threads} threads in the main process, {workers} workers for files".format(**setting))
    print("\n".join([*(f"left out: {name}" for name in setting["left_out"]), *table(rows)]))
    return 0


def beside_ours(rows: Sequence[Row]) -> list[Ratio]:
    ours = {row.comparison: row.images_per_sec for row in rows if row.pipeline == OURS}
    return [
        ratio(
            *(row.comparison, row.pipeline, "images/s", ours[row.comparison], row.images_per_sec),
            at_least=AT_LEAST.get((row.comparison, row.pipeline)),
        )
        for row in rows
        if row.pipeline != OURS
    ]


def in_memory(n: int) -> Comparison:
    """Images as of CIFAR: a random crop of the padded image, half of them mirrored."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from datasets.pipeline.loaders import Workers, train_loader
    from datasets.pipeline.order import Order
    from datasets.pipeline.splits import Images

    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Images(images, torch.arange(n) % 10)
    pictures = [(Image.fromarray(image.permute(1, 2, 0).numpy()), label) for label, image in enumerate(images)]
    steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *_to_normalized_tensor()]

    def ours() -> Iterator[Any]:
        order = Order(n, IN_MEMORY_BATCH, seed=0)
        loader = train_loader(split, order, _preparation(32, crop_padding=4), Workers(), torch.device("cpu"))
        return loader.batches(0, sys.maxsize)

    pipelines: dict[str, Batches] = {OURS: ours}
    for workers in (0, 2):
        data = _Transformed(pictures, transforms.Compose(steps))
        pipelines[f"{PIL}, {workers} workers"] = _endless_loader(data, IN_MEMORY_BATCH, workers)

    def limit() -> Iterator[Any]:
        order = Order(n, IN_MEMORY_BATCH, seed=0)
        loader = train_loader(split, order, replace(_preparation(32), augment=False), Workers(), torch.device("cpu"))
        return loader.batches(0, sys.maxsize)

    pipelines["the limit: gathered and normalized only"] = limit
    return Comparison(IN_MEMORY, pipelines)


def from_files(root: Path, workers: int) -> list[Comparison]:
    """JPEGs to 224 x 224: random crops and mirroring for training, the middle for evaluation."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    training = [transforms.RandomResizedCrop(IMG_SIZE), transforms.RandomHorizontalFlip(), *_to_normalized_tensor()]
    evaluation = [transforms.Resize(256), transforms.CenterCrop(IMG_SIZE), *_to_normalized_tensor()]
    comparisons = []
    for title, steps in (("training", training), ("evaluation", evaluation)):
        is_training = title == "training"
        pipelines = {OURS: _our_files(root, workers, is_training=is_training)}
        if find_spec("timm"):
            pipelines[TIMM] = _timm_loader(root, workers, is_training=is_training)
        data = ImageFolder(root, transforms.Compose(steps))
        pipelines[PIL] = _endless_loader(data, FILES_BATCH, workers)
        comparisons.append(Comparison(f"{IN_FILES}, {title}", pipelines))
    return comparisons


def _our_files(root: Path, n_workers: int, *, is_training: bool) -> Batches:
    import numpy as np
    import torch

    from datasets.pipeline.loaders import Workers, eval_loader, train_loader
    from datasets.pipeline.order import Order
    from datasets.pipeline.splits import Files

    paths = np.array([os.fsencode(path) for path in sorted(root.glob("*/*.jpg"))])
    split = Files(paths, torch.zeros(len(paths), dtype=torch.int64))
    workers, prepare, cpu = Workers(n_workers, prefetch_factor=PREFETCHED), _preparation(IMG_SIZE), torch.device("cpu")

    def start() -> Iterator[Any]:
        if not is_training:
            return eval_loader(split, FILES_BATCH, 0, 1, prepare, workers, cpu).batches()
        return train_loader(split, Order(len(split), FILES_BATCH, seed=0), prepare, workers, cpu).batches(0, sys.maxsize)

    return start


def _timm_loader(root: Path, workers: int, *, is_training: bool) -> Batches:
    import torch
    from timm.data import create_dataset, create_loader

    def start() -> Iterator[Any]:
        training = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pinning, where there is no GPU
            yield from create_loader(
                create_dataset("", root),
                input_size=(3, IMG_SIZE, IMG_SIZE),
                batch_size=FILES_BATCH,
                is_training=is_training,
                interpolation="bilinear",
                mean=MEAN,
                std=STD,
                num_workers=workers,
                persistent_workers=False,
                device=torch.device("cpu"),
                **(training if is_training else {"crop_pct": 0.875}),
            )

    return start


def _endless_loader(data: Any, batch_size: int, workers: int) -> Batches:
    from torch.utils.data import DataLoader, RandomSampler

    def start() -> Iterator[Any]:
        sampler = RandomSampler(data, replacement=True, num_samples=10**7)
        return iter(
            DataLoader(data, batch_size, sampler=sampler, num_workers=workers, prefetch_factor=PREFETCHED if workers else None)
        )

    return start


def _to_normalized_tensor() -> list[Any]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]


def _preparation(img_size: int, crop_padding: int = 0) -> Any:
    from datasets.pipeline.loaders import Preparation

    return Preparation(
        img_size, MEAN, STD, augment=True, crop_padding=crop_padding, padding_mode="constant", hflip=True, cutout=0
    )


@dataclass
class _Transformed:
    """A map-style data set of pictures that are there."""

    pictures: Sequence[tuple[Any, int]]
    transform: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, label = self.pictures[index]
        return self.transform(picture), label


def write_jpegs(root: Path, n: int) -> None:
    """Clouds of several sizes with some grain, in a folder of one class; a few different ones under many names."""
    import torch
    from PIL import Image
    from torch.nn import functional as F

    folder = root / "class"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(DIFFERENT_JPEGS):
        picture = torch.full((1, 3, HEIGHT, WIDTH), 128.0)
        for cells, strength in ((3, 70), (6, 45), (12, 32), (24, 23), (48, 16), (96, 11), (192, 7)):
            gray = torch.randn(1, 1, cells, cells * 4 // 3, generator=generator)
            color = torch.randn(1, 3, cells, cells * 4 // 3, generator=generator)
            picture += strength * F.interpolate(gray + 0.4 * color, (HEIGHT, WIDTH), mode="bicubic")
        picture += 5 * torch.randn(1, 1, HEIGHT, WIDTH, generator=generator)
        pixels = picture[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=QUALITY)
    for i in range(DIFFERENT_JPEGS, n):
        os.link(folder / f"{i % DIFFERENT_JPEGS:06d}.jpg", folder / f"{i:06d}.jpg")

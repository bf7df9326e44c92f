#!/usr/bin/env python
"""How fast this project is, each time beside what people would use otherwise, measured in the same run."""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.command_line import Parser, run_tool

EXAMPLES = """
data: images per second of every input pipeline, on data that is generated for it. The pipelines take turns, each is warmed up
apart, and the median counts. Whatever else the machine does falls on all of them.
checkpoint: committing a checkpoint of ResNet-18 under SGD with momentum, beside a bare save of the same tensors that flushes too.

examples:
  python tools/benchmark.py data
  python tools/benchmark.py checkpoint
  python tools/benchmark.py data --num_workers 2 --num_threads 1 --json
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_MEMORY_BATCH, FILES_BATCH = 256, 64
HEIGHT, WIDTH, QUALITY, IMG_SIZE = 375, 500, 88, 224  # of the generated JPEGs: about 60 kB each
DIFFERENT_JPEGS = 64
SAVES = 15
PREFETCHED = 2  # batches for each worker, everywhere


@dataclass(frozen=True)
class Size:
    rounds: int
    seconds: float  # of each measurement
    warm_up: int  # batches
    n_images: int
    n_files: int


FULL, QUICK = Size(5, 4.0, 12, 50_000, 16_384), Size(1, 0.2, 2, 2_048, 1_024)

Batches = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Comparison:
    """The first pipeline is this project's, the others are its rivals."""

    title: str
    pipelines: dict[str, Batches]


@dataclass(frozen=True)
class Row:
    comparison: str
    pipeline: str
    images_per_sec: float  # the median of the rounds
    lowest: float
    highest: float
    faster_by: float  # we than this one
    core_ms_per_image: float  # of all its processes; other load on the machine hardly changes it
    fewer_core_ms_by: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmark.py", description=__doc__, epilog=EXAMPLES)
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    data = what.add_parser("data", description="Input pipelines.", help="input pipelines beside torchvision's and timm's")
    data.add_argument("--num_workers", type=int, default=2, help="for images in files (default: 2)")
    data.add_argument("--num_threads", type=int, help="of torch in the main process (default: torch's own choice)")
    checkpoint = what.add_parser("checkpoint", description="Saving.", help="a checkpoint beside a bare save")
    for program in (data, checkpoint):
        program.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures are then rough")
        program.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    if args.what == "checkpoint":
        saves = measure_saves(QUICK.rounds if args.quick else SAVES)
        print(json.dumps(saves, indent=2) if args.json else saves_table(saves))
        return 0

    import torch

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    size = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        write_jpegs(Path(folder), size.n_files)
        comparisons = [in_memory(size.n_images), *from_files(Path(folder), args.num_workers)]
        rows = [row for comparison in comparisons for row in measure(comparison, size)]
    setting = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "workers": args.num_workers,
        "batch_size": {"in memory": IN_MEMORY_BATCH, "in files": FILES_BATCH},
        "left_out": [] if find_spec("timm") else ["timm, which is not installed"],
    }
    print(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2) if args.json else tables(setting, rows))
    return 0


def measure(comparison: Comparison, size: Size) -> list[Row]:
    from tqdm import tqdm

    rates: dict[str, list[float]] = {name: [] for name in comparison.pipelines}
    core_ms: dict[str, list[float]] = {name: [] for name in comparison.pipelines}
    turns = [(name, start) for _ in range(size.rounds) for name, start in comparison.pipelines.items()]
    for name, start in tqdm(turns, desc=comparison.title, leave=False, disable=not sys.stderr.isatty()):
        n, seconds, core_seconds = run(start(), size)
        rates[name].append(n / seconds)
        core_ms[name].append(1000 * core_seconds / n)
    ours = next(iter(rates))
    return [
        Row(
            comparison.title,
            name,
            median(rates[name]),
            min(rates[name]),
            max(rates[name]),
            median(rates[ours]) / median(rates[name]),
            median(core_ms[name]),
            median(core_ms[name]) / median(core_ms[ours]),
        )
        for name in rates
    ]


def run(batches: Iterator[Any], size: Size) -> tuple[int, float, float]:
    """Images, seconds, and seconds of all cores, while the pipeline runs: neither its start nor its end is counted."""
    for _ in range(size.warm_up):
        next(batches)
    n, begin, cores_begin = 0, time.perf_counter(), _core_seconds()
    for images, _ in batches:
        n += len(images)
        elapsed = time.perf_counter() - begin
        if elapsed > size.seconds:
            return n, elapsed, _core_seconds() - cores_begin
    raise RuntimeError("the data ended before the time did")


def _core_seconds() -> float:
    """Spent so far by this process and its workers."""
    import psutil

    of_workers = [worker.cpu_times() for worker in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in of_workers)


def tables(setting: dict[str, Any], rows: Sequence[Row]) -> str:
    lines = ["{cores} cores, {threads} threads in the main process, {workers} workers for files".format(**setting)]
    lines.append("times: how many times as fast this project is, or as few core milliseconds it needs")
    lines += [f"left out: {name}" for name in setting["left_out"]]
    for title in dict.fromkeys(row.comparison for row in rows):
        lines += ["", f"{title:46s} images/s   (lowest to highest)   times  core ms/image   times"]
        for row in (row for row in rows if row.comparison == title):
            span = f"({row.lowest:,.0f} to {row.highest:,.0f})"
            lines.append(
                f"  {row.pipeline:44s} {row.images_per_sec:8,.0f} {span:>21s} {row.faster_by:7.2f} "
                f"{row.core_ms_per_image:14.4f} {row.fewer_core_ms_by:7.2f}"
            )
    return "\n".join(lines)


# Saving


def measure_saves(rounds: int) -> dict[str, float]:
    """Milliseconds, medians of saves that take turns; the first of each isn't counted."""
    import torch
    from safetensors.torch import save_file

    from engine.checkpoint import Checkpoints
    from models import create_model

    model = create_model("resnet18", n_classes=10, in_channels=3, img_size=32, first_block="cifar10")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    times: dict[str, list[float]] = {"this project": [], "bare": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        run_dir = Path(folder)
        checkpoints = Checkpoints(run_dir, keep_last=3)

        def ours(n: int) -> None:
            checkpoints.save(n, model.state_dict(), {"optimizer": optimizer.state_dict(), "step": n}, best_step=None)

        def bare(n: int) -> None:
            save_file(model.state_dict(), run_dir / "model.safetensors")
            torch.save({"optimizer": optimizer.state_dict(), "step": n}, run_dir / "state.pt")
            for name in ("model.safetensors", "state.pt"):
                with (run_dir / name).open("rb+") as file:
                    os.fsync(file.fileno())

        for n in range(1 + rounds):
            for name, save in (("this project", ours), ("bare", bare)):
                begin = time.perf_counter()
                save(n)
                times[name].append(1000 * (time.perf_counter() - begin))
        megabytes = sum(file.stat().st_size for file in (run_dir / "ckpt" / "latest").iterdir()) / 1e6
    ms = {name: median(measured[1:]) for name, measured in times.items()}
    return {"megabytes": megabytes, "ms": ms["this project"], "bare_ms": ms["bare"], "times": ms["this project"] / ms["bare"]}


def saves_table(saves: dict[str, float]) -> str:
    return (
        f"a checkpoint of {saves['megabytes']:.0f} MB, verified and committed   {saves['ms']:7.0f} ms\n"
        f"a bare save of the same tensors, flushed too    {saves['bare_ms']:7.0f} ms\n"
        f"{saves['times']:.2f} times as long"
    )


# The pipelines


def in_memory(n: int) -> Comparison:
    """Images as of CIFAR: a random crop of the padded image, half of them mirrored."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from datasets.loaders import Workers, train_loader
    from datasets.order import Order
    from datasets.splits import Images

    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Images(images, torch.arange(n) % 10)
    pictures = [(Image.fromarray(image.permute(1, 2, 0).numpy()), label) for label, image in enumerate(images)]
    steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *_to_normalised_tensor()]

    def ours() -> Iterator[Any]:
        order = Order(n, IN_MEMORY_BATCH, seed=0)
        loader = train_loader(split, order, _preparation(32, crop_padding=4), Workers(), torch.device("cpu"))
        return loader.batches(0, sys.maxsize)

    pipelines: dict[str, Batches] = {"this project": ours}
    for workers in (0, 2):
        data = _Transformed(pictures, transforms.Compose(steps))
        pipelines[f"torchvision's transforms on PIL, {workers} workers"] = _endless_loader(data, IN_MEMORY_BATCH, workers)

    def limit() -> Iterator[Any]:
        order = Order(n, IN_MEMORY_BATCH, seed=0)
        loader = train_loader(split, order, replace(_preparation(32), augment=False), Workers(), torch.device("cpu"))
        return loader.batches(0, sys.maxsize)

    pipelines["the limit: gathered and normalised only"] = limit
    return Comparison("CIFAR-sized images in memory, training", pipelines)


def from_files(root: Path, workers: int) -> list[Comparison]:
    """JPEGs to 224 x 224: random crops and mirroring for training, the middle for evaluation."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    training = [transforms.RandomResizedCrop(IMG_SIZE), transforms.RandomHorizontalFlip(), *_to_normalised_tensor()]
    evaluation = [transforms.Resize(256), transforms.CenterCrop(IMG_SIZE), *_to_normalised_tensor()]
    comparisons = []
    for title, steps in (("training", training), ("evaluation", evaluation)):
        is_training = title == "training"
        pipelines = {"this project": _our_files(root, workers, is_training=is_training)}
        if find_spec("timm"):
            pipelines["timm's create_loader"] = _timm_loader(root, workers, is_training=is_training)
        data = ImageFolder(root, transforms.Compose(steps))
        pipelines["torchvision's transforms on PIL"] = _endless_loader(data, FILES_BATCH, workers)
        comparisons.append(Comparison(f"JPEGs of {WIDTH}x{HEIGHT} to {IMG_SIZE}x{IMG_SIZE}, {title}", pipelines))
    return comparisons


def _our_files(root: Path, n_workers: int, *, is_training: bool) -> Batches:
    import numpy as np
    import torch

    from datasets.loaders import Workers, eval_loader, train_loader
    from datasets.order import Order
    from datasets.splits import Files

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


def _to_normalised_tensor() -> list[Any]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]


def _preparation(img_size: int, crop_padding: int = 0) -> Any:
    from datasets.loaders import Preparation

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
            grey = torch.randn(1, 1, cells, cells * 4 // 3, generator=generator)
            colour = torch.randn(1, 3, cells, cells * 4 // 3, generator=generator)
            picture += strength * F.interpolate(grey + 0.4 * colour, (HEIGHT, WIDTH), mode="bicubic")
        picture += 5 * torch.randn(1, 1, HEIGHT, WIDTH, generator=generator)
        pixels = picture[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=QUALITY)
    for i in range(DIFFERENT_JPEGS, n):
        os.link(folder / f"{i % DIFFERENT_JPEGS:06d}.jpg", folder / f"{i:06d}.jpg")


if __name__ == "__main__":
    sys.exit(run_tool(main))

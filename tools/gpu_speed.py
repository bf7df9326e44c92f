#!/usr/bin/env python
"""Measure the engine on a GPU beside bare loops: its speed, waits for the device, CUDA graphs, regions and image files."""

import json
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch._inductor.config as inductor
from PIL import Image
from torch.nn import functional as F

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from datasets.pipeline.catalog import DATASETS
from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source
from engine import load_config, train
from engine.build import build_model, described_data
from engine.config.command_line import run_tool
from engine.config.errors import RunError
from engine.config.resolve import ResolvedConfig
from engine.plugins import Parser
from tools.document import MEASURED, ROOT
from tools.tables import plain, print_lines, write_text

EXAMPLES = """
Images are random. `make docs` copies the table to docs/measured/gpu.md.

examples:
  python tools/gpu_speed.py
  python tools/gpu_speed.py --device cpu --quick -o speed.json     a trial of this program: small and not compiled
"""
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}  # TFLOP/s in bf16, dense
LATE = "not measured: no time left"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "Memcpy DtoH")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse("gpu_speed.py", __doc__, EXAMPLES, MEASURED / "gpu-speed.json", argv)
    card = open_device(args.device)
    inductor.force_disable_caches = True  # each part compiles, whatever was compiled before
    load = partial(random_images, 2**22 if args.quick else 2**29)
    DATASETS.entries["random", "classes"] = DatasetSpec("random", load, 3, 224, (0.5,) * 3, (0.25,) * 3, 10, hflip=True)
    return measure(["part", "this project", "the other", "ratio", "details"], parts(args.quick, card), args, card)


# What every table of measurements on a GPU has


def parse(program: str, doc: str | None, examples: str, output: Path, argv: Sequence[str] | None, *more: Any) -> Namespace:
    parser = Parser(prog=program, description=doc, epilog=examples)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="small images and few updates, not compiled")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part that would take longer (default: 9)")
    shown = output.relative_to(ROOT)
    parser.add_argument("-o", "--output", type=Path, default=output, metavar="FILE", help=f"default: {shown}")
    for name, options in more:
        parser.add_argument(name, **options)
    return parser.parse_args(argv)


def open_device(device: str) -> str:
    """Return the name of the GPU, or hide all of them."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "CPU"
    if not torch.cuda.is_available():
        raise RunError("there is no CUDA device; --device cpu --quick tries this program")
    return torch.cuda.get_device_name()


def measure(head: list[str], parts: Mapping[str, tuple[int, Callable[[Path], list[str]]]], args: Namespace, card: str) -> int:
    """Fill a table with the parts for which there is time. After each the file is complete so far."""
    start, table = time.monotonic(), [head]
    for name, (seconds, part) in parts.items():
        is_late = time.monotonic() - start + seconds / (20 if args.quick else 1) > 60 * args.minutes
        table.append([name, *(only_details(head, LATE) if is_late else measured(head, part))])
        machine = f"{card}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%F')}"
        machine += f", in {time.monotonic() - start:.0f} s"
        write_text(args.output, json.dumps({"machine": machine, "table": table}, indent=1) + "\n")
        print_lines(", ".join(filter(None, table[-1])), flush=True)
    print_lines(plain(table, right=range(1, len(head) - 1)))
    return 0


def measured(head: list[str], part: Callable[[Path], list[str]]) -> list[str]:
    """Return the cells of a part. What it raises becomes its result, so that the others are measured too."""
    torch.compiler.reset()
    try:
        with TemporaryDirectory() as folder:
            return part(Path(folder))
    except Exception as error:
        traceback.print_exc()
        return only_details(head, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def only_details(head: list[str], details: str) -> list[str]:
    return [*[""] * (len(head) - 2), details]


# The parts


def parts(quick: bool, card: str) -> dict[str, tuple[int, Callable[[Path], list[str]]]]:
    """Return each part with the seconds that it takes on an H100."""
    small = partial(config_of, quick, "resnet18", 32, 4 if quick else 512, **{"model.first_block": "cifar10"})
    half: Any = partial(small, **{"train.batch_size": 2 if quick else 256})
    size = (64, 2) if quick else (224, 256)
    resnet50, vit, alexnet = (partial(config_of, quick, name, *size) for name in ("resnet50", "vit_small", "alexnet"))
    graphs, regions = ({}, {}) if quick else ({"train.compile_mode": "reduce-overhead"}, {"train.compile": "regions"})
    return {
        "ResNet-18, 32 px, batch 512": (100, partial(beside_bare, small, card)),
        "ResNet-18, batch 256: CUDA graphs, default": (80, partial(beside, half(**graphs), half())),
        "ResNet-50, 224 px, batch 256": (140, partial(beside_bare, resnet50, card)),
        "AlexNet, 224 px: JPEGs of 500x375, memory": (60, partial(from_files, alexnet)),
        "ViT-S/16, 224 px, batch 256": (110, partial(beside_bare, vit, card)),
        "ResNet-50: regions, whole": (100, partial(beside, resnet50(**regions), resnet50())),
        "ViT-S/16: regions, whole": (80, partial(beside, vit(**regions), vit())),
    }


def config_of(quick: bool, model: str, img_size: int, batch_size: int, **keys: Any) -> ResolvedConfig:
    """Return a config that trains on random images, in five windows between log lines, without evaluations on the way."""
    n = 2 if quick else 50 if img_size > 32 else 200
    length = {f"train.{key}_freq": 5 * n for key in ("eval", "save")} | {"train.print_freq": n, "train.n_steps": 5 * n}
    speed = {"train.precision": "bf16", "train.channels_last": True, "train.compile": not quick}
    data = {"data.name": "random", "data.img_size": img_size, "train.batch_size": batch_size, "train.optim.lr": 0.001}
    return load_config(None, {"model.name": model, **length, **speed, **data, **keys})


def random_images(most_bytes: int, source: Source) -> Loaded:
    """Return as many images as CIFAR-10 has, or as `most_bytes` hold, so that an epoch has many updates."""
    side = source.img_size or 224
    n = min(50_000, most_bytes // (3 * side**2))
    split = Images(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8), torch.arange(n) % 10)
    return Loaded(split, split.subset(torch.arange(16)), tuple(f"class {i}" for i in range(10)))


def engine_speed(config: ResolvedConfig, folder: Path) -> tuple[float, float]:
    """Return the engine's images/s after its first window, and the seconds of that window."""
    train(config, exp_dir=folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return median([line["train/images_per_sec"] for line in lines if "train/images_per_sec" in line][1:]), lines[0]["elapsed"]


def beside(ours: ResolvedConfig, other: ResolvedConfig, folder: Path) -> list[str]:
    """Compare the engine under two configs."""
    (speed, start), (other_speed, other_start) = engine_speed(ours, folder / "1"), engine_speed(other, folder / "2")
    return compared(speed, other_speed, f"images/s; the first updates took {start:.1f} s and {other_start:.1f} s")


def beside_bare(make_config: Callable[..., ResolvedConfig], card: str, folder: Path) -> list[str]:
    """Compare the engine with a loop on one batch, which does the same computation and nothing else."""
    config = make_config()
    ours, macs = engine_speed(config, folder / "1")[0], json.loads((folder / "1" / "results.json").read_text())["macs"]
    train(make_config(**{"train.profile": 5, "train.n_steps": 20}), exp_dir=folder / "2")  # separately: a profile slows its run
    device, size, n = "cpu" if card == "CPU" else "cuda", config.data.img_size or 224, config.train.print_freq or 1
    model: Any = build_model(config, described_data(config, list("0123456789"))).to(memory_format=torch.channels_last)
    model = model.to(device).train()
    network = torch.compile(model, dynamic=False) if config.train.compile else model
    images = torch.randn(config.train.batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(len(images), device=device) % 10
    optimizer, seconds = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=0.0005), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(n):
            with torch.autocast(device, torch.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    tflops = 6 * macs * ours / 1e12  # two per MAC, for the forward and twice for the backward pass
    share = f" ({tflops / peak(card):.0%} of the peak)" if peak(card) else ""
    waits = waits_in(folder / "2" / "profile" / "trace-rank0.json")
    details = f"images/s, the other a bare loop; {tflops:,.3g} TFLOP/s{share}; {waits}"
    return compared(ours, n * len(images) / median(seconds[1:]), details)


def compared(ours: float, other: float, details: str) -> list[str]:
    shown = [f"{speed:,.0f}" if speed >= 1000 else f"{speed:.4g}" for speed in (ours, other)]
    return [*shown, f"{ours / other:.2f}", details]


def peak(card: str) -> int:
    return next((tflops for name, tflops in PEAKS.items() if name in card), 0)


def waits_in(trace: Path) -> str:
    """Count what waits for the device in the updates that the engine's profile has recorded, long before the first log line."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if "dur" in event]
    steps = [e for e in events if e["name"].startswith("ProfilerStep") and e["cat"] == "user_annotation"]
    first, last = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    names = [e["name"] for e in events if e["name"].startswith(WAITS) and first <= e["ts"] <= last]
    return f"{len(names)} waits in {len(steps)} updates: {', '.join(sorted(set(names)))}".removesuffix(": ")


def from_files(config: Callable[..., ResolvedConfig], folder: Path) -> list[str]:
    """Train a model that is faster than the files can be read, on random crops by all cores and on images in memory."""
    for i, part in enumerate([*["train/a", "train/b"] * 256, "val/a", "val/b"]):
        (folder / part).mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(i).integers(0, 256, (94, 125, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375)).save(folder / part / f"{i}.jpg", quality=88)
    return beside(config(**{"data.name": "imagefolder", "data.dataroot": str(folder)}), config(), folder / "runs")


if __name__ == "__main__":
    sys.exit(run_tool(main))

"""The fault campaign. `python -m tests.faults` runs all of it and prints a table of the results."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.run.checkpoint import InvalidCheckpoint, read_checkpoint
from engine.run.folder import committed_checkpoints
from tests.faults.children import AtStep, Ended, Fault, KillAfter, KillAtOperation, KillInsideWrite, train
from tests.faults.rows import Row
from tests.on_disk import write_coco, write_image_folder, write_pairs
from tests.running import metrics, run_main, untimed

SMALL = ("--train.num_threads", 1, "--train.timeout", 60)
DIGITS_RUN = (*SMALL, "--train.n_steps", 24, "--train.batch_size", 64, "--train.print_freq", 4, "--train.eval_freq", 8)
DIGITS_RUN += ("--train.save_freq", 6, "--train.keep_last", 2, "--model.pdrop", 0.3)

FILES_RUN = (*SMALL, "--data.name", "imagefolder", "--data.img_size", 28, "--train.n_steps", 18, "--train.batch_size", 4)
FILES_RUN += ("--train.print_freq", 3, "--train.eval_freq", 6, "--train.save_freq", 6, "--train.optim.lr", 0.01)
FEATURES: dict[str, Sequence[object]] = {
    "augmentation": ("--augment.auto", "trivialaugment", "--augment.erasing", 0.5, "--augment.color_jitter", 0.2),
    "dropout": ("--model.pdrop", 0.5),
    "accumulation": ("--train.micro_batch_size", 1, "--model.pdrop", 0.1),
    "bf16": ("--train.precision", "bf16"),
    "mixing": ("--augment.mixup", 0.8, "--augment.cutmix", 1.0, "--train.label_smoothing", 0.1),
    "progressive resizing": ("--augment.resize_from", 20, "--augment.resize_step", 4, "--model.name", "resnet18"),
    "EMA and clipping": ("--train.ema", 0.99, "--train.clip_grad_norm", 1.0, "--model.pdrop", 0.1),
    "SAM": (
        *("--train.sam", 0.05, "--train.precision", "bf16", "--train.clip_grad_norm", 1.0, "--train.ema", 0.9),
        *("--train.micro_batch_size", 1, "--model.pdrop", 0.1),
    ),
    "distillation": ("--distill.teacher", "TEACHER", "--augment.mixup", 0.8, "--model.pdrop", 0.1, "--train.sam", 0.1),
    "AdamW with parameter groups": (
        *("--train.optim.type", "AdamW", "--train.optim.layer_decay", 0.7, "--train.optim.decay_norm_and_bias", "false"),
        *("--train.sched.type", "OneCycleLR"),
    ),
    "many together": (
        *("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--model.first_block", "cifar10"),
        *("--train.freeze", "[stem]", "--train.precision", "bf16", "--train.sched.eta_min", 0.001),
        *("--train.micro_batch_size", 1, "--train.ema", 0.9, "--train.clip_grad_norm", 1.0, "--train.label_smoothing", 0.1),
        *("--augment.auto", "augmix", "--augment.mixup", 0.8, "--augment.cutmix", 1.0, "--augment.mix_epochs", 2),
        *("--augment.resize_from", 20, "--augment.resize_step", 4, "--augment.repeats", 2, "--train.nonfinite", "skip"),
        *("--train.optim.type", "NAdamW", "--train.optim.head_lr", 0.02, "--train.optim.decay_norm_and_bias", "false"),
        *("--train.sched.type", "LinearLR", "--train.sched.warmup_steps", 3, "--train.sched.cooldown_steps", 3),
        *("--eval.tta", "flip", "--train.channels_last", "true", "--train.loss", "bce"),
    ),
    "segmentation": (
        *("--task", "segmentation", "--data.name", "pairs", "--data.dataroot", "PAIRS", "--train.batch_size", 2),
        *("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--segmentation.aux_head", "true"),
        *("--segmentation.dice_weight", 0.5, "--augment.color_jitter", 0.2, "--train.optim.lr", 0.001),
    ),
    "detection": (
        *("--task", "detection", "--data.name", "cocojson", "--data.dataroot", "OBJECTS"),
        *("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--detection.head", "fasterrcnn"),
        *("--detection.width", 64, "--augment.color_jitter", 0.2, "--train.optim.lr", 0.001),
    ),
}


ALIKE = "resumed, it ends bit for bit alike"


# Kills


def kill_points(folder: Path, faults: Iterable[Fault], name: str = "killed") -> Row:
    """End a run by each fault. Its checkpoints must load, and the resumed run must equal an uninterrupted one."""
    reference = folder / "reference"
    assert train(reference, *DIGITS_RUN).codes == [0]
    checkpoints = {path.name: read_checkpoint(path) for path in committed_checkpoints(_run_with_all_checkpoints(folder))}
    row = Row(name, ALIKE)
    for i, fault in enumerate(faults):
        run = folder / f"killed-{i}"
        ended = train(run, *DIGITS_RUN, fault=fault)
        row.tried += 1
        row.wrong += [f"{fault}: {problem}" for problem in _problems_after_a_kill(run, ended, reference, checkpoints)]
        shutil.rmtree(run, ignore_errors=True)
    return row


def _run_with_all_checkpoints(folder: Path) -> Path:
    """Repeat the reference run and keep all checkpoints, to compare each with the one of a killed run."""
    run = folder / "kept"
    assert train(run, *DIGITS_RUN, "--train.keep_last", 100).codes == [0]
    return run


def _problems_after_a_kill(run: Path, ended: Ended, reference: Path, expected: dict[str, Any]) -> Iterator[str]:
    if ended.codes[0] >= 0 and ended.codes != [0]:  # a timer may fire after the end of the run
        yield f"exit code {ended.codes}: {ended.output}"
    newest = 0
    for path in committed_checkpoints(run):
        try:
            checkpoint = read_checkpoint(path)
        except InvalidCheckpoint as error:
            yield f"unloadable: {error}"
            continue
        newest = max(newest, checkpoint.step)
        weights = checkpoint.weights
        if path.name in expected and any(not expected[path.name].weights[name].equal(weights[name]) for name in weights):
            yield f"mixed: {path} holds weights of another step"
        if checkpoint.train_state["step"] != checkpoint.step:
            yield f"mixed: {path} holds the state of step {checkpoint.train_state['step']}"
    resumed = train(run, *(("-r", "latest") if newest else (*DIGITS_RUN, "-r", "auto")))
    if resumed.codes != [0]:
        yield f"the resumed run ended with {resumed.codes}: {resumed.output}"
        return
    if newest and not any(words in resumed.output for words in (f"resuming at step {newest}:", "nothing left to do")):
        yield f"committed step {newest} was lost: {resumed.output}"
    yield from differences(run, reference)
    if leftovers := [*(run / "ckpt").glob(".*"), *run.glob(".*.*")]:
        yield f"left behind: {leftovers}"


def differences(run: Path, reference: Path) -> Iterator[str]:
    """Yield the differences from an uninterrupted run: final weights (bit for bit), lines of metrics.jsonl, TensorBoard steps."""
    if digest(run) != digest(reference):
        yield "other final weights"
    if untimed(metrics(run)) != untimed(metrics(reference)):
        yield f"other lines: {[line['step'] for line in metrics(run)]}"
    steps = tensorboard_steps(run)
    if steps != [line["step"] for line in metrics(reference) if "train/lr" in line]:
        yield f"TensorBoard zigzags: {steps}"


def digest(run: Path) -> str:
    return hashlib.sha256((run / "ckpt" / "latest" / "model.safetensors").read_bytes()).hexdigest()


def tensorboard_steps(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train/lr")]


def operations(folder: Path) -> list[str]:
    """Return each operation on a file in a whole run: its event and its path."""
    log = folder / "operations"
    assert train(folder / "counted", *DIGITS_RUN, fault=KillAtOperation(count_into=str(log))).codes == [0]
    return log.read_text().splitlines()


def every_operation(folder: Path) -> list[Fault]:
    """Return a kill before each operation on a file in a whole run."""
    return [KillAtOperation(n) for n in range(len(operations(folder)))]


def random_moments(n: int, seconds: float = 0.5) -> list[Fault]:
    """Return kills at random moments while a run trains, evaluates, saves and plots."""
    generator = random.Random(0)
    return [KillAfter(generator.uniform(0.05, seconds)) for _ in range(n)]


def inside_writes(n: int) -> list[Fault]:
    """Return kills at random positions in the long files: weights, training state, TensorBoard events, figures."""
    generator = random.Random(0)
    return [KillInsideWrite(generator.randrange(1_000, 400_000)) for _ in range(n)]


# The matrix of resumed runs


def resume_matrix(folder: Path, features: Sequence[str], workers: Sequence[int] = (0, 2), ranks: Sequence[int] = (1, 2)) -> Row:
    """Interrupt runs twice in one epoch. Weights, metrics and TensorBoard must equal those of an uninterrupted run."""
    data = write_image_folder(folder / "data", n_classes=4, n_train=6)
    row = Row("interrupted twice in an epoch", ALIKE)
    teacher = folder / "teacher"
    if any("TEACHER" in FEATURES[feature] for feature in features):
        assert train(teacher, *FILES_RUN, "--data.dataroot", data).codes == [0]
    pairs = folder / "pairs"
    for part, n in (("train", 16), ("val", 4)):
        write_pairs(pairs / part, n)
    folders = {"TEACHER": teacher, "PAIRS": pairs, "OBJECTS": write_coco(folder / "objects", n_train=16)}
    for feature, n_workers, n_ranks in itertools.product(features, workers, ranks):
        cell = f"{feature}, {n_workers} workers, {n_ranks} ranks"
        argv = (*FILES_RUN, "--data.dataroot", data, "--dataloader.num_workers", n_workers)
        argv += tuple(folders.get(word, word) for word in FEATURES[feature])
        reference, interrupted = folder / f"{cell} whole", folder / f"{cell} cut"
        row.tried += 1
        steps = [
            (reference, argv, None, 0),
            (interrupted, argv, AtStep(8, "SIGTERM", rank=n_ranks - 1), 143),
            (interrupted, ("-r", "latest"), AtStep(10, "SIGTERM", rank=0), 143),
            (interrupted, ("-r", "latest"), None, 0),
        ]
        for run, words, fault, code in steps:
            ended = train(run, *words, fault=fault, ranks=n_ranks)
            if ended.codes != [code] * n_ranks:
                row.wrong.append(f"{cell}: {fault} ended with {ended.codes}: {ended.output}")
                break
        else:
            row.wrong += [f"{cell}: {problem}" for problem in differences(interrupted, reference)]
            if json.loads((interrupted / "environment.json").read_text())["world_size"] != n_ranks:
                row.wrong.append(f"{cell}: not on {n_ranks} ranks")
    return row


# Damaged and hostile files


def flipped_bytes(folder: Path, n: int) -> Row:
    """Flip single bits of a checkpoint. Reading it must fail with the name of the damaged file."""
    run, generator = folder / "flipped", random.Random(0)
    assert train(run, *DIGITS_RUN).codes == [0]
    row = Row("a byte of a checkpoint flipped", "found, and its file named", n)
    latest = (run / "ckpt" / "latest").resolve()
    files = sorted(latest.iterdir())
    for _ in range(n):
        file = generator.choice(files)
        content = bytearray(file.read_bytes())
        position = generator.randrange(len(content))
        content[position] ^= 1 << generator.randrange(8)
        original = file.read_bytes()
        file.write_bytes(content)
        try:
            read_checkpoint(latest)
            row.wrong.append(f"byte {position} of {file.name} was not noticed")
        except InvalidCheckpoint as error:
            if file.name not in str(error):
                row.wrong.append(f"byte {position} of {file.name} was blamed on another file: {error}")
        file.write_bytes(original)
    return row


class Payload:
    """Create a folder when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def pickles(folder: Path) -> Row:
    """Put code into a checkpoint with a valid manifest, into pretrained weights and into dataset files. It must not run."""
    import torch

    mark, run = folder / "executed", folder / "attacked"
    row = Row("code in a pickle", "refused, and not run")
    assert train(run, *DIGITS_RUN).codes == [0]
    latest = (run / "ckpt" / "latest").resolve()
    torch.save({"step": 24, "optimizer": Payload(mark)}, latest / "train_state.pt")
    sign(latest)
    torch.save({"conv1.weight": Payload(mark)}, folder / "weights.pth")
    (folder / "weights.pt").write_bytes(pickle.dumps(Payload(mark)))
    cifar = folder / "cifar" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    for name in ("data_batch_1", "batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(2, 6))):
        (cifar / name).write_bytes(pickle.dumps({b"data": Payload(mark)}))
    attacks = {
        "a checkpoint": ("-r", latest),
        "weights with tensors": ("-e", folder / "a", *DIGITS_RUN, "--model.pretrained", folder / "weights.pth"),
        "a bare pickle": ("-e", folder / "b", *DIGITS_RUN, "--model.pretrained", folder / "weights.pt"),
        "CIFAR's files": (
            *("-e", folder / "c", *SMALL, "--data.name", "CIFAR-10", "--data.dataroot", folder / "cifar"),
            *("--data.verify", "false", "--train.n_steps", 2),
        ),
    }
    for name, argv in attacks.items():
        row.tried += 1
        with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
            code = run_main(*argv)
        if code not in (1, 2) or not any(word in stderr.getvalue() for word in ("refused", "can't be read")):
            row.wrong.append(f"{name}: exit code {code}, {stderr.getvalue()}")
        if mark.exists():
            row.wrong.append(f"{name}: the code ran")
            mark.rmdir()
    return row


def sign(checkpoint: Path) -> None:
    """Write a manifest with the right hashes, as an attacker would."""
    from engine.run.checkpoint import _manifest_digest

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"] = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in manifest["files"]}
    manifest["digest"] = _manifest_digest(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


# The whole campaign


PARTS: dict[str, Callable[[Path], Row]] = {
    "operations": lambda folder: kill_points(folder, every_operation(folder), "killed before each operation on a file"),
    "moments": lambda folder: kill_points(folder, random_moments(40), "killed at a random moment"),
    "writes": lambda folder: kill_points(folder, inside_writes(20), "killed inside a write"),
    "matrix": lambda folder: resume_matrix(folder, list(FEATURES)),
    "flips": lambda folder: flipped_bytes(folder, 200),
    "pickles": pickles,
}

"""Run folders and checkpoints that a stranger made or a fault damaged: errors are one line, and nothing outside changes."""

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from engine.config.errors import RunError
from engine.run.checkpoint import Checkpoints, InvalidCheckpoint, _manifest_digest, read_checkpoint
from engine.run.folder import FILES, FOLDERS
from engine.state import COUNTERS, TrainState
from tests.faults.campaign import SMALL, sign
from tests.faults.fuzz import fuzz
from tests.faults.rows import Row
from tests.running import run_main

RUN = (*SMALL, "--train.n_steps", 4, "--train.batch_size", 64, "--train.save_freq", 2, "--train.eval_freq", 4)
CHECKPOINT = ("model.safetensors", "train_state.pt", "manifest.json")


@dataclass(frozen=True)
class Case:
    """Damages a run folder; `outside` is a folder next to it with a file `mine`."""

    damage: Callable[[Path, Path], object]
    is_refused: bool = True
    words: str = ""  # in the output
    resume: tuple[object, ...] = ("-r", "latest")


def newest(run: Path) -> Path:
    return run / "ckpt" / "step-000004"


def _link(name: str, target: str = "mine") -> Case:
    """Replace a file or folder of the run by a symlink."""

    def damage(run: Path, outside: Path) -> None:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.unlink(missing_ok=True)
        path.symlink_to(outside / target)

    return Case(damage, words="symlink")


def _pipe(name: str) -> Case:
    def damage(run: Path, outside: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return Case(damage, words="regular file" if "step" in name else "is not a file")


def _write(name: str, content: bytes, words: str = "", *, is_refused: bool = True) -> Case:
    return Case(lambda run, outside: (run / name).write_bytes(content), is_refused, words)


def _manifest(words: str = "not the manifest of this step", **values: Any) -> Case:
    """Change values of the newest manifest, and sign it."""

    def damage(run: Path, outside: Path) -> None:
        path = newest(run) / "manifest.json"
        manifest = {**json.loads(path.read_text()), **values}
        del manifest["digest"]
        manifest["files"] = values.get("files", manifest["files"])
        if isinstance(values.get("add"), str):
            manifest["files"][manifest.pop("add").replace("OUTSIDE", str(outside))] = "0" * 64
        manifest["digest"] = _manifest_digest(manifest)
        path.write_text(json.dumps(manifest))

    return Case(damage, is_refused="format" in values, words=words)


def _train_state(change: Callable[[dict[str, Any]], Any], words: str, *, is_refused: bool = False) -> Case:
    """Change the newest training state, and sign it."""

    def damage(run: Path, outside: Path) -> None:
        path = newest(run) / "train_state.pt"
        state = torch.load(path, weights_only=True)
        torch.save(change(state), path)
        sign(newest(run))

    return Case(damage, is_refused, words)


def _repacked(change: Callable[[bytes], bytes], words: str, compression: int = zipfile.ZIP_STORED) -> Case:
    """Change the pickle inside of the newest training state, and sign it."""

    def damage(run: Path, outside: Path) -> None:
        path = newest(run) / "train_state.pt"
        repack(path, change, compression)
        sign(newest(run))

    return Case(damage, is_refused=False, words=words)


def repack(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a torch.save file again, with other content in its pickle and the right check sums."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def _doubled(state: dict[str, Any]) -> dict[str, Any]:
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested, nested]
    return {**state, "optimizer": {**state["optimizer"], "extra": nested}}


def _deep(content: bytes) -> bytes:
    """A dict whose key is a tuple in a tuple in a tuple..., which overflows the C stack when it is hashed."""
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.TUPLE1 * 1_000_000 + b"Ns."


def _without_manifests(run: Path, outside: Path) -> None:
    for path in run.glob("ckpt/step-*/manifest.json"):
        path.unlink()


def _copied(run: Path, outside: Path) -> None:
    """Copy a run folder as cp -rL does."""
    shutil.copytree(run, run.with_name("copy"))
    shutil.rmtree(run)
    run.with_name("copy").rename(run)


def _foreign_ckpt(run: Path, outside: Path) -> None:
    """Move the checkpoints to another disk, next to hidden files."""
    for path in (run / "ckpt").iterdir():
        path.rename(outside / path.name)
    (run / "ckpt").rmdir()
    (run / "ckpt").symlink_to(outside)


def _cases() -> Iterator[tuple[str, Case]]:
    for name in (*FILES, ".lock", *FOLDERS, "wandb", *(f"ckpt/step-000004/{name}" for name in CHECKPOINT)):
        yield f"{name} is a symlink", _link(name)
    for name in ("figures/curves.png", "tensorboard/events", "profile/trace-rank0.json", "ckpt/step-000004", "ckpt/set-aside"):
        yield f"{name} is a symlink", _link(name)
    yield "ckpt is a link to nothing", replace(_link("ckpt", "missing"), words="disk is not mounted")
    yield "ckpt is a file", Case(lambda run, outside: (shutil.rmtree(run / "ckpt"), (run / "ckpt").write_text("")))
    yield "latest leads outside", replace(_link("ckpt/latest", "."), is_refused=False, words="step 4")
    yield "best leads outside", replace(_link("ckpt/best", "."), words="no best", resume=("-r", "best"))
    for name in (".config.yaml", ".environment.json", f".config.yaml.{os.getpid()}", f"ckpt/.latest.{os.getpid()}"):
        yield f"{name} is a symlink", replace(_link(name), is_refused=False, words="step 4")
    yield "ckpt is on another disk", Case(_foreign_ckpt, is_refused=False, words="step 4")
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "output.log", ".lock"):
        yield f"{name} is a pipe", _pipe(name)
    for name in CHECKPOINT[:2]:
        yield f"{name} is a pipe", replace(_pipe(f"ckpt/step-000004/{name}"), words="is not a file")
    for name in ("../../../outside/mine", "OUTSIDE/mine", "other.bin"):
        yield f"the manifest names {name}", _manifest(add=name)
    for values in ({"files": {}}, {"files": ["model.safetensors"]}, {"files": {"model.safetensors": 1, "train_state.pt": 2}}):
        yield f"the manifest has {values}", _manifest(**values)
    for values in ({"step": "4"}, {"step": -1}, {"step": 7}, {"step": 4.0}, {"config": [1]}, {"format": "new"}):
        yield f"the manifest has {values}", replace(_manifest(**values), is_refused=False)
    yield "the manifest has a newer format", _manifest("has format 99: a newer version", format=99)
    manifest = "ckpt/step-000004/manifest.json"
    yield "the manifest is enormous", _write(manifest, b" " * 2_000_000, "more than", is_refused=False)
    yield "the manifest is nested", _write(manifest, b"[" * 100_000, "is not JSON", is_refused=False)
    yield "the manifest is a list", _write(manifest, b"[]", "wrong digest", is_refused=False)
    yield "the training state is a list", _train_state(lambda state: [state], "it is not a mapping")
    yield "the training state is compressed", _repacked(lambda content: content, "it is compressed", zipfile.ZIP_DEFLATED)
    yield "the training state has lists in lists", _train_state(_doubled, "nested too deep, or too many")
    yield "the training state has deep keys", _repacked(_deep, "keys that are not plain values")
    expanded = torch.zeros(1).expand(1 << 40)
    yield "a tensor is expanded", _train_state(lambda state: state | {"windows": {"loss": expanded}}, "larger than its storage")
    yield (
        "a storage is larger than the file",
        _repacked(lambda content: content.replace(pickle.BININT1 + b"\6t", pickle.BININT + b"\0\0\0\x7ft", 1), "a storage has"),
    )
    for name in COUNTERS:
        yield f"{name} has a wrong type", _train_state(lambda state, name=name: state | {name: [1]}, "fit", is_refused=True)
    group = {"lr": "fast", "momentum": None, "params": [0]}
    for change in (
        {"optimizer": {"state": {}, "param_groups": [group]}},
        {"optimizer": 3},
        {"windows": {"loss": 1.0}},
        {"scaler": 3},
    ):
        words, is_refused = ("step 4", False) if "scaler" in change else ("fit", True)
        yield f"the training state has {change}", _train_state(lambda s, change=change: s | change, words, is_refused=is_refused)
    for name in ("environment.json", "trackers.json"):
        for content in (b"", bytes(200), b"[]", b"{"):
            yield f"{name} is {content[:2]!r}", _write(name, content, f"{name}: it is", is_refused=False)
    for content in (b"", bytes(200), b"- 1\n", b"seed: [\n"):
        yield f"config.yaml is {content[:4]!r}", _write("config.yaml", content, "config.yaml")
    yield "metrics.jsonl is NUL", _write("metrics.jsonl", bytes(5000), "not as it was", is_refused=False)
    yield "no manifests", Case(_without_manifests, words="copy the manifests back")
    yield "no manifests, with auto", Case(_without_manifests, words="copy the manifests back", resume=("-r", "auto"))
    missing = Case(
        lambda run, outside: (newest(run) / "manifest.json").unlink(), is_refused=False, words="is set aside, because it has no"
    )
    yield "one manifest is missing", missing
    yield "links became folders", Case(_copied, is_refused=False, words="step 4")
    yield "links became folders, with best", Case(_copied, is_refused=False, words="step 4", resume=("-r", "best"))


CASES = dict(_cases())


def folders(folder: Path, names: Callable[[int], bool] = lambda i: True) -> Row:
    """Resume each hostile run folder. Nothing outside may change, and the program must end with one line or continue the run."""
    row = Row("hostile or damaged run folders", "refused in one line or resumed; nothing else changes")
    original = folder / "original"
    assert _run("-e", original, *RUN)[0] == 0
    for i, (name, case) in enumerate(CASES.items()):
        if not names(i):
            continue
        row.tried += 1
        run, outside = folder / f"case-{i}" / "run", folder / f"case-{i}" / "outside"
        shutil.copytree(original, run, symlinks=True)
        outside.mkdir()
        for file in ("mine", ".hidden", ".gitignore", ".latest-notes"):
            (outside / file).write_text(f"content of {file}")
        case.damage(run, outside)
        with patch("engine.train._draw"):  # figures take longest
            row.wrong += [f"{name}: {problem}" for problem in _problems(case, run, outside)]
        shutil.rmtree(folder / f"case-{i}")
    return row


def _problems(case: Case, run: Path, outside: Path) -> Iterator[str]:
    resume = ("-e", run, *case.resume, *(RUN if "auto" in case.resume else ("--train.n_steps", 6)))
    code, output, errors = _run(*resume)
    if (code != 0) != case.is_refused or code not in (0, 1, 2):
        yield f"exit code {code}: {output[-500:]} {errors}"
    if case.words not in output + errors:
        yield f"no {case.words!r} in {output} {errors}"
    if code and len(errors.strip().splitlines()) != 1:
        yield f"more than one line: {errors}"
    mine = {path.name: path.read_text() for path in outside.iterdir() if path.is_file()}
    expected = {name: f"content of {name}" for name in ("mine", ".hidden", ".gitignore", ".latest-notes")}
    if not expected.items() <= mine.items():
        yield f"a file outside was changed: {mine}"
    if code == 0 and read_checkpoint((run / "ckpt" / "latest").resolve()).step != 6:
        yield "the resumed run did not save its last step"


def _run(*argv: object) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = run_main(*argv)
        except Exception as error:
            code = 3
            print(f"traceback: {error!r}", file=errors)
    return code, output.getvalue(), errors.getvalue()


def mutants(folder: Path, n: int = 1000) -> Row:
    """Read and restore mutants of a checkpoint whose manifests have the right hashes."""
    state = _state()
    Checkpoints(folder, keep_last=1, config={"seed": 1}).save(1, *_content(state), best_step=1)
    step = folder / "ckpt" / "step-000001"
    manifest, tensors, states = step / "manifest.json", step / "model.safetensors", step / "train_state.pt"
    pickled = folder / "data.pkl"
    with zipfile.ZipFile(states) as archive:
        pickled.write_bytes(archive.read("archive/data.pkl"))
    whole = states.read_bytes()

    def open_it() -> None:
        _state().restore(read_checkpoint(step), 0, 1)

    def signed() -> None:
        sign(step)
        open_it()

    def repacked() -> None:
        states.write_bytes(whole)
        repack(states, lambda content: pickled.read_bytes())
        signed()

    def with_digest() -> None:
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(manifest.read_bytes())
            if isinstance(values, dict):
                values.pop("digest", None)
                manifest.write_text(json.dumps({**values, "digest": _manifest_digest(values)}))
        open_it()

    row = Row("checkpoints that were changed and signed again", "opened, or refused in one line")
    plan = ((with_digest, (manifest,), n // 5), (signed, (states, tensors), 2 * n // 5), (repacked, (pickled,), n - 3 * n // 5))
    for open_mutant, paths, n_mutants in plan:
        files = {path: path.read_bytes() for path in paths}
        part = fuzz(paths[0].name, files, open_mutant, (InvalidCheckpoint, RunError), n_mutants)
        row.tried, row.wrong = row.tried + part.tried, row.wrong + part.wrong
        states.write_bytes(whole)
        sign(step)
    return row


def _state() -> TrainState:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return TrainState(model, optimizer, step=1, window={"loss": torch.tensor(1.0)})


def _content(state: TrainState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    counters = {name: getattr(state, name) for name in COUNTERS}
    windows = {name: value.unsqueeze(0) for name, value in state.window.items()}
    return state.model.state_dict(), {"optimizer": state.optimizer.state_dict(), "scaler": None, "windows": windows, **counters}


PARTS: dict[str, Callable[[Path], Row]] = {"hostile folders": folders, "mutants of checkpoints": mutants}

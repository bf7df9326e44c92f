"""The scores of the samples in a run folder: what is written, kept and removed."""

import json
import shutil
from contextlib import suppress

import numpy as np
import pytest

from engine.config.command_line import run_tool
from engine.run.samples import SampleScores, prune_samples, read_samples, write_samples
from models.loading.files import MalformedFile
from tests.faults.children import AtStep, train
from tests.running import results, run_main
from tools.evaluate import main as evaluate

LENGTH = ("--train.n_steps", 60, "--train.eval_freq", 10, "--train.save_freq", 20, "--train.keep_last", 2)
LENGTH += ("--train.optim.lr", 0.1, "--data.valid_ratio", 0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert run_main("-e", path, *LENGTH) == 0
    return path


def files(run):
    return {path.name: read_samples(path) for path in (run / "samples").iterdir()}


def scores_of(n, dtype=bool):
    return np.random.default_rng(n).random(n).round().astype(dtype)


@pytest.mark.parametrize("scores", [scores_of(1), scores_of(13), np.array([0, 0.25, np.nan, 1])], ids=["one", "bits", "numbers"])
def test_what_is_written_is_read(scores, tmp_path):
    written = SampleScores("test", 7, "image IoU", scores, {"images": len(scores), "pixels": "ab"})
    read = read_samples(write_samples(tmp_path, written))
    np.testing.assert_array_equal(read.scores, scores)
    assert (read.split, read.step, read.metric, read.data) == (written.split, 7, "image IoU", written.data)


def test_ten_thousand_samples_take_two_kilobytes(tmp_path):
    path = write_samples(tmp_path, SampleScores("test", 7, "acc@1", scores_of(10_000), {"images": 10_000}))
    assert path.stat().st_size < 2_000


def test_a_damaged_file_raises_no_other_error(tmp_path):
    path = write_samples(tmp_path, SampleScores("test", 7, "acc@1", scores_of(500), {}))
    content, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(damaged[: random.integers(len(content)) if random.random() < 0.3 else None])
        with suppress(MalformedFile):
            assert read_samples(path).scores.shape == (500,)  # a byte that nothing depends on


@pytest.mark.parametrize(
    ("about", "scores"),
    [
        ({"n": 3}, np.array([0.5, 2, 0], np.float16)),
        ({"n": 4}, np.array([0.5, 1, 0], np.float16)),
        ({"n": 2, "step": "1"}, np.array([0.5, 1], np.float16)),
        ({"n": 2}, np.array([{}, "code"])),
        ({"n": 2, "format": 2}, np.array([0.5, 1], np.float16)),
        ([], np.array([0.5])),
    ],
)
def test_other_content_is_refused(about, scores, tmp_path):
    values = {"format": 1, "split": "test", "step": 1, "metric": "acc@1", "data": {}, **about} if about else about
    np.savez(tmp_path / "test-1.npz", about=np.array(json.dumps(values).encode()), scores=scores)
    with pytest.raises(MalformedFile):
        read_samples(tmp_path / "test-1.npz")


def test_a_run_keeps_the_scores_of_its_best_and_last_checkpoint_and_of_the_test(run):
    result, found = results(run), files(run)
    best = result["best"]["step"]
    kept = {best, *(int(path.name.removeprefix("step-")) for path in (run / "ckpt").glob("step-*"))}
    assert found.keys() == {f"test-{best}.npz", *(f"valid-{step}.npz" for step in kept)}
    assert 60 in kept
    assert len(kept) < 6
    data = json.loads((run / "environment.json").read_text())["data"]
    for name, reached in ((f"valid-{best}.npz", "best"), ("valid-60.npz", "last"), (f"test-{best}.npz", "test")):
        split, scores = found[name].split, found[name].scores
        assert scores.mean() == pytest.approx(result[reached][f"{split}/acc@1"], abs=1e-12)
        assert (found[name].metric, found[name].data) == ("acc@1", data[split])
        assert len(scores) == data[split]["images"]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_files(run, tmp_path):
    train(tmp_path / "run", *LENGTH, fault=AtStep(45, "SIGKILL"))
    assert train(tmp_path / "run", "-r", "latest").codes == [0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "samples").iterdir()} == {
        path.name: path.read_bytes() for path in (run / "samples").iterdir()
    }


def test_files_of_steps_without_a_checkpoint_are_removed(run, tmp_path):
    shutil.copytree(run, copied := tmp_path / "run", symlinks=True)
    for step in (10, 999):
        write_samples(copied, SampleScores("valid", step, "acc@1", scores_of(5), {}))
    before = set(files(run))
    prune_samples(copied, keep=10)
    assert set(files(copied)) == before | {"valid-10.npz"}
    prune_samples(copied)
    assert set(files(copied)) == before


def test_evaluate_adds_the_files_of_an_older_run(run, tmp_path):
    shutil.copytree(run, older := tmp_path / "run", symlinks=True)
    shutil.rmtree(older / "samples")
    for argv in (("--eval.tta", "flip"), ("--ema",)):  # not the scores of the run
        run_tool(lambda argv=argv: evaluate([str(older), *argv]))
        assert not (older / "samples").exists()
    assert run_tool(lambda: evaluate([str(older), "--split", "test"])) == 0
    assert run_tool(lambda: evaluate([str(older), "--eval.batch_size", "50"])) == 0
    assert {path.name: path.read_bytes() for path in (older / "samples").iterdir()}.items() <= {
        path.name: path.read_bytes() for path in (run / "samples").iterdir()
    }.items()
    assert len(files(older)) == 2


def test_evaluate_replaces_a_damaged_file_and_no_other(run, tmp_path):
    shutil.copytree(run, copied := tmp_path / "run", symlinks=True)
    best = results(run)["best"]["step"]
    path, content = copied / "samples" / f"test-{best}.npz", (run / "samples" / f"test-{best}.npz").read_bytes()
    path.write_bytes(content[:100])
    assert run_tool(lambda: evaluate([str(copied), "--split", "test"])) == 0
    assert path.read_bytes() == content
    other = write_samples(copied, SampleScores("test", best, "acc@1", scores_of(5), {})).read_bytes()
    assert run_tool(lambda: evaluate([str(copied), "--split", "test"])) == 0
    assert path.read_bytes() == other

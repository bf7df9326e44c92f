import json

import pytest

from engine.config.command_line import run_tool
from tests.faults.children import run_script
from tests.running import ROOT, results, run_main
from tools.evaluate import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    argv = ("--train.n_steps", 60, "--train.eval_freq", 20, "--train.save_freq", 20, "--data.valid_ratio", 0.1)
    assert run_main("-e", path, *argv) == 0
    return path


def evaluate(capsys, *argv):
    assert run_tool(lambda: main([str(word) for word in (*argv, "--json")])) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_folder_has_the_metrics_that_the_training_reported_for_the_best_checkpoint(run, capsys):
    evaluated, best = evaluate(capsys, run), results(run)["best"]
    scalars = ("loss", "acc@1", "acc@5", "balanced_acc", "ece", "count")
    assert {f"valid/{name}": evaluated[name] for name in scalars} == {
        name: value for name, value in best.items() if name != "step"
    }
    assert not {"per_class", "confusion"} & evaluated.keys()


def test_the_test_split_has_the_metrics_reported_at_the_end(run, capsys):
    evaluated = evaluate(capsys, run, "--split", "test")
    assert evaluated["acc@1"] == results(run)["test"]["test/acc@1"]
    assert evaluated["count"] == 360


def test_a_checkpoint_folder_is_evaluated_itself(run, capsys):
    evaluated = evaluate(capsys, run / "ckpt" / "latest")
    assert evaluated["step"] == 60
    assert evaluated["loss"] == results(run)["last"]["valid/loss"]


def test_the_training_split_is_evaluated_without_augmentation(run, capsys):
    assert evaluate(capsys, run, "--split", "train") == evaluate(capsys, run, "--split", "train")
    assert evaluate(capsys, run, "--split", "train")["count"] == 1437 - 144


def test_the_program_prints_a_line(run):
    finished = run_script("tools/evaluate.py", run)
    assert finished.returncode == 0, finished.stderr
    assert f"acc@1 {100 * results(run)['best']['valid/acc@1']:.2f} %" in finished.stdout


def test_a_path_without_a_run_is_a_one_line_error(tmp_path, capsys):
    assert run_tool(lambda: main([str(tmp_path)])) == 1
    assert "neither a run folder" in capsys.readouterr().err


def test_tables_of_classes_are_returned_on_request(run, capsys):
    evaluated = evaluate(capsys, run, "--split", "test", "--per_class", "--confusion")
    confusion = evaluated["confusion"]
    assert sum(map(sum, confusion)) == evaluated["count"]
    assert sum(confusion[i][i] for i in range(10)) / evaluated["count"] == evaluated["acc@1"]
    assert evaluated["per_class"] == {str(i): row[i] / sum(row) for i, row in enumerate(confusion)}
    assert sum(evaluated["per_class"].values()) / 10 == pytest.approx(evaluated["balanced_acc"], rel=1e-12)


def test_each_class_is_printed_on_its_own_line(run, capsys):
    assert run_tool(lambda: main([str(run), "--per_class"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-10:]] == [str(i) for i in range(10)]
    assert all(line.endswith(" %") for line in lines[-10:])


def test_the_batch_size_does_not_change_the_metrics(run, capsys):
    one, other = (evaluate(capsys, run, "--eval.batch_size", size, "--per_class", "--confusion") for size in (7, 64))
    for name in ("loss", "ece"):  # depend on logits, which are rounded differently for other batch sizes
        assert one.pop(name) == pytest.approx(other.pop(name), rel=1e-5)
    assert one == other


def test_mirrored_images_are_evaluated_too_on_request(run, capsys):
    plain, flipped = evaluate(capsys, run), evaluate(capsys, run, "--eval.tta", "flip")
    assert flipped["loss"] != plain["loss"]
    assert flipped["count"] == plain["count"]


def test_a_confusion_matrix_without_json_is_a_one_line_error(run, capsys):
    assert run_tool(lambda: main([str(run), "--confusion"])) == 2
    assert "--confusion needs --json" in capsys.readouterr().err


def test_a_model_name_with_the_weights_of_a_run_has_the_metrics_of_the_run(run, capsys):
    config = ("-c", ROOT / "configs" / "lenet_digits.yaml", "--data.valid_ratio", 0.1)
    by_name = evaluate(capsys, "lenet", *config, "--model.pretrained", run, "--per_class")
    of_run = evaluate(capsys, run, "--per_class")
    assert by_name.pop("weights") == str(run)
    assert by_name == {name: value for name, value in of_run.items() if name not in ("checkpoint", "step")}

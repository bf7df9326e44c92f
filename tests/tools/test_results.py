"""Rows are trained once, and the tables come from what they reached."""

import json
from dataclasses import replace

import pytest

from engine import load_config
from engine.config.command_line import run_tool
from engine.config.schema import flatten, to_dict
from tests.running import ROOT
from tools import document, results
from tools.results import Measured

ROWS = """
quick: {config: lenet_digits, args: --train.n_steps 3 --train.num_threads 1, seeds: [1, 2], aim: 0.99}
absent: {config: lenet_mnist, seeds: [1]}
"""
ONE = Measured(
    row="quick",
    seed=1,
    model="lenet",
    data="digits",
    data_note="",
    command="python main.py -c configs/lenet_digits.yaml --seed 1",
    config_digest="c",
    fingerprint={"train": {"images": 10}},
    machine="2 cores of a CPU",
    torch="2.14.1",
    commit="",
    date="2026-11-27",
    metric="acc@1",
    value=0.98,
    n_epochs=20,
    wall_time=6.5,
    params=61706,
    last={"acc@1": 0.98, "ece": 0.01},
    history=[[1, 1.0, 0.5], [2, 2.0, 0.98]],
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "results.yaml").write_text(ROWS)
    monkeypatch.setattr(results, "ROWS", tmp_path / "results.yaml")
    monkeypatch.setattr(results, "MEASURED", tmp_path / "measured")
    (tmp_path / "measured").mkdir()
    return tmp_path


def run(*argv):
    return run_tool(lambda: results.main([str(word) for word in argv]))


def keep(*measured):
    for one in measured:
        one.file.write_text(json.dumps(vars(one)))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_is_the_mean_and_deviation_of_its_seeds():
    keep(ONE, replace(ONE, seed=2, value=1.0, wall_time=7.5))
    _, _, line = results.table("classification").splitlines()
    assert cells(line)[:8] == ["lenet", "digits", "99.00 ± 1.41 % acc@1", "2", "7.0 s", "99 %, reached", "20", "0.010"]
    assert cells(line)[9] == "python main.py -c configs/lenet_digits.yaml"
    short = cells(results.table("classification", short=True).splitlines()[2])
    assert short == [*cells(line)[:2], "lenet_digits", *cells(line)[2:5]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("machine", "a GPU"),
        ("torch", "2.15"),
        ("config_digest", "d"),
        ("fingerprint", {"train": {"images": 9}}),
        ("data_note", "JPEGs"),
    ],
)
def test_seeds_from_elsewhere_have_a_row_of_their_own(key, value):
    keep(ONE, replace(ONE, seed=2, **{key: value}))
    assert [cells(line)[3] for line in results.table("classification").splitlines()[2:]] == ["1", "1"]


def test_a_missed_aim_is_shown():
    keep(ONE)
    assert "99 %, missed" in results.table("classification")


def test_an_ablation_is_compared_with_its_first_row(folder):
    options = ["", " --train.ema 0.9", " --train.sam 0.05"]
    names = ["plain", "ema", "sam"]
    lines = [
        f"{name}: {{config: lenet_digits, args: --train.n_epochs 3{option}, seeds: [1], table: ablation}}"
        for name, option in zip(names, options, strict=True)
    ]
    (folder / "results.yaml").write_text("\n".join(lines))
    plain, ema = replace(ONE, row="plain", value=0.9), replace(ONE, row="ema", value=0.9123, config_digest="d")
    keep(plain, ema, replace(ONE, row="sam", torch="2.15"))  # on another version, where the recipe wasn't measured
    found = [cells(line)[:3] for line in results.ablation().splitlines()[2:]]
    assert found == [
        ["none", "90.00 % acc@1", ""],
        ["--train.ema 0.9", "91.23 % acc@1", "+1.23"],
        ["--train.sam 0.05", "98.00 % acc@1", ""],
    ]


def test_a_digest_covers_what_a_config_says_beyond_the_defaults():
    config = flatten(to_dict(load_config(ROOT / "configs" / "lenet_digits.yaml", {})))
    digest = results.digest_of(config)
    older = {key: value for key, value in config.items() if key != "train.keep_memory"}  # before there was this key
    for same in (older, {**config, "train.precision": "fp32"}, {**config, "data.dataroot": "elsewhere", "seed": 7}):
        assert results.digest_of(same) == digest
    for other in (
        {**config, "train.n_epochs": None},
        {**config, "train.precision": "bf16"},
        {**config, "train.keep_memory": True},
    ):
        assert results.digest_of(other) != digest


def test_a_table_without_rows_says_so():
    assert results.table("masks and boxes") == results.ablation() == "Not measured yet.\n"


def test_the_list_says_what_is_missing(capsys):
    keep(ONE)
    assert run("--list") == 0
    assert capsys.readouterr().out == "quick: 1 of 2 seeds measured, missing 2\nabsent: 0 of 1 seeds measured, missing 1\n"


def test_the_picture_shows_every_row(folder):
    keep(ONE)
    assert run("--picture", folder / "rows.png") == 0
    assert (folder / "rows.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "no row nothing in results.yaml; there are quick, absent"),
        (["--data", "MNIST"], "--data MNIST: expected NAME=F"),
        (["--data", "MNITS=a"], "one of ["),
        (["--seed", "7"], "the seeds [1, 2]"),
    ],
)
def test_a_mistake_is_one_line(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_file_is_named(folder, capsys):
    (folder / "measured" / "quick-seed-1-000000.json").write_text("{}")
    assert run("--list") == 1
    assert "quick-seed-1-000000.json is damaged" in capsys.readouterr().err


def test_ctrl_c_ends_with_the_training_that_it_interrupts(monkeypatch, capsys):
    begun = []

    def interrupted(variants, *_):
        begun.extend(variants)
        return 2, {variants[0].name: "interrupted at step 3"}

    monkeypatch.setattr(results, "train_all", interrupted)
    assert run("quick") == 130
    assert len(begun) == 1
    assert "quick, seed 1: interrupted at step 3; the same command continues" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_are_trained_once_and_missing_data_is_named(folder, capsys):
    argv = ("--runs", folder / "runs", "--data", f"MNIST={folder / 'nowhere'}")
    assert run(*argv) == 1
    printed = capsys.readouterr()
    assert "absent, seed 1" in printed.err
    assert "nowhere" in printed.err
    assert sorted(one.seed for one in results.read_measured()) == [1, 2]
    assert results.read_measured()[0].n_epochs == pytest.approx(3 / 44, abs=0.01)
    assert run("quick", *argv) == 0
    assert capsys.readouterr().out.count("measured before") == 2


def test_the_documents_have_the_tables_of_the_measured_rows(monkeypatch):
    monkeypatch.undo()
    text = {name: (ROOT / name).read_text() for name in ("README.md", "docs/results.md")}
    for command in ("make results", "make results: masks and boxes", "make results: ablation", "make results: short"):
        page = text["README.md" if command.endswith("short") else "docs/results.md"]
        content = next(found["content"] for found in document.BLOCK.finditer(page) if found["command"] == command)
        assert content.strip() == document.TABLES[command]().strip()

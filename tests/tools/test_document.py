"""The generated documents are up to date, and the JSON schema agrees with the program."""

import json

import jsonschema
import pytest
import yaml

from engine import ConfigError, load_config
from engine.config.schema import Config, keys, to_dict
from tests.running import ROOT
from tools import document
from tools.document import BLOCK, MEASURED, TABLES, configuration, json_schema

CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "base").glob("*.yaml")])


def test_the_page_of_keys_and_the_schema_are_up_to_date():
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration()
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == json_schema()


def test_the_page_has_every_key():
    page = configuration()
    assert [key for key in keys() if f"| `{key}` |" not in page] == []


def test_measured_tables_are_those_in_the_documents():
    names = {"make faults": "faults.md", "make planted": "trajectories.md", "make bench": "benchmark.md"}
    names["python tools/benchmark.py data --images FOLDER --busy 2 --output docs/measured"] = "data.md"
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [(block["command"], block["content"]) for page in pages for block in BLOCK.finditer(page.read_text())]
    assert names.keys() <= {command for command, _ in blocks}
    for command, content in blocks:
        if command in names:
            assert content == (MEASURED / names[command]).read_text()


@pytest.mark.parametrize("name", ["gpu_speed", "gpu_results"])
def test_a_measurement_on_a_gpu_is_a_table_with_its_machine(name, tmp_path, monkeypatch):
    monkeypatch.setattr(document, "MEASURED", tmp_path)
    assert TABLES[f"python tools/{name}.py"]() == "Not measured yet."
    rows = [["part", "this project", "the other", "ratio", "details"], ["ResNet-18", "38,380", "38,470", "1.00", "images/s"]]
    rows.append(["ViT", "", "", "", "not measured: no time left"])
    (tmp_path / f"{name.replace('_', '-')}.json").write_text(json.dumps({"machine": "some card", "table": rows}))
    text = TABLES[f"python tools/{name}.py"]()
    assert text.startswith("some card:\n\n| part ")
    assert "| ResNet-18 |       38,380 |    38,470 |  1.00 | images/s |" in text
    assert text.endswith("Not measured, for want of time: ViT.")
    assert any(block["command"] == f"python tools/{name}.py" for block in BLOCK.finditer((MEASURED / "gpu.md").read_text()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_every_config_of_this_project(path):
    text = path.read_text()
    jsonschema.validate(yaml.safe_load(text), json_schema())
    place = "schema.json" if path.parent.name == "configs" else "../schema.json"
    assert text.startswith(f"# yaml-language-server: $schema={place}\n")


@pytest.mark.parametrize(
    "mistake",
    [
        {"train": {"optm": {"lr": 0.1}}},
        {"train": {"n_steps": "many"}},
        {"train": {"n_steps": 0}},
        {"train": {"precision": "fp8"}},
        {"augment": {"hflip": "always"}},
        {"sed": 1},
    ],
)
def test_the_schema_refuses_the_mistakes_that_the_program_refuses(mistake, tmp_path):
    path = tmp_path / "config.yaml"
    config = {"data": {"name": "digits"}, "model": {"name": "lenet"}, **mistake}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, json_schema())
    with pytest.raises(ConfigError):
        load_config(path)


def test_the_schema_has_the_defaults_of_the_program():
    defaults = to_dict(Config())
    schema = json_schema()["properties"]
    assert schema["seed"]["default"] == defaults["seed"]
    assert schema["train"]["properties"]["optim"]["properties"]["lr"]["default"] == defaults["train"]["optim"]["lr"]

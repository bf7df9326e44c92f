import json
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

import tools.exports.graph as graph_module
from engine.config import yaml12
from engine.config.command_line import run_tool
from engine.config.errors import RunError
from engine.inference.trained import Trained, load_trained
from models import create_model, list_models, model_signature
from tests.models.test_every_model import VARIANTS, build, small_sizes
from tests.running import ROOT, results, run_command
from tools.export import main
from tools.exports.exportable import Exportable, expect_equal
from tools.exports.folder import write_folder
from tools.exports.graph import DESCRIPTION, fold_batch_norm, trace, write_onnx, write_torch


def exportable(name: str, model: nn.Module | None = None, **arguments) -> Exportable:
    sizes = (small_sizes(name) if model is None else {"img_size": 32, "in_channels": 3}) | arguments
    img_size, channels = sizes.pop("img_size"), sizes.pop("in_channels")
    made = Exportable(
        name=name,
        arguments=sizes,
        model=build(name, **arguments) if model is None else model,
        classes=tuple(f"class {i}" for i in range(7)),
        channels=channels,
        img_size=img_size,
        built_for=img_size,
        mean=(0.4,) * channels,
        std=(0.2,) * channels,
    )
    as_trained(made.model, made.normalize(made.images(32)))
    return made


def as_trained(model: nn.Module, images: torch.Tensor) -> None:
    """Set weights that keep the signal's scale at any depth, with matching statistics: initial ones make all logits alike."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            module.momentum = 1.0  # adopts the statistics of one batch
    with torch.no_grad():
        model.train()(images)
    model.eval()


def logits_of(made: Exportable, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return made.model((images / 255 - 0.4) / 0.2)


def shallow(name: str) -> dict:
    """Return arguments for a shallow model that has each kind of layer once: depth only adds time."""
    parameters = model_signature(name).parameters
    if "n_modules" in parameters:
        return {"n_modules": (1, 1, 1), "n_blocks": 1}
    if "depth" in parameters:
        return {"depth": 2 if "n_heads" in parameters else 0.1}
    if "layers" in parameters and not name.startswith("vgg"):
        return {"layers": (1,) * len(parameters["layers"].default)}
    return {}


def export(*argv: object) -> int:
    return run_tool(lambda: main([str(word) for word in argv]))


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def uint8_images(trained: Trained, n: int) -> torch.Tensor:
    """Return validation images before normalization."""
    images, _ = next(trained.data.loader("valid").batches())
    return (255 * trained.normalize.undo(images[:n])).round().to(torch.uint8)


@torch.no_grad()
def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Allow for float32 rounding, relative to the differences between images."""
    assert actual.shape == expected.shape
    spread = expected.std(dim=0).mean()
    assert spread > 1e-2 * expected.abs().max(), "all logits are alike, so the comparison is useless"
    assert (actual - expected).abs().max() < 1e-3 * spread


# Runs, through the command line


@pytest.mark.parametrize("n", [1, 7])
def test_an_onnx_file_computes_the_logits_of_the_model_from_uint8_images(small_runs, onnx_of_lenet, n):
    trained = load_trained(small_runs["lenet"], {})
    images = uint8_images(trained, n)
    with torch.no_grad():
        expected = trained.model(trained.normalize(images))
    actual = torch.from_numpy(run_onnx(onnx_of_lenet, images.numpy()))
    assert (actual.argmax(1) == expected.argmax(1)).all()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def onnx_of_lenet(small_runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "lenet.onnx"
    assert export("onnx", small_runs["lenet"], "-o", path, "--opset", 20) == 0
    return path


def test_an_onnx_file_describes_itself_but_not_the_folders_of_this_machine(onnx_of_lenet):
    model = onnx.load(onnx_of_lenet)
    assert str(ROOT).encode() not in onnx_of_lenet.read_bytes()
    onnx.checker.check_model(model)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [("", 20)]
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", 1, 28, 28]
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(held["classes"]) == [str(i) for i in range(10)]
    assert json.loads(held["preprocessing"])["mean"] == [0.3053]
    assert held["input"] == "uint8, batch x 1 x 28 x 28, 0 to 255, normalized by the graph"
    assert "softmax" in held["output"]


def test_a_torch_export_file_accepts_normalized_images_and_has_no_folded_batch_norm(small_runs, tmp_path, capsys):
    path = tmp_path / "resnet18.pt2"
    assert export("torch", small_runs["resnet18"], "--input", "float32", "--fold_bn", "-o", path) == 0
    assert "12 BatchNorms folded, 0 left" in capsys.readouterr().out  # of the stem, of four blocks and of three shortcuts
    with zipfile.ZipFile(path) as archive:
        assert not any(str(ROOT).encode() in archive.read(name) for name in archive.namelist())
    held = {DESCRIPTION: ""}
    program = torch.export.load(path, extra_files=held)
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert json.loads(held[DESCRIPTION])["input"] == "float32, batch x 3 x 32 x 32, (value / 255 - mean) / std"
    trained = load_trained(small_runs["resnet18"], {})
    for n in (1, 6):
        images = trained.normalize(uint8_images(trained, n))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), trained.model(images), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder_of_resnet18(small_runs) -> Path:
    assert export("timm", small_runs["resnet18"], "--license", "mit") == 0
    return small_runs["resnet18"] / "export" / "resnet18"


def test_timm_loads_the_folder_and_preprocesses_images_as_the_run_did(small_runs, folder_of_resnet18):
    trained = load_trained(small_runs["resnet18"], {})
    in_timm = timm.create_model(f"local-dir:{folder_of_resnet18}", pretrained=True).eval()
    images = uint8_images(trained, 8)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(in_timm), is_training=False)
    preprocessed = torch.stack([transform(to_pil_image(image)) for image in images])
    torch.testing.assert_close(preprocessed, trained.normalize(images), rtol=1e-5, atol=1e-5)
    assert_same_logits(in_timm(preprocessed), trained.model(trained.normalize(images)))
    assert in_timm.pretrained_cfg["label_names"] == list(trained.classes)


def test_the_model_card_has_the_metrics_the_data_and_the_command(small_runs, folder_of_resnet18):
    card = (folder_of_resnet18 / "README.md").read_text()
    best = results(small_runs["resnet18"])["best"]
    assert f"| top-1 accuracy | {100 * best['valid/acc@1']:.2f} % |" in card
    assert f"| loss | {best['valid/loss']:.4f} |" in card
    assert f"| step {best['step']} |" in card
    front = yaml12.parse(card.split("---")[1])
    assert front == {"tags": ["image-classification", "timm"], "library_name": "timm", "license": "mit"}
    assert "shapes" in card
    assert "python " in card
    config = re.search(r"```yaml\n(.+?)```", card, re.DOTALL)[1]
    assert yaml12.parse(config)["model"] == {"name": "resnet18", "pretrained": False, "layers": [1, 1, 1, 1]}


def test_names_can_not_change_the_model_card_and_private_paths_are_not_in_it(small_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_runs["lenet"], run, symlinks=True)
    names = ["```", "</script><b>", "[x](http://evil)", "a\n# title", *map(str, range(4, 10))]
    (run / "classes.json").write_text(json.dumps(names))
    environment = json.loads((run / "environment.json").read_text())
    command = [
        "python",
        "main.py",
        "-c",
        "/home/alice/secret configs/a.yaml",
        "--data.dataroot",
        "/data/patients",
        "-e",
        "~/runs/x",
        "```",
    ]
    environment["command"] = [
        *command,
        "--data.dataroot=/data/patients",
        "--train.freeze=[/home/alice/x]",
        "--train.n_steps",
        "5",
    ]
    (run / "environment.json").write_text(json.dumps(environment))
    config = yaml12.parse((run / "config.yaml").read_text())
    config["data"]["dataroot"] = "/data/patients"
    config["distill"]["pretrained"], config["tracking"]["project"] = "/home/alice/weights.pth", "```"
    (run / "config.yaml").write_text(yaml12.dump(config))
    assert export("timm", run) == 0
    folder = run / "export" / "lenet"
    card = (folder / "README.md").read_text()
    for text in (card, (folder / "config.json").read_text()):
        assert not any(private in text for private in ("alice", "patients", "~/runs", str(tmp_path)))
    assert r"(\`\`\`, \</script\>\<b\>, \[x\](http://evil), a\\n# title, 4" in card
    assert "python main.py -c .../a.yaml -e .../x '```' '--train.freeze=[.../x]' --train.n_steps 5" in card
    assert "pretrained: '.../weights.pth'" in card
    assert "````sh\n" in card
    assert re.search(r"````yaml\n(.+?)\n````\n", card, re.DOTALL)


def test_a_card_of_a_run_with_damaged_results_is_a_one_line_error(small_runs, tmp_path, capsys):
    shutil.copytree(small_runs["lenet"], tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "results.json").write_text("[1]")
    assert export("timm", tmp_path / "run") == 1
    assert "results.json: it is not a mapping" in capsys.readouterr().err


def test_the_code_in_the_card_loads_the_folder(small_runs, tmp_path):
    assert export("timm", small_runs["lenet"], "-o", tmp_path / "lenet") == 0
    card = (tmp_path / "lenet" / "README.md").read_text()
    assert "timm can't load it" in card
    assert "license" not in card
    assert (tmp_path / "lenet" / "model.safetensors").stat().st_mode & 0o666 == (tmp_path / "lenet").stat().st_mode & 0o666
    code = re.search(r"```python\n(.+?)```", card, re.DOTALL)[1].replace("FOLDER", str(tmp_path / "lenet"))
    loaded: dict = {}
    exec(code, loaded)
    trained = load_trained(small_runs["lenet"], {})
    images = trained.normalize(uint8_images(trained, 8))
    assert_same_logits(loaded["model"](images), trained.model(images))
    test = results(small_runs["lenet"])["test"]
    assert f"{100 * test['test/acc@1']:.2f} % |" in card


# Every kind of model


@pytest.mark.parametrize(
    "name",
    [
        name if name == "vit_tiny" else pytest.param(name, marks=pytest.mark.slow)
        for name in list_models()
        if not VARIANTS.search(name)
    ],
)
def test_exports_compute_the_logits_of_the_model_for_any_batch_size(name, tmp_path):
    made = exportable(name, **shallow(name))
    graph = trace(made, "uint8", fold_bn=True)
    write_onnx(graph, tmp_path / "model.onnx", opset=18)
    write_torch(graph, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    images = made.images(9)
    assert_same_logits(torch.from_numpy(run_onnx(tmp_path / "model.onnx", images.numpy())), logits_of(made, images))
    assert_same_logits(program(images), logits_of(made, images))


IMAGENET_STEM = {"first_block": "imagenet"}
ONE_BLOCK = {"layers": (1, 1, 1, 1)}
SAME_IN_TIMM = {
    "resnet50": {**IMAGENET_STEM, **ONE_BLOCK},
    "preactresnet18": {**IMAGENET_STEM, **ONE_BLOCK},
    "resnext50_32x4d": {**IMAGENET_STEM, **ONE_BLOCK},
    "se_resnet50": {**IMAGENET_STEM, **ONE_BLOCK},
    "se_resnet18": {**IMAGENET_STEM, "legacy": True},
    "mobilenet": IMAGENET_STEM,
    "efficientnet_b0": IMAGENET_STEM,
    "hrnet_w18_small": IMAGENET_STEM,
    "vit_tiny": {"depth": 2},
}


@pytest.mark.parametrize("name", SAME_IN_TIMM)
def test_timm_loads_architectures_that_it_shares(name, tmp_path):
    loads_in_timm(name, SAME_IN_TIMM[name], tmp_path)


@pytest.mark.slow
def test_timm_loads_a_vgg(tmp_path):
    loads_in_timm("vgg11_bn", {"img_size": 224}, tmp_path)


def loads_in_timm(name: str, arguments: dict, tmp_path: Path) -> None:
    made = exportable(name, **arguments)
    assert "timm (as " in write_folder(made, tmp_path, lambda in_timm: "")
    images = made.images(4)
    in_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(in_timm).__module__.startswith("timm.")
    assert_same_logits(in_timm((images / 255 - 0.4) / 0.2), logits_of(made, images))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet26t", "convnext_atto", "efficientnet_lite0")),
    ],
)
def test_timm_models_are_exported(name, tmp_path):
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2} if name.startswith("vit") else {}
    model = create_model(f"timm/{name}", n_classes=7, **arguments)
    made = exportable(f"timm/{name}", model, **{key: value for key, value in arguments.items() if key != "img_size"})
    assert "timm (as " in write_folder(made, tmp_path / "folder", lambda in_timm: "")
    images = made.images(4)
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert_same_logits(in_timm((images / 255 - 0.4) / 0.2), logits_of(made, images))
    write_torch(trace(made, "uint8", fold_bn=True), tmp_path / "model.pt2")
    assert_same_logits(torch.export.load(tmp_path / "model.pt2").module()(images), logits_of(made, images))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_a_network_that_timm_lacks_or_builds_differently_is_not_written_for_timm(name, tmp_path):
    """timm's ResNet-18 has another stem than the one for CIFAR-10, under the same names."""
    calls = []
    assert "timm can't" in write_folder(exportable(name), tmp_path, lambda in_timm: calls.append(in_timm) or "")
    assert calls == [False]


# Folding


class Branch(nn.Module):
    """One convolution that can be folded, one whose output is used elsewhere, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, kernel_size=3, padding=1, bias=False) for _ in range(3))
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        return self.bn2(y) + y + self.bn3(self.conv3(x)) * self.bn4(self.conv3(y))


def test_only_norms_after_an_unshared_layer_are_folded():
    model, images = Branch(), torch.rand(8, 3, 8, 8)
    as_trained(model, images)
    folded, n_folded, n_left = fold_batch_norm(model, images)
    assert (n_folded, n_left) == (1, 3)
    assert isinstance(folded.bn1, nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    assert isinstance(model.bn1, nn.BatchNorm2d), "the model itself is unchanged"


def test_folding_a_norm_of_timm_keeps_its_activation():
    model = timm.create_model("efficientnet_lite0", num_classes=7)
    images = torch.rand(8, 3, 64, 64)
    as_trained(model, images)
    folded, n_folded, n_left = fold_batch_norm(model, images)
    assert n_folded > 40
    assert n_left == 0
    with torch.no_grad():
        assert_same_logits(folded(images), model(images))


# Errors


class Branching(nn.Module):
    num_features = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_model_that_cannot_be_traced_is_reported_in_one_line():
    made = replace(exportable("lenet"), name="branching", model=Branching(), channels=3, mean=(0.4,) * 3, std=(0.2,) * 3)
    with pytest.raises(RunError, match=r"branching can't be traced by torch\.export: ") as error:
        trace(made, "uint8", fold_bn=False)
    assert "\n" not in str(error.value)


def test_an_export_that_differs_from_the_model_is_not_written(small_runs, tmp_path, monkeypatch, capsys):
    before = tmp_path / "lenet.onnx"
    before.write_bytes(b"the one before")
    real = graph_module._onnx_runtime
    monkeypatch.setattr(graph_module, "_onnx_runtime", lambda path: lambda images: 1.01 * real(path)(images))
    assert export("onnx", small_runs["lenet"], "-o", before) == 1
    assert "differs from the model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lenet.onnx"]
    assert before.read_bytes() == b"the one before"


def test_expect_equal_compares_the_error_with_the_differences_between_images():
    logits = torch.tensor([[100.0, 0.0], [100.2, 0.3]])
    assert "largest error" in expect_equal(lambda x: x + 1e-5, lambda x: x, [logits], "it")
    with pytest.raises(RunError, match=r"it differs from the model: logits are off by 0\.1, and differ by 0\.18"):
        expect_equal(lambda x: x + 0.1, lambda x: x, [logits], "it")
    with pytest.raises(RunError):
        expect_equal(lambda x: x * float("nan"), lambda x: x, [logits], "it")


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_reported_with_the_command_that_installs_it(small_runs, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert export("onnx", small_runs["lenet"]) == 1
    error = capsys.readouterr().err
    assert f"export.py onnx needs packages that are not installed: {module}; pip install -r requirements-extra.txt" in error


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "FORMAT"),
        (["onxx", "RUN"], 2, "onnx"),
        (["onnx", "/nowhere"], 1, "/nowhere is neither a run folder"),
        (["onnx", "RUN", "-o", "model.pt2"], 2, "ends in .onnx"),
        (["torch", "RUN", "--ema"], 1, "has no averaged weights"),
        (["torch", "RUN", "-o", "/proc/nowhere/model.pt2"], 1, "/proc/nowhere can't be written"),
        (["timm", "RUN", "--fold_bn"], 2, "--fold_bn"),
    ],
)
def test_a_mistake_is_reported_in_one_line(small_runs, argv, code, message, capsys):
    assert export(*[small_runs["lenet"] if word == "RUN" else word for word in argv]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_does_not_import_torch():
    script = "import sys, tools.export; tools.export.main(['onnx', '--help'])"
    finished = run_command("python", "-X", "importtime", "-c", script)
    assert finished.returncode == 0
    assert "--fold_bn" in finished.stdout
    assert " torch" not in finished.stderr

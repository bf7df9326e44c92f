"""`pretrained`: files of this project and others, loaded into models with other classes, channels and image sizes."""

import argparse
import logging
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from models import create_model, list_models
from models.loading.pretrained import load_pretrained
from tests.models.reference import randomize, relative_error


def save(weights, path: Path) -> Path:
    safetensors.torch.save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    torch.manual_seed(1)
    return create_model("lenet").eval()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return randomize(torchvision.models.resnet18(), img_size=64)


@pytest.fixture(scope="module")
def resnet18_file(resnet18, tmp_path_factory) -> Path:
    return save(resnet18.state_dict(), tmp_path_factory.mktemp("weights") / "resnet18.pth")


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return randomize(timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8), img_size=64)


@pytest.fixture(scope="module")
def vit_file(vit, tmp_path_factory) -> Path:
    return save(vit.state_dict(), tmp_path_factory.mktemp("weights") / "vit.safetensors")


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- formats of files ---


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_wrapper_prefixes_are_removed(lenet, tmp_path, prefix, suffix):
    path = save({prefix + name: value for name, value in lenet.state_dict().items()}, tmp_path / f"weights{suffix}")
    assert_same_weights(create_model("lenet", pretrained=path), lenet)


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_weights_are_found_under_the_keys_of_training_scripts(lenet, tmp_path, key):
    checkpoint = {"epoch": 3, "arch": "lenet", key: lenet.state_dict(), "optimizer": {"state": {}, "param_groups": []}}
    assert_same_weights(create_model("lenet", pretrained=save(checkpoint, tmp_path / "last.pth")), lenet)


def test_averaged_weights_are_preferred(lenet, tmp_path):
    path = save({"state_dict": create_model("lenet").state_dict(), "state_dict_ema": lenet.state_dict()}, tmp_path / "a.pth")
    assert_same_weights(create_model("lenet", pretrained=path), lenet)


def test_an_averaged_model_of_torch_loads_without_its_counter(lenet, tmp_path):
    path = save({"model_ema": AveragedModel(lenet).state_dict()}, tmp_path / "a.pth")
    assert_same_weights(create_model("lenet", pretrained=path), lenet)


@pytest.mark.parametrize("zipped", [True, False])
def test_options_saved_along_with_the_weights_are_ignored(lenet, tmp_path, zipped):
    checkpoint = {"state_dict": lenet.state_dict(), "args": argparse.Namespace(lr=0.1, model="lenet")}
    torch.save(checkpoint, tmp_path / "last.pth", _use_new_zipfile_serialization=zipped)
    assert_same_weights(create_model("lenet", pretrained=tmp_path / "last.pth"), lenet)


@pytest.mark.parametrize("folder", ["", "ckpt/best"])
def test_weights_are_read_from_a_checkpoint_folder_and_from_a_run_folder(lenet, tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    save(lenet.state_dict(), tmp_path / folder / "model.safetensors")
    assert_same_weights(create_model("lenet", pretrained=str(tmp_path)), lenet)


def test_half_precision_weights_are_converted_to_the_precision_of_the_model(lenet, tmp_path):
    path = save({name: value.half() for name, value in lenet.state_dict().items()}, tmp_path / "half.safetensors")
    model = create_model("lenet", pretrained=path)
    assert model.fc1.weight.dtype == torch.float32
    assert torch.equal(model.fc1.weight, lenet.fc1.weight.half().float())


def test_old_files_without_batchnorm_counters_load(resnet18, tmp_path):
    old = {name: value for name, value in resnet18.state_dict().items() if not name.endswith("num_batches_tracked")}
    model = create_model("resnet18", pretrained=save(old, tmp_path / "old.safetensors"))
    assert torch.equal(model.layer4[1].bn2.running_var, resnet18.layer4[1].bn2.running_var)


# --- other classes, channels, image sizes ---


def test_a_classifier_for_other_classes_is_skipped_and_named_and_the_rest_loads(resnet18, resnet18_file, caplog):
    torch.manual_seed(0)
    untrained = create_model("resnet18", n_classes=10)
    torch.manual_seed(0)
    model = create_model("resnet18", n_classes=10, pretrained=resnet18_file)
    assert torch.equal(model.fc.weight, untrained.fc.weight)
    model.fc = resnet18.fc
    assert_same_weights(model, resnet18)
    (record,) = [record for record in caplog.records if record.name == "models.loading.pretrained"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"weights from {resnet18_file}; skipped: fc.weight, fc.bias"


def test_a_matching_file_loads_completely(resnet18, resnet18_file, caplog):
    with caplog.at_level(logging.INFO, logger="models.loading.pretrained"):
        assert_same_weights(create_model("resnet18", pretrained=resnet18_file), resnet18)
    assert [record.getMessage() for record in caplog.records] == [f"weights from {resnet18_file}"]


def test_layers_of_a_head_for_another_image_size_are_skipped_if_they_do_not_fit(lenet, tmp_path, caplog):
    path = save(lenet.state_dict(), tmp_path / "lenet.pth")
    model = create_model("lenet", img_size=40, pretrained=path)
    assert torch.equal(model.conv2.weight, lenet.conv2.weight)
    assert torch.equal(model.fc3.weight, lenet.fc3.weight)
    assert not torch.equal(model.fc1.bias, lenet.fc1.bias)  # a layer is loaded as a whole or not at all
    assert "skipped: fc1.weight, fc1.bias" in caplog.text


@pytest.fixture(params=["resnet18", "vit_tiny"])
def reference(request) -> tuple[nn.Module, dict]:
    """Return a published model, and the arguments with which create_model loads its weights."""
    if request.param == "resnet18":
        theirs, path, options = "resnet18", "resnet18_file", {}
    else:
        theirs, path, options = "vit", "vit_file", {"img_size": 64, "patch_size": 8}
    return request.getfixturevalue(theirs), {"name": request.param, "pretrained": request.getfixturevalue(path), **options}


@pytest.mark.parametrize("channels", [1, 6])
def test_one_channel_and_repeated_colors_give_the_logits_of_a_gray_image(reference, channels, caplog):
    theirs, options = reference
    with caplog.at_level(logging.INFO, logger="models.loading.pretrained"):
        model = create_model(in_channels=channels, **options).eval()
    gray = torch.randn(2, 1, 64, 64)
    assert relative_error(model(gray.expand(-1, channels, -1, -1)), theirs(gray.expand(-1, 3, -1, -1))) < 1e-4
    assert caplog.messages[-1] == f"weights from {options['pretrained']}; adapted: {model.FIRST_CONV}.weight"


@pytest.mark.parametrize(("channels", "colors"), [(2, [0, 1]), (4, [0, 1, 2, 0])])
def test_other_channel_counts_get_the_colors_in_turn_at_the_same_scale(reference, channels, colors):
    theirs, options = reference
    model = create_model(in_channels=channels, **options)
    expected = theirs.get_submodule(model.FIRST_CONV).weight[:, colors] * (3 / channels)
    torch.testing.assert_close(model.get_submodule(model.FIRST_CONV).weight, expected)


@pytest.mark.parametrize("img_size", [32, 96, 224])
def test_a_vits_position_embedding_follows_the_image_size_as_in_timm(vit, vit_file, img_size):
    model = create_model("vit_tiny", img_size=img_size, patch_size=8, pretrained=vit_file)
    side = img_size // 8
    expected = timm.layers.resample_abs_pos_embed(vit.pos_embed.detach(), new_size=[side, side])
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    assert torch.equal(model.pos_embed[:, 0], vit.pos_embed[:, 0])  # the class token is not part of the grid
    assert torch.equal(model.blocks[11].mlp.fc2.weight, vit.blocks[11].mlp.fc2.weight)


def test_a_position_embedding_that_is_not_square_is_refused_in_one_line(vit, tmp_path):
    weights = vit.state_dict() | {"pos_embed": torch.zeros(1, 67, 192)}
    with pytest.raises(ValueError, match="pos_embed holds 67 positions") as error:
        create_model("vit_tiny", img_size=64, patch_size=8, pretrained=save(weights, tmp_path / "vit.pth"))
    one_line(error)


def test_feature_extractor_loads_the_weights_of_a_classifier(resnet18, resnet18_file):
    features = create_model("resnet18", features_only=True, out_indices=(4,), pretrained=resnet18_file).eval()
    image = torch.randn(1, 3, 64, 64)
    (deepest,) = features(image)
    assert torch.allclose(resnet18.fc(deepest.mean((2, 3))), resnet18(image), atol=1e-4)


@pytest.mark.parametrize("name", list_models())
def test_only_classifiers_and_first_conv_depend_on_classes_and_channels(name):
    with torch.device("meta"):
        published, model = create_model(name), create_model(name, n_classes=7, in_channels=5)
    ours, theirs = model.state_dict(), published.state_dict()
    assert ours.keys() == theirs.keys()
    differ = {key for key in ours if ours[key].shape != theirs[key].shape}
    # in airbench, the number of channels after whitening depends on that of the image
    follows = {"groups.0.conv1"} if name.startswith("airbench") else set()
    assert {key.rpartition(".")[0] for key in differ} == {*model.CLASSIFIERS, model.FIRST_CONV} | follows


# --- timm's own models ---


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_timm_model_loads_a_file_for_other_classes_channels_and_image_sizes(name, tmp_path, caplog):
    published = timm.create_model(name)
    path = save(published.state_dict(), tmp_path / "published.pth")
    assert_same_weights(create_model(f"timm/{name}", pretrained=path), published)
    model = create_model(f"timm/{name}", n_classes=10, in_channels=1, img_size=96, pretrained=path).eval()
    assert model(torch.randn(1, 1, 96, 96)).shape == (1, 10)
    classifier, first = published.pretrained_cfg["classifier"], published.pretrained_cfg["first_conv"]
    assert f"skipped: {classifier}.weight, {classifier}.bias; adapted: " in caplog.text
    ours, theirs = model.get_submodule(first).weight, published.get_submodule(first).weight
    assert torch.allclose(ours, theirs.sum(1, keepdim=True))
    assert torch.equal(*(list(m.state_dict().values())[-8] for m in (model, published)))  # a tensor deep inside


def test_original_names_of_published_files_are_converted_as_in_timm(tmp_path):
    """ConvNeXt's authors published their weights under different names, which timm translates."""
    model = timm.create_model("test_convnext")
    theirs = {}
    for name, value in model.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".").replace("head.norm", "norm")
        name = name.replace("head.fc", "head").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        for stage in (1, 2, 3):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        theirs[name] = value
    assert "downsample_layers.0.0.weight" in theirs
    path = save({"model": theirs}, tmp_path / "convnext.pth")
    assert_same_weights(create_model("timm/test_convnext", pretrained=path), model)


def test_a_wrong_file_for_a_timm_model_is_named_in_one_line(resnet18_file):
    for name in ("test_convnext", "test_vit", "test_resnet"):
        with pytest.raises(ValueError, match=f"timm/{name} can't load {resnet18_file}: ") as error:
            create_model(f"timm/{name}", pretrained=resnet18_file)
        one_line(error)


# --- refused files ---


class RunsCode:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["at the top", "next to the weights", "among the weights"])
def test_a_pickle_that_would_run_code_is_refused_without_running_it(lenet, tmp_path, place, zipped, name):
    trap = RunsCode(tmp_path / "it-ran")
    content = {
        "at the top": trap,
        "next to the weights": {"state_dict": lenet.state_dict(), "args": trap},
        "among the weights": lenet.state_dict() | {"conv1.weight": trap},
    }[place]
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"can't be read|is refused") as error:
        create_model("lenet", pretrained=tmp_path / name)
    assert str(tmp_path / name) in one_line(error)
    if not name.endswith(".safetensors"):
        assert "is refused: it holds more than tensors and plain values" in str(error.value)
        assert "mkdir" in str(error.value)
    assert not (tmp_path / "it-ran").exists()


def test_a_pickled_model_is_refused_and_its_class_named(resnet18, tmp_path):
    with pytest.raises(ValueError, match=r"is refused: .*torchvision\.models\.resnet\.ResNet"):
        create_model("resnet18", pretrained=save(resnet18, tmp_path / "model.pth"))


@pytest.mark.parametrize("what", ["weights.pth", "legacy.pth", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9999])
def test_a_truncated_file_is_named_in_one_line(lenet, tmp_path, what, kept):
    path = tmp_path / what
    if what == "legacy.pth":
        torch.save(lenet.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save(lenet.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="can't be read as weights; is it damaged, cut short, or another kind") as error:
        create_model("lenet", pretrained=path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "content", [b"hello\nworld\n" * 20, b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100)]
)
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="can't be read as weights") as error:
        create_model("lenet", pretrained=tmp_path / name)
    assert str(tmp_path / name) in one_line(error)


def test_a_file_that_expands_is_refused_in_one_line(lenet, tmp_path):
    state = lenet.state_dict() | {"conv1.bias": torch.zeros(1).expand(1 << 40)}
    with pytest.raises(ValueError, match=r"can't be read as weights.*larger than its storage") as error:
        create_model("lenet", pretrained=save(state, tmp_path / "weights.pth"))
    one_line(error)


def test_a_safetensors_file_with_an_enormous_header_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + bytes(100))
    with pytest.raises(ValueError, match="no header of a sensible size"):
        create_model("lenet", pretrained=path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_pipe_is_no_file_of_weights(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        create_model("lenet", pretrained=tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], {"state_dict": {}}, {"epoch": 3}, {"n_averaged": torch.tensor(1)}, {0: torch.zeros(3)}, torch.zeros(3)],
)
def test_a_file_without_a_state_dict_is_named_in_one_line(tmp_path, content):
    path = save(content, tmp_path / "train_state.pth")
    with pytest.raises(ValueError, match="holds no state dict") as error:
        create_model("lenet", pretrained=path)
    assert str(path) in one_line(error)


def test_a_missing_file_is_named_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights.pth: no such file") as error:
        create_model("lenet", pretrained=tmp_path / "weights.pth")
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors in this folder"):
        create_model("lenet", pretrained=tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {}, r"layer1.0.conv1.weight is \(64, 64, 3, 3\) in the file and \(64, 64, 1, 1\) in the model; .* more"),
        ("resnet34", {}, "layer1.2.conv1.weight is missing; .* more"),
        (
            "resnet18",
            {"first_block": "cifar10"},
            r"conv1.weight is \(64, 3, 7, 7\) in the file and \(64, 3, 3, 3\) in the model$",
        ),
        ("lenet", {}, "conv1.weight is .*; .* more"),
    ],
)
def test_the_weights_of_another_backbone_are_refused_in_one_line(resnet18_file, name, options, message):
    with pytest.raises(ValueError, match=f"{name} can't load {resnet18_file}: {message}") as error:
        create_model(name, pretrained=resnet18_file, **options)
    one_line(error)


def test_a_missing_or_unknown_tensor_of_the_backbone_is_refused(lenet, tmp_path):
    few = {name: value for name, value in lenet.state_dict().items() if name != "conv2.bias"}
    with pytest.raises(ValueError, match=r"conv2.bias is missing$"):
        create_model("lenet", pretrained=save(few, tmp_path / "few.pth"))
    many = lenet.state_dict() | {"conv3.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"conv3.bias is unknown$"):
        create_model("lenet", pretrained=save(many, tmp_path / "many.pth"))


# --- the published weights ---


@pytest.fixture
def published(monkeypatch):
    """Replace both sources of published weights, and return the list of requests."""
    requests = []

    create = timm.create_model

    def from_torchvision(weights, progress, check_hash, weights_only):
        assert check_hash
        assert weights_only
        requests.append(f"torchvision {weights}")
        return torchvision.models.resnet18().state_dict()

    def from_timm(name, pretrained=False, **options):
        if pretrained:
            requests.append(f"timm {name}")
        return create(name, **options)

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", from_torchvision)
    monkeypatch.setattr(timm, "create_model", from_timm)
    monkeypatch.setattr("models.loading.pretrained._require_hub", lambda repository: None)
    return requests


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("resnet18", "torchvision ResNet18_Weights.IMAGENET1K_V1"),
        ("hrnet_w18_small", "timm hrnet_w18_small"),
        ("vit_tiny", "timm vit_tiny_patch16_224"),
        ("timm/resnet18", "timm resnet18"),
    ],
)
def test_published_weights_come_from_torchvision_or_else_from_timm(published, name, source):
    create_model(name, n_classes=10, pretrained=True)
    assert published == [source]


def test_published_weights_of_googlenet_set_transform_input(monkeypatch):
    theirs = torchvision.models.googlenet(init_weights=False)
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *args, **kwargs: theirs.state_dict())
    assert create_model("googlenet", pretrained=True).transform_input
    assert not create_model("googlenet").transform_input


def test_a_model_without_published_weights_is_named_in_one_line(published):
    for name in ("lenet", "timm/seresnet18"):
        with pytest.raises(ValueError, match=f"nobody publishes weights for {name}; give model.pretrained a file"):
            create_model(name, pretrained=True)
    assert published == []


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def offline(name, **options):
        raise ValueError("no network")  # as the hub's client does

    model = create_model("hrnet_w18_small")
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("models.loading.pretrained._require_hub", lambda repository: None)
    with pytest.raises(OSError, match=r"can't be fetched \(no network\); download them elsewhere") as error:
        load_pretrained(model, "hrnet_w18_small", True)
    one_line(error)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_create_model_passes_no_argument_to_timm_that_loads_files(argument):
    with pytest.raises(ValueError, match=f"{argument} is not an argument of the network timm/resnet18"):
        create_model("timm/resnet18", **{argument: "evil.pth"})

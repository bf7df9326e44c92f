import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageDraw

from engine.config.errors import ConfigError, RunError
from engine.inference.images import batches_of, find_images
from engine.inference.trained import load_trained
from models.loading.pretrained import published_classes
from tests import on_disk
from tests.running import ROOT, results, run_main, weights

EXAMPLE = ROOT / "docs" / "examples" / "lenet_mnist"
DIGITS, CIFAR, MNIST = (ROOT / "configs" / f"{name}.yaml" for name in ("lenet_digits", "resnet18_cifar10", "lenet_mnist"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert run_main("-e", path, "--train.n_steps", 40, "--train.optim.lr", 0.05) == 0
    return path


def save_untrained(reference, path):
    """Save the untrained weights of `reference` to `path`, in place of published weights."""
    torch.save(reference.state_dict(), path)
    return reference.eval()


def test_model_name_uses_torchvision_weights_preprocessing_and_classes(tmp_path, photo):
    reference = save_untrained(torchvision.models.resnet18(), tmp_path / "weights.pth")
    published = torchvision.models.ResNet18_Weights.DEFAULT
    trained = load_trained("resnet18", {"model.pretrained": str(tmp_path / "weights.pth")})
    ((images, _),) = batches_of(trained, [photo], batch_size=4)
    expected = published.transforms()(Image.open(photo)).unsqueeze(0)
    torch.testing.assert_close(images, expected, rtol=0, atol=0.02)  # about one 8-bit level, from rounding
    torch.testing.assert_close(trained.model(images), reference(images))
    assert trained.classes == trained.task.classes == tuple(published.meta["categories"])
    assert trained.run_dir is None


def test_timm_name_uses_timm_preprocessing(photo):
    trained = load_trained("timm/vit_tiny_patch16_224", {"model.pretrained": False})
    ((images, _),) = batches_of(trained, [photo], batch_size=4)
    timm_config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict())
    expected = timm.data.create_transform(**timm_config)(Image.open(photo)).unsqueeze(0)
    torch.testing.assert_close(images, expected, rtol=0, atol=0.02)
    assert len(trained.classes) == 1000


def test_weights_with_another_number_of_classes_keep_their_classifier(tmp_path, data_root):
    reference = save_untrained(torchvision.models.resnet18(num_classes=7), tmp_path / "weights.pth")
    data = {"data.dataroot": str(data_root / "CIFAR-10"), "data.verify": False}
    overrides = {"model.pretrained": str(tmp_path / "weights.pth"), "model.first_block": "imagenet", **data}
    for config in (None, CIFAR):
        trained = load_trained("resnet18", overrides, config=config)
        assert trained.classes == tuple("0123456")
        torch.testing.assert_close(trained.model.fc.weight, reference.fc.weight)
    with pytest.raises(RunError, match=r"weights\.pth: the model has 7 classes, and CIFAR-10 has 10"):
        trained.evaluate("valid")


def test_name_with_config_and_weights_of_a_run_reproduces_its_loss(run):
    trained = load_trained("lenet", {"model.pretrained": str(run)}, config=DIGITS)
    assert trained.classes == tuple("0123456789")
    assert trained.evaluate("valid")["loss"] == results(run)["best"]["valid/loss"]


def test_only_the_command_line_overrides_published_preprocessing():
    name, no_weights = "timm/vit_tiny_patch16_224", {"model.pretrained": False}
    default = load_trained(name, no_weights)
    assert (default.prepare.img_size, default.prepare.mean, default.prepare.crop_pct) == (224, (0.5, 0.5, 0.5), 0.9)
    overridden = load_trained(name, {**no_weights, "data.mean": [0.1, 0.2, 0.3], "augment.crop_pct": 1.0})
    assert (overridden.prepare.mean, overridden.prepare.crop_pct, overridden.prepare.std) == (
        (0.1, 0.2, 0.3),
        1.0,
        (0.5, 0.5, 0.5),
    )


def test_model_arguments_in_the_config_are_dropped_for_another_model(data_root):
    root = {"data.dataroot": str(data_root / "CIFAR-10"), "data.verify": False, "model.pretrained": False}
    same = load_trained("resnet18", root, config=CIFAR)
    other = load_trained("vgg11", root, config=CIFAR)
    assert same.config.model.args == {"first_block": "cifar10"}
    assert other.config.model.args == {}
    assert len(other.data.splits["valid"]) == 20


def test_run_loads_without_its_dataset(tmp_path, photo):
    root = on_disk.write_image_folder(tmp_path / "images")
    data = ("--data.name", "imagefolder", "--data.dataroot", root, "--data.img_size", 32)
    model = ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]")
    length = ("--train.n_steps", 2, "--train.batch_size", 8, "--dataloader.num_workers", 0)
    assert run_main("-e", tmp_path / "run", *data, *model, *length) == 0
    shutil.rmtree(root)
    trained = load_trained(tmp_path / "run", {})
    ((images, _),) = batches_of(trained, [photo], batch_size=4)
    assert trained.classes == ("class_0", "class_1", "class_2")
    assert trained.model(images).shape == (1, 3)
    with pytest.raises(RunError, match="no such folder"):
        trained.evaluate("valid")


def test_run_without_a_class_list_gets_it_from_the_dataset(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (copied / "classes.json").unlink()
    assert load_trained(copied, {}).classes == tuple("0123456789")


def test_fine_tuned_model_keeps_the_input_transform_of_its_published_weights(tmp_path, monkeypatch):
    def published(model, name):
        return torchvision.models.googlenet(init_weights=False).state_dict()

    monkeypatch.setattr("models.loading.pretrained._published", published)
    shapes = ("--data.name", "shapes", "--data.n_train", 16, "--data.n_test", 8, "--data.img_size", 32)
    argv = ("--model.name", "googlenet", "--model.pretrained", "true", "--train.n_steps", 1, "--train.batch_size", 16)
    assert run_main("-e", tmp_path / "run", *shapes, *argv) == 0
    monkeypatch.setattr("models.loading.pretrained._published", None)  # a second request would fail
    trained = load_trained(tmp_path / "run", {})
    assert trained.model.transform_input
    assert torch.equal(trained.model.fc.weight, weights(tmp_path / "run")["fc.weight"])


def test_student_loads_without_its_teacher(run, tmp_path):
    teacher = shutil.copytree(run, tmp_path / "teacher", symlinks=True)
    argv = ("--train.n_steps", 2, "--distill.teacher", teacher, "--distill.weight", 0.7)
    assert run_main("-e", tmp_path / "student", *argv) == 0
    shutil.rmtree(teacher)
    trained = load_trained(tmp_path / "student", {})
    assert trained.evaluate("valid")["loss"] == results(tmp_path / "student")["best"]["valid/loss"]


def test_image_file_of_an_in_memory_dataset_is_preprocessed_as_in_evaluation(run, tmp_path):
    trained = load_trained(run, {"eval.batch_size": 4})
    originals = trained.data.splits["valid"].images[:4]
    for i, image in enumerate(originals):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    ((images, _),) = batches_of(trained, find_images([str(tmp_path)]), batch_size=4)
    expected, _ = next(iter(trained.data.loader("valid").batches()))
    assert torch.equal(images, expected)


def test_image_file_is_resized_and_converted_for_an_in_memory_dataset(run, photo):
    ((images, _),) = batches_of(load_trained(run, {}), [photo], batch_size=4)
    small = Image.open(photo).resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8)).convert("L")
    levels = torch.from_numpy(np.array(small)).float().view(1, 1, 8, 8)
    expected = (torch.nn.functional.interpolate(levels, (28, 28), mode="bilinear", antialias=True) / 255 - 0.3053) / 0.3760
    torch.testing.assert_close(images, expected)


def test_find_images_lists_files_folders_and_globs_without_duplicates(tmp_path):
    for name in ("b/2.JPG", "b/c/3.png", "a.jpg", "b/notes.txt", "d.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    words = ("a.jpg", "b", "*.jpg", "**/*.png", "*.gif")
    found = find_images([str(tmp_path / word) for word in words])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jpg", "b/2.JPG", "b/c/3.png", "d.gif"]
    (tmp_path / "empty").mkdir()
    for word, message in (("empty", "no image in this folder"), ("x.jpg", "no such image"), ("*.webp", "no image matches")):
        with pytest.raises(RunError, match=message):
            find_images([str(tmp_path / word)])


def test_unreadable_image_is_an_error_with_its_path(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"broken\.jpg: this image can't be read"):
        list(batches_of(load_trained(run, {}), [tmp_path / "broken.jpg"], batch_size=4))


@pytest.mark.parametrize(
    ("source", "config", "overrides", "error", "message"),
    [
        ("resnet19", None, {}, RunError, "resnet19 is neither a run folder.*did you mean resnet1"),
        ("runs/none", None, {}, RunError, "runs/none is neither a run folder with a checkpoint nor a checkpoint"),
        ("{run}", DIGITS, {}, ConfigError, "-c .*lenet_digits.yaml: .* is a run, which has a config"),
        ("lenet", None, {}, ConfigError, "lenet: there are no published weights"),
        ("lenet", DIGITS, {}, ConfigError, "lenet: there are no published weights"),
        ("resnet18", None, {"model.pretrained": "none.pth"}, RunError, "model.pretrained: none.pth: no such file"),
        ("resnet18", None, {"model.pretrained": "{run}"}, ConfigError, "model.pretrained: .*has no fc.weight"),
        ("resnet18", None, {"model.pdrops": 1, "model.pretrained": False}, ConfigError, "did you mean model.pdrop?"),
    ],
)
def test_invalid_input_is_a_one_line_error(run, source, config, overrides, error, message):
    overrides = {key: value.format(run=run) if isinstance(value, str) else value for key, value in overrides.items()}
    with pytest.raises(error, match=message) as caught:
        load_trained(source.format(run=run), overrides, config=config)
    assert "\n" not in str(caught.value)


def test_class_names_are_known_for_imagenet_1k_and_21k():
    assert published_classes(1000)[0] == "tench"
    assert published_classes(21843)[0].startswith("organism")
    assert published_classes(3) == ("0", "1", "2")


def test_the_example_model_reads_drawn_digits_without_its_data(tmp_path):
    one, zero = Image.new("L", (28, 28)), Image.new("L", (28, 28))
    ImageDraw.Draw(one).line((15, 5, 13, 22), 255, 3)
    ImageDraw.Draw(zero).ellipse((8, 5, 20, 23), None, 255, 3)
    one.save(tmp_path / "one.png")
    zero.save(tmp_path / "zero.png")
    trained = load_trained("lenet", {"model.pretrained": str(EXAMPLE)}, config=MNIST)
    ((images, _),) = batches_of(trained, [tmp_path / "one.png", tmp_path / "zero.png"], batch_size=2)
    assert [trained.classes[i] for i in trained.model(images).argmax(1)] == ["1 - one", "0 - zero"]
    assert sum(file.stat().st_size for file in EXAMPLE.iterdir()) < 300_000


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a", "b"], r"2 names in config\.json for 10 classes"),
        (3, "label_names is not a list of names"),
        ([1, 2], "not a list of names"),
    ],
)
def test_names_that_do_not_fit_the_weights_are_refused(names, problem, tmp_path):
    shutil.copy(EXAMPLE / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"label_names": names}))
    with pytest.raises((ConfigError, RunError), match=problem):
        load_trained("lenet", {"model.pretrained": str(tmp_path)}, config=MNIST)

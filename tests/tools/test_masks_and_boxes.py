"""The tools on runs of segmentation and detection."""

import json

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools.coco import COCO

from engine.config.command_line import run_tool
from engine.inference.trained import load_trained
from engine.plots.overlays import blend_mask, palette
from tests.faults.campaign import SMALL
from tests.on_disk import write_coco
from tests.running import results, run_main, weights
from tools.compare import main as compare
from tools.predict import main as predict
from tools.visualize import main as visualize

OPTIONS = ("--data.name", "shapes", "--data.n_train", 48, "--data.n_test", 12, "--data.img_size", 32, "--model.name", "resnet18")
OPTIONS += ("--model.layers", "[1,1,1,1]", "--train.n_steps", 12, "--train.batch_size", 8)
OPTIONS += ("--train.eval_freq", 12, "--train.optim.type", "AdamW", "--train.optim.lr", 0.001)
TASK_OPTIONS = {
    "segmentation": ("--segmentation.head", "hrnet"),
    "detection": ("--detection.width", 64, "--detection.score_threshold", 0.05),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for task, argv in TASK_OPTIONS.items():
        assert run_main("-e", folder / task, *SMALL, *OPTIONS, "--task", task, *argv) == 0
    return folder


@pytest.fixture(scope="module", params=TASK_OPTIONS)
def trained(request, runs):
    return load_trained(runs / request.param, {})


@pytest.fixture
def photos(trained, tmp_path):
    """The validation images as files."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i, image in enumerate(trained.data.splits["valid"].images):
        name = f"more/{i:02d}.png" if i > 8 else f"{i:02d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def predictions_of(trained):
    """Return the predictions for the validation images, read as in an evaluation."""
    with torch.no_grad():
        return [one for batch in trained.data.loader("valid").batches() for one in trained.task.predict(trained.model, batch)]


def run(tool, *argv):
    return run_tool(lambda: tool([str(word) for word in argv]))


def figure_of(monkeypatch, *argv):
    drawn = []
    monkeypatch.setattr("engine.plots.style.save_figure", lambda figure, path: drawn.append(figure))
    assert run(visualize, *argv) == 0
    return drawn[0]


def images_of(figure, rows, columns):
    """Return the images of a figure, those of a row one after the other."""
    return np.array(figure.axes[0].images, dtype=object).reshape(rows, columns)


def pixels(image):
    """Return the pixels of an image of a figure, H W 3."""
    return np.asarray(image.get_array())


def boxes_on(image):
    """Return the boxes that lie on an image of a figure, in its pixels."""
    boxes = [patch for patch in image.axes.patches if isinstance(patch, Rectangle)]
    left, right, bottom, top = image.get_extent()
    height, width = pixels(image).shape[:2]
    corners = np.array([((p.get_data_transform() - image.axes.transData).transform(p.get_bbox())).flatten() for p in boxes])
    corners = corners.reshape(-1, 4)
    x, y = (corners[:, ::2] - left) / (right - left) * width, (top - corners[:, 1::2]) / (top - bottom) * height
    on = ((x > -1) & (x < width + 1)).all(1) & ((y > -1) & (y < height + 1)).all(1)
    return np.stack([x, y], 2)[on].reshape(-1, 4)


def test_predict_writes_the_predictions_of_an_evaluation(trained, photos, tmp_path, capsys):
    into = tmp_path / ("masks" if trained.config.task == "segmentation" else "boxes.json")
    assert run(predict, trained.run_dir, photos, "-o", into, "--batch_size", 5) == 0
    assert f"wrote {into}" in capsys.readouterr().out
    if trained.config.task == "segmentation":
        for i, mask in enumerate(predictions_of(trained)):
            written = Image.open(into / (f"more/{i:02d}.png" if i > 8 else f"{i:02d}.png"))
            assert np.array_equal(np.array(written), mask.numpy())
            assert written.getpalette()[:9] == palette(256)[:3].flatten().tolist()
        assert json.loads((into / "classes.json").read_text()) == list(trained.classes)
        return
    found = COCO(str(into))
    assert [category["name"] for category in found.loadCats(found.getCatIds())] == list(trained.classes[1:])
    images = found.loadImgs(found.getImgIds())
    assert [image["file_name"].rpartition("/")[2] for image in images] == [f"{i:02d}.png" for i in range(12)]
    assert {(image["width"], image["height"]) for image in images} == {(32, 32)}
    for image, boxes in zip(images, predictions_of(trained), strict=True):
        annotations = found.loadAnns(found.getAnnIds(image["id"]))
        assert [one["category_id"] for one in annotations] == boxes["labels"].tolist()
        assert [one["score"] for one in annotations] == pytest.approx(boxes["scores"].tolist(), abs=1e-5)
        corners = np.array([one["bbox"] for one in annotations]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        np.testing.assert_allclose(corners, boxes["boxes"].numpy(), atol=1e-3)
    assert sum(len(boxes["labels"]) for boxes in predictions_of(trained)) > 0


def test_boxes_have_the_category_ids_of_the_annotations_that_the_model_was_trained_on(tmp_path, capsys):
    data = write_coco(tmp_path / "data", category_ids=(7, 0))
    options = ("--task", "detection", "--data.name", "cocojson", "--data.dataroot", data, "--data.img_size", 32)
    model = ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--detection.width", 64)
    length = ("--train.n_steps", 1, "--train.batch_size", 2, "--dataloader.num_workers", 0, "--detection.score_threshold", 0)
    assert run_main("-e", tmp_path / "run", *SMALL, *options, *model, *length) == 0
    assert "the classes 1 to 2 are in their order" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["background", "blue", "red"]
    assert json.loads((tmp_path / "run" / "category_ids.json").read_text()) == [None, 0, 7]
    into = tmp_path / "boxes.json"
    assert run(predict, tmp_path / "run", data / "val", "-o", into) == 0
    content = json.loads(into.read_text())
    assert content["categories"] == [{"id": 0, "name": "blue"}, {"id": 7, "name": "red"}]
    assert {one["category_id"] for one in content["annotations"]} <= {0, 7}
    assert content["annotations"]
    (tmp_path / "run" / "category_ids.json").write_text("[0, 7]")
    assert run(predict, tmp_path / "run", data / "val", "-o", into) == 1
    assert "category_ids.json: it is not a list of 3 whole numbers" in capsys.readouterr().err


def test_predictions_have_the_size_of_the_image(trained, tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("wide.jpg", (40, 90)), ("high.png", (75, 20))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    into = tmp_path / "out"
    assert run(predict, trained.run_dir, tmp_path / "wide.jpg", tmp_path / "high.png", "-o", into) == 0
    if trained.config.task == "segmentation":
        assert [Image.open(into / f"{name}.png").size for name in ("wide", "high")] == [(90, 40), (20, 75)]
        assert run(visualize, "predictions", trained.run_dir, tmp_path / "wide.jpg", "-o", tmp_path / "x.png") == 0
        return
    content = json.loads(into.read_text())
    assert [(image["width"], image["height"]) for image in content["images"]] == [(90, 40), (20, 75)]
    for box in content["annotations"]:
        image = content["images"][box["image_id"] - 1]
        left, top, width, height = box["bbox"]
        assert 0 <= left <= left + width <= image["width"] + 1e-3
        assert 0 <= top <= top + height <= image["height"] + 1e-3


def test_an_unreadable_image_is_named_and_the_others_are_predicted(trained, photos, tmp_path, capsys):
    (photos / "00.png").write_bytes(b"no picture")
    assert run(predict, trained.run_dir, photos, "-o", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert str(photos / "00.png") in err
    assert "1 of 12 images can't be read" in err
    n = len(list((tmp_path / "out").rglob("*.png"))) if trained.config.task == "segmentation" else None
    assert n == 11 or len(json.loads((tmp_path / "out").read_text())["images"]) == 11


def test_predictions_show_targets_and_predictions(trained, monkeypatch):
    figure = figure_of(monkeypatch, "predictions", trained.run_dir, "--samples", 3, 7)
    n_rows = 3 if trained.config.task == "segmentation" else 2  # image, mask, predicted; objects, found
    drawn = images_of(figure, n_rows, 2)
    images, labels = (getattr(trained.data.splits["valid"], name)[[3, 7]] for name in ("images", "labels"))
    found = [predictions_of(trained)[i] for i in (3, 7)]
    if trained.config.task == "segmentation":
        for i in range(2):
            picture = images[i].float() / 255
            blended = (blend_mask(picture, mask, len(trained.classes)) for mask in (labels[i], found[i]))
            for j, expected_image in enumerate((picture, *blended)):
                np.testing.assert_allclose(pixels(drawn[j, i]), expected_image.permute(1, 2, 0), atol=1e-5)
        return
    for i in range(2):
        true = labels[i][labels[i][:, 4] > 0][:, :4].tolist()
        for j, boxes in enumerate((true, found[i]["boxes"].tolist())):
            np.testing.assert_allclose(boxes_on(drawn[j, i]), np.reshape(boxes, (-1, 4)), atol=1e-3)


def test_data_shows_the_batch_of_an_update(trained, monkeypatch):
    """Before and after augmentation, with masks or boxes."""
    config, task = trained.config, trained.config.task
    figure = figure_of(monkeypatch, "data", trained.run_dir, "--step", 2, "--n", 3, "--augment.hflip", "true")
    rows = 4 if task == "segmentation" else 2
    drawn, names = images_of(figure, rows, 3), ["original", "augmented"]
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text() in names] == names
    batch = _batch_of(config, step=2)
    for i in range(3):
        own = batch[0][i]
        picture = own if task == "detection" else trained.normalize.undo(own)[0] if own.ndim == 4 else trained.normalize.undo(own)
        np.testing.assert_allclose(pixels(drawn[rows // 2, i]), picture.permute(1, 2, 0), atol=1e-5)
        if task == "segmentation":
            np.testing.assert_allclose(pixels(drawn[3, i]), blend_mask(picture, batch[1][i], 11).permute(1, 2, 0), atol=1e-5)
        else:
            np.testing.assert_allclose(boxes_on(drawn[1, i]), batch[1][i]["boxes"], atol=1e-3)
            assert len(batch[1][i]["boxes"]) > 0


def _batch_of(config, step):
    from engine import load_config
    from engine.build import build
    from engine.devices.accelerator import make_accelerator

    options = [
        str(word) for word in (*SMALL, *OPTIONS, "--task", config.task, *TASK_OPTIONS[config.task], "--augment.hflip", "true")
    ]
    config = load_config(None, options)
    run = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    return next(run.train_loader.batches(step, step + 1))


@pytest.mark.parametrize("what", ["confusion", "calibration", "gradcam", "embeddings", "features"])
def test_a_picture_of_classes_refuses_a_segmentation_run(runs, capsys, what):
    capsys.readouterr()
    assert run(visualize, what, runs / "segmentation") == 2
    assert capsys.readouterr().err == f"error: {what}: only for classification, and task is segmentation\n"


@pytest.mark.parametrize(
    ("task", "argv", "expected"),
    [
        ("segmentation", (), "give it with -o FOLDER"),
        ("segmentation", ("--json", "-o", "masks"), "give it with -o FOLDER"),
        ("detection", ("--top_k", 3), "--top_k 3"),
    ],
)
def test_options_of_other_tasks_are_refused(runs, tmp_path, capsys, task, argv, expected):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    capsys.readouterr()
    assert run(predict, runs / task, tmp_path / "image.png", *argv) == 2
    assert expected in capsys.readouterr().err


def test_compare_shows_the_metric_of_each_task(runs, tmp_path):
    assert run(compare, runs / "segmentation", runs / "detection", "--csv", tmp_path / "runs.csv") == 0
    printed = (tmp_path / "runs.csv").read_text()
    for task, metric in (("segmentation", "mIoU"), ("detection", "mAP")):
        line = next(line for line in printed.splitlines() if metric in line.split(","))
        assert str(results(runs / task)["best"][f"valid/{metric}"]) in line.split(",")


@pytest.mark.parametrize("task", TASK_OPTIONS)
def test_a_classification_run_initializes_the_backbone(tmp_path, task):
    """After an update with a tiny learning rate, the weights are those of the classifier."""
    classes = ("-c", "configs/resnet18_shapes.yaml", "--model.layers", "[1,1,1,1]", *OPTIONS[2:8], "--train.n_steps", 2)
    assert run_main("-e", tmp_path / "classes", *SMALL, *classes, "--train.batch_size", 8) == 0
    argv = (*SMALL, *OPTIONS, "--task", task, *TASK_OPTIONS[task], "--model.pretrained", tmp_path / "classes")
    argv += ("--train.n_steps", 1, "--train.eval_freq", 1, "--train.optim.lr", 1e-30, "--train.optim.weight_decay", 0)
    assert run_main("-e", tmp_path / "run", *argv) == 0
    classifier, network = weights(tmp_path / "classes", "best"), weights(tmp_path / "run")
    prefix = "backbone.body." if task == "detection" else "backbone."
    learned = [name for name in classifier if "running" not in name and "num_batches" not in name and not name.startswith("fc.")]
    assert len(learned) > 20
    for name in learned:
        assert torch.equal(network[prefix + name], classifier[name]), name

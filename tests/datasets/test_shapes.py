"""The guarantees of the generated shapes for classification, detection and segmentation."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from datasets import Source, find_dataset, shapes
from datasets.shapes import CLASSES, Canvas, signed_distance
from engine import load_config
from engine.build import load_data
from tests.generated_shapes import generate
from tests.running import ROOT, run_main

FIELDS = ("images", "labels", "boxes", "masks")


def load(seed=1, img_size=None, **options):
    return find_dataset("shapes").load(Source(None, seed=seed, img_size=img_size), **options)


@pytest.fixture(scope="module")
def plain():
    """4,000 images with one fully visible object."""
    return generate(5, torch.arange(4000), size=64, difficulty=0)


@pytest.fixture(scope="module")
def crowded():
    return generate(6, torch.arange(400), size=48, difficulty=0.7, max_objects=5)


@pytest.mark.parametrize("chunk", [1, 5000, 1 << 18])
def test_an_image_depends_on_seed_and_index_but_not_on_order_or_batches(chunk, monkeypatch):
    whole = generate(1, torch.arange(60), size=33, max_objects=3)
    monkeypatch.setattr(shapes, "CHUNK", chunk)
    indices = torch.tensor([59, 3, 17, 4, 0, 17])
    some = generate(1, indices, size=33, max_objects=3)
    for field in FIELDS:
        assert torch.equal(getattr(some, field), getattr(whole, field)[indices]), field


def test_a_larger_split_begins_with_the_same_images():
    few, many = load(n_train=50, n_test=20), load(n_train=700, n_test=300)
    assert torch.equal(few.train.images, many.train.images[:50])
    assert torch.equal(few.train.labels, many.train.labels[:50])
    assert torch.equal(few.test.images, many.test.images[:20])


def test_no_image_occurs_twice_in_the_training_and_test_data_of_two_seeds():
    loaded = [load(seed, n_train=300, n_test=300) for seed in (1, 2)]
    rows = torch.cat([split.images for both in loaded for split in (both.train, both.test)]).flatten(1)
    assert len(rows.unique(dim=0)) == 1200


def test_a_split_holds_the_images_and_labels_of_generate():
    train = load(7, n_train=40, n_test=1, size=24, difficulty=0.3).train
    same = generate(shapes.derive(7, shapes.SHAPES, shapes.TRAIN), torch.arange(40), size=24, difficulty=0.3)
    assert torch.equal(train.images, same.images)
    assert torch.equal(train.labels, same.labels[:, 0])


def test_a_box_encloses_its_mask_exactly(crowded):
    n_objects = 0
    for label, box, mask in zip(crowded.labels.flatten(), crowded.boxes.view(-1, 4), crowded.masks.flatten(0, 1), strict=True):
        rows, columns = np.nonzero(mask.numpy())
        if label < 0:
            assert len(rows) == 0
            assert box.tolist() == [0, 0, 0, 0]
        else:
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            n_objects += 1
    assert 600 < n_objects < 1900


def test_the_first_object_always_exists_and_every_number_of_objects_occurs(crowded):
    assert (crowded.labels[:, 0] >= 0).all()
    counts = (crowded.labels >= 0).sum(1).bincount(minlength=6)
    assert len(counts) == 6
    assert counts[1] > 60  # a fifth of the images should have one object
    assert counts[5] > 10  # in some of the fifth that should have five, an object would hide another
    assert set(crowded.labels.unique().tolist()) == {-1, *range(10)}


def test_masks_of_one_image_never_overlap_and_some_objects_touch(crowded):
    assert crowded.masks.sum(1).max() == 1
    boxes = crowded.boxes[(crowded.labels[:, :2] >= 0).all(1), :2]
    (first, second) = boxes.unbind(1)
    overlap = (torch.minimum(first[:, 2:], second[:, 2:]) > torch.maximum(first[:, :2], second[:, :2])).all(1)
    assert overlap.any()


def test_a_figure_that_would_hide_too_much_of_an_object_is_not_painted():
    object_mask, cover, corner = torch.zeros(3, 2, 8, 8)
    object_mask[:, :, :4] = 1
    cover[:] = 1
    corner[:, 0, 0] = 1
    yes = torch.ones(2, dtype=torch.bool)
    canvas = Canvas(torch.zeros(2, 3, 8, 8), [], [])
    canvas.paint_object(object_mask, torch.ones(2, 3, 1, 1), yes)
    canvas.paint(cover, torch.full((2, 3, 1, 1), 0.5), yes)
    assert torch.equal(canvas.images, object_mask.unsqueeze(1).expand(-1, 3, -1, -1))
    canvas.paint(corner, torch.full((2, 3, 1, 1), 0.5), torch.tensor([True, False]))
    assert canvas.images[:, 0, 0, 0].tolist() == [0.5, 1.0]
    assert canvas.masks[0].sum((1, 2)).tolist() == [31, 32]


def test_an_image_shows_its_objects_where_the_masks_are(plain):
    """Without difficulty an image has two colors: one inside the mask, one outside, and mixtures along the edge."""
    for image, mask in zip(plain.images[:200].float(), plain.masks[:200, 0], strict=True):
        inside, outside = image[:, mask], image[:, ~mask]
        middle_inside, middle_outside = inside.median(1).values, outside.median(1).values
        mixtures = (image != middle_inside.view(3, 1, 1)).any(0) & (image != middle_outside.view(3, 1, 1)).any(0)
        edge = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
        assert 0.4 < mixtures.sum() / edge < 1.2
        nearer_inside = (image - middle_inside.view(3, 1, 1)).abs().sum(0) < (image - middle_outside.view(3, 1, 1)).abs().sum(0)
        assert (nearer_inside ^ mask).float().mean() < 0.02


def test_every_class_and_every_label_occurs_equally_often(plain):
    counts = plain.labels[:, 0].bincount().double()
    assert len(counts) == len(CLASSES) == 10
    assert ((counts - 400) ** 2 / 400).sum() < 34  # chi squared, 9 degrees of freedom: 99.99 %


def test_objects_are_anywhere_in_the_image_and_completely_inside(plain):
    left, top, right, bottom = plain.boxes[:, 0].T
    assert left.min() == top.min() == 0
    assert right.max() == bottom.max() == 64
    # a shape cut off by the image would have long lines on its border
    on_edge = plain.masks[:, 0, [0, -1]].sum(-1).amax(1), plain.masks[:, 0, :, [0, -1]].sum(1).amax(1)
    assert torch.cat(on_edge).max() < 20
    x = (left + right).double() / 128
    assert abs(x.mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([x, (top + bottom).double() / 128]))[0, 1]) < 0.06


def test_sizes_and_stretches_cover_their_range(plain):
    discs = plain.masks[plain.labels[:, 0] == CLASSES.index("disc"), 0]
    longest, shortest = zip(*(_axes(disc) for disc in discs), strict=True)
    longest, stretch = np.array(longest) / 64, np.array(shortest) / np.array(longest)
    assert 0.68 < longest.min() < 0.72
    assert 0.83 < longest.max() < 0.87
    assert abs(longest.mean() - 0.775) < 0.02
    assert 0.67 < stretch.min() < 0.74
    assert 0.96 < stretch.max() < 1.01
    hard = generate(5, torch.arange(2000), size=64, difficulty=1)
    assert (hard.boxes[:, 0, 2] - hard.boxes[:, 0, 0]).min() < 0.3 * 64


def test_every_direction_occurs_equally_often(plain):
    arrows = plain.masks[plain.labels[:, 0] == CLASSES.index("arrow"), 0]
    directions = torch.tensor([np.angle(_third_moment(arrow)) for arrow in arrows])
    counts = torch.histc(directions, 8, -math.pi, math.pi)
    expected = len(arrows) / 8
    assert ((counts - expected) ** 2 / expected).sum() < 30  # chi squared, 7 degrees of freedom: 99.99 %


def test_the_classes_are_distinguishable_by_their_masks(plain):
    from sklearn.neighbors import KNeighborsClassifier

    features = np.stack([_shape_features(mask) for mask in plain.masks[:, 0]])
    labels = plain.labels[:, 0].numpy()
    classifier = KNeighborsClassifier(5).fit(features[1000:], labels[1000:])
    hits = classifier.predict(features[:1000]) == labels[:1000]
    assert min(hits[labels[:1000] == c].mean() for c in range(10)) > 0.95


def test_an_object_differs_from_what_is_behind_it_in_some_channel():
    some = generate(8, torch.arange(1000), size=32)
    images, mask = some.images.float() / 255, some.masks[:, :1].float()
    inside = (images * mask).sum((2, 3)) / mask.sum((2, 3))
    outside = (images * (1 - mask)).sum((2, 3)) / (1 - mask).sum((2, 3))
    assert (inside - outside).abs().amax(1).quantile(0.02) > 0.15


def test_color_is_independent_of_the_class():
    some = generate(9, torch.arange(5000), size=16)
    colors, labels = some.images.float().mean((2, 3)), some.labels[:, 0]
    per_class = torch.stack([colors[labels == c].mean(0) for c in range(10)])
    assert (per_class - colors.mean(0)).abs().max() < 4 * 45 / math.sqrt(500)


def test_images_are_colorful():
    pixels = generate(10, torch.arange(500), size=32).images.float()
    saturation = 1 - pixels.amin(1) / pixels.amax(1).clamp(min=1)
    assert saturation.mean() > 0.4
    hues = torch.bincount(pixels.mean((2, 3)).argmax(1), minlength=3)
    assert hues.min() > 120


def test_difficulty_adds_noise():
    def between_neighbors(difficulty):
        images = generate(11, torch.arange(300), size=32, difficulty=difficulty).images.float()
        return (images[..., 1:] - images[..., :-1]).abs().median()

    assert between_neighbors(0) == 0
    assert between_neighbors(0.25) > 5
    assert between_neighbors(0.5) > 12
    assert between_neighbors(1) > 20


def test_difficulty_lights_an_image_from_one_side():
    def between_halves(difficulty):
        images = generate(11, torch.arange(300), size=32, difficulty=difficulty).images.float()
        return (images[..., :16].mean((1, 2, 3)) - images[..., 16:].mean((1, 2, 3))).std()

    assert between_halves(1) > 2 * between_halves(0)


def test_objects_and_background_have_textures_one_in_six_of_them_plain(monkeypatch):
    for other in ("_add_noise", "_light", "_paint_clutter"):
        monkeypatch.setattr(shapes, other, lambda *of_no_effect: None)
    some = generate(13, torch.arange(600), size=32)
    for side in (some.masks, ~some.masks):
        inside = -torch.nn.functional.max_pool2d(-side.float(), 3, 1, 1) == 1  # away from the edge, where colors mix
        spread = torch.where(inside, some.images, 0).amax((2, 3)) > torch.where(inside, some.images, 255).amin((2, 3))
        assert 0.75 < spread.any(1).float().mean() < 0.9


def test_clutter_lies_behind_the_objects_and_hides_less_than_a_third_of_them(monkeypatch):
    def some(difficulty=0.5):
        return generate(11, torch.arange(400), size=32, difficulty=difficulty)

    both, none = some(), some(difficulty=0)
    monkeypatch.setattr(shapes, "N_IN_FRONT", 0)
    behind = some()
    seen = both.masks.sum((1, 2, 3)) / behind.masks.sum((1, 2, 3))
    assert (behind.masks | ~both.masks).all()
    assert 0.7 <= seen.min() < 0.8
    assert 0.3 < (seen < 1).float().mean() < 0.8
    monkeypatch.setattr(shapes, "N_BEHIND", 0)
    bare = some()
    assert 0.7 < (bare.images != behind.images).flatten(1).any(1).float().mean() < 0.95
    assert torch.equal(bare.masks, behind.masks)
    assert torch.equal(none.images, some(difficulty=0).images)


@pytest.mark.parametrize("size", [16, 50, 100, 224])
def test_an_image_shows_the_same_scene_at_every_size(size):
    indices = torch.arange(20)
    small, other = generate(12, indices, size=32), generate(12, indices, size=size)
    assert other.images.shape == (20, 3, size, size)
    assert torch.equal(small.labels, other.labels)
    assert torch.allclose(small.boxes / 32, other.boxes / size, atol=1.6 / min(size, 32))


def test_the_statistics_are_those_of_the_data():
    spec, train = find_dataset("shapes"), load(n_train=2000, n_test=1).train
    images = train.images.double() / 255
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor(spec.mean).double(), atol=0.02)
    assert torch.allclose(images.transpose(0, 1).flatten(1).std(1), torch.tensor(spec.std).double(), atol=0.02)


def test_images_are_generated_at_the_model_input_size_by_default():
    counts = {"n_train": 2, "n_test": 2}
    assert load(**counts).train.images.shape[-2:] == (32, 32)
    assert load(img_size=48, **counts).train.images.shape[-2:] == (48, 48)
    assert load(img_size=48, size=20, **counts).train.images.shape[-2:] == (20, 20)


def test_data_img_size_is_the_generated_size_and_the_model_input_size():
    options = {"data.img_size": 40, "data.n_train": 4, "data.n_test": 4}
    for more, generated in (({}, 40), ({"data.size": 20}, 20)):
        data = load_data(load_config(ROOT / "configs" / "lenet_shapes.yaml", options | more), Accelerator(cpu=True))
        assert data.splits["train"].images.shape[-1] == generated
        batch, _ = next(iter(data.loader("valid").batches()))
        assert batch.shape == (4, 3, 40, 40)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.size", 8], "images of 16x16 and more; the size is 8"),
        (["--data.size", 0], "the size is 0"),
        (["--data.img_size", 12], "the size is 12"),
        (["--data.difficulty", 1.5], "difficulty is 1.5; it can be 0 to 1"),
        (["--data.n_train", 0], "n_train and n_test are 0 and 4000"),
        (["--data.n_test", -1], "must be at least 1"),
        (["--data.n_train", "many"], "data.n_train: expected"),
        (["--data.dificulty", 0.1], "did you mean data.difficulty"),
        (["--data.n_classes", 11], "which has 10 classes"),
    ],
)
def test_an_invalid_option_ends_with_one_line(options, expected, tmp_path, capsys):
    assert run_main("-c", ROOT / "configs" / "lenet_shapes.yaml", "-e", tmp_path / "run", *options) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"), [({"max_objects": 0}, "max_objects is 0"), ({"max_objects": 9}, "48x48 and more with 9")]
)
def test_more_objects_than_fit_into_an_image_are_an_error(options, expected):
    with pytest.raises(ValueError, match=expected):
        generate(1, torch.arange(2), size=32, **options)


def test_a_signed_distance_is_measured_to_the_nearest_edge_and_a_hole_is_outside():
    square = torch.tensor([(2.0, 2.0), (-2.0, 2.0), (-2.0, -2.0), (2.0, -2.0)])
    points = torch.tensor([(0.0, 0.0), (1.5, 0.3), (3.0, 0.0), (5.0, 6.0), (-2.0, 1.0)])
    assert torch.allclose(signed_distance([square], points), torch.tensor([2.0, 0.5, -1.0, -5.0, 0.0]))
    assert torch.allclose(signed_distance([square, square / 2], points[:2]), torch.tensor([-1.0, 0.5]))


def _axes(mask):
    """The longest and the shortest diameter of an ellipse."""
    y, x = np.nonzero(mask.numpy())
    shortest, longest = 4 * np.sqrt(np.linalg.eigvalsh(np.cov(np.stack([x, y]))))
    return longest, shortest


def _third_moment(mask):
    y, x = np.nonzero(mask.numpy())
    z = (x - x.mean()) + 1j * (y - y.mean())
    return (abs(z) ** 2 * z).sum()


def _shape_features(mask):
    """Features that are invariant to moving, turning, scaling and stretching: after whitening, the histogram of the pixels' radii
    and the strength of 1- to 6-fold symmetry around the center."""
    y, x = np.nonzero(mask.numpy())
    places = np.stack([x, y]).astype(float)
    places -= places.mean(1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(places))
    u, v = (vectors / np.sqrt(values)).T @ places
    z = u + 1j * v
    radii = np.histogram(abs(z), bins=8, range=(0, 2.8))[0] / len(z)
    repeats = [abs(np.mean(abs(z) ** 3 * np.exp(1j * m * np.angle(z)))) for m in range(1, 7)]
    return np.concatenate([2 * radii, repeats])

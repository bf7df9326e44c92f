import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from datasets.pipeline.augment import AUGMENT, JITTER, ColorJitter, CropAndFlip, Cutout, Normalize
from datasets.pipeline.counters import below, draws

N = 500


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (N, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize(("padding", "padding_mode"), [(4, "constant"), (4, "reflect"), (0, "constant")])
def test_pixels_equal_torchvisions_crop_and_flip_for_the_same_parameters(images, padding, padding_mode, hflip):
    seed, epoch, samples = 3, 5, torch.randperm(N)[:200]
    ours = CropAndFlip(images, padding=padding, padding_mode=padding_mode, hflip=hflip, seed=seed)(epoch, samples)
    vertical, horizontal, mirrored = draws(seed ^ AUGMENT, epoch, samples, 3)
    for i, sample in enumerate(samples):
        padded = v2.pad(images[sample], [padding] * 4, padding_mode=padding_mode)
        y, x = (int(below(bits[i], 2 * padding + 1)) for bits in (vertical, horizontal))
        crop = v2.crop(padded, y, x, 16, 12)
        assert torch.equal(ours[i], v2.horizontal_flip(crop) if hflip and below(mirrored[i], 2) else crop)


def test_every_offset_and_both_sides_occur_with_the_right_frequency():
    position = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(9000, 1, 1, 1)
    cut = CropAndFlip(position, padding=1, padding_mode="constant", hflip=True, seed=1)(0, torch.arange(9000))
    center = cut[:, 0, 3:5, 3:5].flatten(1)  # four pixels that identify the crop and its flip
    kinds, counts = center.unique(dim=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    assert ((counts - 500.0) ** 2 / 500).sum() < 50  # chi squared, 17 degrees of freedom


def test_the_augmentation_of_a_sample_depends_on_seed_and_epoch_not_on_its_batch(images):
    cut = CropAndFlip(images, padding=4, padding_mode="constant", hflip=True, seed=3)
    together = cut(2, torch.tensor([7, 8, 9]))
    assert torch.equal(together[1:2], cut(2, torch.tensor([8])))
    assert not torch.equal(together, cut(3, torch.tensor([7, 8, 9])))


def test_without_padding_and_flip_nothing_changes(images):
    cut = CropAndFlip(images, padding=0, padding_mode="constant", hflip=False, seed=3)
    assert torch.equal(cut(1, torch.arange(N)), images)


@pytest.mark.parametrize("padding", [4, 0])
def test_the_images_are_stored_once(images, padding):
    cut = CropAndFlip(images, padding=padding, padding_mode="constant", hflip=True, seed=3)
    assert torch.equal(cut.unpadded, images)
    assert cut.unpadded.untyped_storage().data_ptr() == cut.memory.untyped_storage().data_ptr()


def test_normalization_equals_torchvisions(images):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    square = images[:, :, :12, :12].contiguous()
    ours = Normalize(mean, std, 12, "cpu")(square)
    theirs = v2.normalize(v2.to_dtype(square, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_another_size_is_reached_with_antialias(images):
    ours = Normalize((0.0,) * 3, (1.0,) * 3, 7, "cpu")(images)
    theirs = v2.resize(images.float(), [7, 7], antialias=True) / 255
    torch.testing.assert_close(ours, theirs)


def test_undo_inverts_normalization(images):
    square = images[:, :, :12, :12]
    normalize = Normalize((0.5,) * 3, (0.25,) * 3, 12, "cpu")
    torch.testing.assert_close(normalize.undo(normalize(square)) * 255, square.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("padding", [0, 2])
def test_alternating_flips_show_both_sides_of_every_image_in_two_epochs(images, padding, monkeypatch):
    monkeypatch.setattr(
        "datasets.pipeline.augment.below", lambda bits, n: below(bits, n) if n == 2 else torch.full_like(bits, padding)
    )
    cut = CropAndFlip(images, padding=padding, padding_mode="constant", hflip="alternating", seed=3)
    first, second, third = (cut(epoch, torch.arange(N)) for epoch in range(3))
    assert torch.equal(second, first.flip(-1))
    assert torch.equal(third, first)
    n_mirrored = int((first == images.flip(-1)).flatten(1).all(1).sum())
    assert 200 < n_mirrored < 300


def test_cutout_clears_one_square_of_each_image_anywhere():
    ones = torch.ones(4000, 2, 12, 12)
    cleared = Cutout(5, seed=1)(2, torch.arange(4000), ones.clone())
    assert torch.equal(cleared[:, 0], cleared[:, 1])
    rows = (cleared[:, 0] == 0).any(2).sum(1)
    columns = (cleared[:, 0] == 0).any(1).sum(1)
    assert torch.equal((cleared[:, 0] == 0).flatten(1).sum(1), rows * columns)  # a rectangle
    assert rows.min() == 3  # a center at the edge
    assert rows.max() == columns.max() == 5
    frequency = (cleared[:, 0] == 0).float().mean(0)
    assert frequency[6, 6].item() == pytest.approx(25 / 144, abs=0.03)
    assert torch.equal(cleared[7:8], Cutout(5, seed=1)(2, torch.tensor([7]), ones[:1].clone()))


@pytest.mark.parametrize("channels", [3, 1])
def test_color_jitter_equals_torchvisions_for_the_same_factors(images, channels):
    seed, epoch, samples, strength = 3, 5, torch.randperm(N)[:100], 0.4
    pixels = images[samples, :channels]
    ours = ColorJitter(strength, seed)(epoch, samples, pixels)
    factors = 1 + strength * (2 * draws(seed ^ JITTER, epoch, samples, 3).double() / 2**31 - 1)
    assert factors.min() < 0.65
    assert factors.max() > 1.35
    for image, jittered, (brightness, contrast, saturation) in zip(pixels, ours, factors.T.tolist(), strict=True):
        theirs = v2.adjust_brightness(image / 255, brightness)
        theirs = v2.adjust_saturation(v2.adjust_contrast(theirs, contrast), saturation)
        torch.testing.assert_close(jittered / 255, theirs, rtol=0, atol=1e-4)


def test_color_jitter_is_a_function_of_seed_epoch_and_sample(images):
    jitter = ColorJitter(0.4, seed=3)
    together = jitter(2, torch.tensor([7, 8, 9]), images[7:10])
    torch.testing.assert_close(together[1:2], jitter(2, torch.tensor([8]), images[8:9]), rtol=0, atol=1e-3)  # of 255
    assert (together - jitter(3, torch.tensor([7, 8, 9]), images[7:10])).abs().mean() > 1


def test_a_sample_drawn_twice_in_an_epoch_gets_another_crop_each_time():
    images = torch.arange(12 * 64).view(12, 1, 8, 8).remainder(251).to(torch.uint8)
    cut = CropAndFlip(images, padding=4, padding_mode="constant", hflip=True, seed=3)
    samples = torch.tensor([5, 5, 7])
    first, second, other = cut(1, samples, torch.tensor([5, 5 + 12, 7]))
    assert torch.equal(torch.stack([first, other]), cut(1, torch.tensor([5, 7])))
    assert not torch.equal(first, second)

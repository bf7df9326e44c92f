import numpy as np
import pytest
import torch

from datasets.pipeline.mixing import Mixing

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def mixing(**options):
    return Mixing(**{"n_classes": 4, "mixup": 0.0, "cutmix": 0.0, "switch_prob": 0.5, "prob": 1.0, "seed": 1, **options})


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_labels_are_mixed_in_the_proportion_of_the_pixels(options):
    for step in range(50):
        images, targets = mixing(**options)(step, (IMAGES, LABELS))
        assert torch.allclose(targets.sum(1), torch.ones(8))
        share = _share_of_the_image_itself(images)
        own = torch.nn.functional.one_hot(LABELS, 4).float()
        torch.testing.assert_close(targets, share * own + (1 - share) * own.flip(0), atol=1e-4, rtol=0)


def _share_of_the_image_itself(mixed):
    """By least squares: mixed = share * image + (1 - share) * partner, pixel by pixel on average."""
    difference = IMAGES - IMAGES.flip(0)
    return float(((mixed - IMAGES.flip(0)) * difference).sum() / (difference**2).sum()) if _blended(mixed) else _kept(mixed)


def _blended(mixed):
    return not bool(((mixed == IMAGES) | (mixed == IMAGES.flip(0))).all())


def _kept(mixed):
    return float((mixed == IMAGES).all(1).float().mean())


def test_the_proportion_follows_its_beta_distribution():
    def blended(alpha):
        shares = []
        for step in range(2000):
            _, targets = mixing(mixup=alpha)(step, (IMAGES[:2, :, :1, :1], torch.tensor([0, 1])))
            shares.append(float(targets[0, 0]))
        return np.array(shares)

    for alpha in (0.2, 1.0):
        shares = blended(alpha)
        assert shares.mean() == pytest.approx(0.5, abs=0.03)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)  # of Beta(alpha, alpha)


def test_switch_prob_and_prob_are_respected():
    kinds = []
    for step in range(600):
        images, targets = mixing(mixup=1.0, cutmix=1.0, switch_prob=0.25, prob=0.6)(step, (IMAGES, LABELS))
        kinds.append(
            "none"
            if torch.equal(images, IMAGES) and targets.max(1).values.eq(1).all()
            else "mixup"
            if _blended(images)
            else "cutmix"
        )
    counts = {kind: kinds.count(kind) / 600 for kind in ("none", "mixup", "cutmix")}
    assert counts["mixup"] == pytest.approx(0.6 * 0.75, abs=0.06)
    assert counts["cutmix"] == pytest.approx(0.6 * 0.25, abs=0.06)


def test_it_is_a_function_of_seed_and_step():
    a, b = mixing(mixup=0.8)(3, (IMAGES, LABELS)), mixing(mixup=0.8)(3, (IMAGES, LABELS))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], mixing(mixup=0.8)(4, (IMAGES, LABELS))[0])
    assert not torch.equal(a[0], mixing(mixup=0.8, seed=2)(3, (IMAGES, LABELS))[0])

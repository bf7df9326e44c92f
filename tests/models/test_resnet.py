import pytest
import timm
import torch
import torchvision

from models import create_model
from tests.models.reference import assert_loads_and_agrees


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_torchvision_weights_load_and_give_the_same_logits(name):
    assert_loads_and_agrees(create_model(name), torchvision.models.get_model(name), img_size=64)


def test_the_stride_of_a_bottleneck_is_on_its_3x3():
    model = create_model("resnet50")
    assert model.layer2[0].conv1.stride == (1, 1)
    assert model.layer2[0].conv2.stride == (2, 2)


def test_the_cifar_stem_keeps_the_resolution():
    stages = create_model("resnet18", first_block="cifar10").forward_stages(torch.zeros(1, 3, 32, 32))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_convolutions_are_initialized_by_fan_out():
    weight = create_model("resnet18").layer3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="first_block is 'mnist'"):
        create_model("resnet18", first_block="mnist")


def test_drop_path_skips_the_same_blocks_as_in_timm():
    theirs = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.6, zero_init_last=False).double().train()
    ours = create_model("resnet18", n_classes=5, drop_path=0.6).double().train()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)
    torch.manual_seed(4)
    assert not torch.allclose(ours(images), outputs[0])

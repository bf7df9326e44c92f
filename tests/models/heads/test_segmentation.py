import copy
from functools import partial

import pytest
import torch
import torchvision
from torch.nn import functional as F

from models import create_model
from models.heads.dilation import replace_strides
from models.heads.segmentation import Segmenter, atrous_rates, create_segmenter
from tests.models.reference import randomize

ours = partial(create_segmenter, "resnet50", n_classes=21)


def theirs(head, **options):
    return torchvision.models.get_model(f"{head}_resnet50", weights=None, weights_backbone=None, num_classes=21, **options)


@pytest.mark.parametrize("head", ["fcn", "deeplabv3"])
def test_same_weights_give_the_same_output_as_in_torchvision(head):
    reference, network = randomize(theirs(head, aux_loss=True), img_size=33), ours(head=head, aux_head=True)
    network.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 33, 49, generator=torch.Generator().manual_seed(1))  # not a multiple of any stride, and not square
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), reference.eval()(x)["out"], rtol=0, atol=1e-4)
        network, reference, x = network.double(), reference.double(), x.double()
        torch.testing.assert_close(network(x), reference(x)["out"], rtol=0, atol=1e-9)
        torch.manual_seed(2)  # for dropout
        logits, auxiliary = network.train()(x)
        torch.manual_seed(2)
        expected = reference.train()(x)
    torch.testing.assert_close(logits, expected["out"], rtol=0, atol=1e-9)
    torch.testing.assert_close(auxiliary, expected["aux"], rtol=0, atol=1e-9)


def test_without_an_auxiliary_head_the_names_match_torchvision_too():
    network = ours(head="deeplabv3")
    assert network.state_dict().keys() == theirs("deeplabv3").state_dict().keys()
    assert isinstance(network.train()(torch.zeros(2, 3, 32, 32)), torch.Tensor)


DILATED = ["resnet18", "resnet50", "preactresnet18", "mobilenet_0_25x", "timm/resnet18", "timm/regnetx_002"]


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", DILATED)
def test_the_dilated_network_equals_the_strided_one_at_the_positions_of_the_latter(name, output_stride):
    torch.manual_seed(0)
    strided = create_model(name).double().eval()
    dilated = copy.deepcopy(strided)
    replace_strides(dilated, output_stride)
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        expected, maps = (network.forward_features(x) for network in (strided, dilated))
        every = 32 // output_stride
        torch.testing.assert_close(maps[..., ::every, ::every], expected, rtol=1e-7, atol=1e-7)
    assert max(entry["reduction"] for entry in dilated.feature_info) == output_stride


@pytest.mark.parametrize(
    ("name", "output_stride", "message"),
    [
        ("vgg11", 8, "a kernel of 2 with a padding of 0 would move the map"),
        ("shufflenet_0_25x_g1", 8, "no longer be of one size"),
        ("vit_tiny", 8, "output_stride 8: VisionTransformer can't be dilated"),
        ("resnet18", 12, "output_stride 12 is not a power of two"),
    ],
)
def test_a_network_that_cannot_be_dilated_is_refused(name, output_stride, message):
    with pytest.raises(ValueError, match=message):
        create_segmenter(name, n_classes=3, img_size=32, output_stride=output_stride)
    if name != "resnet18":
        assert create_segmenter(name, n_classes=3, img_size=32, output_stride=None)


def test_a_backbone_without_enough_feature_maps_is_refused():
    with pytest.raises(ValueError, match="the head hrnet reads 4 feature maps; LeNet5 has 2"):
        create_segmenter("lenet", n_classes=3, head="hrnet", img_size=32)


def test_the_network_of_the_hrnet_paper_has_its_number_of_parameters():
    with torch.device("meta"):
        network = create_segmenter("hrnet_w48", head="hrnet", n_classes=19)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 65.9  # the paper's number, for Cityscapes


def test_the_hrnet_head_reads_every_map_at_the_size_of_the_largest():
    network = create_segmenter("hrnet_w18_small", head="hrnet", n_classes=5).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = network.backbone.forward_stages(x)[1:]
        together = torch.cat([F.interpolate(m, size=(16, 24), mode="bilinear", align_corners=False) for m in maps], dim=1)
        mix, norm, act, classify = network.classifier
        expected = F.interpolate(classify(act(norm(mix(together)))), size=(64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(network(x), expected)


def test_atrous_rates_are_the_papers():
    assert (atrous_rates(16), atrous_rates(8)) == ((6, 12, 18), (12, 24, 36))


@pytest.mark.parametrize("name", ["resnet18", "timm/test_resnet", "googlenet", "efficientnet_b0"])
def test_a_gradient_reaches_every_parameter(name):
    network = create_segmenter(name, n_classes=4, output_stride=None, aux_head=True).train()
    logits, auxiliary = network(torch.randn(2, 3, 64, 64))
    assert logits.shape == auxiliary.shape == (2, 4, 64, 64)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    reference = randomize(torchvision.models.resnet18(), img_size=64)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    return reference.state_dict(), path


class TestWeights:
    def test_weights_of_a_classification_network_initialize_the_backbone(self, classifier):
        weights, path = classifier
        network = create_segmenter("resnet18", n_classes=5, pretrained=path)
        own = network.backbone.state_dict()
        assert own.keys() == {key for key in weights if not key.startswith("fc.")}
        assert all(torch.equal(value, weights[key]) for key, value in own.items())

    def test_weights_of_a_segmentation_network_initialize_all_but_a_head_for_other_classes(self, tmp_path, caplog):
        whole = create_segmenter("resnet18", n_classes=7, aux_head=True)
        torch.save({"model": whole.state_dict()}, tmp_path / "whole.pth")
        same = create_segmenter("resnet18", n_classes=7, aux_head=True, pretrained=tmp_path / "whole.pth")
        assert all(torch.equal(value, whole.state_dict()[key]) for key, value in same.state_dict().items())
        other = create_segmenter("resnet18", n_classes=3, pretrained=tmp_path / "whole.pth")
        assert torch.equal(other.backbone.conv1.weight, whole.backbone.conv1.weight)
        assert torch.equal(other.classifier[0].weight, whole.classifier[0].weight)
        assert other.classifier[4].weight.shape[0] == 3
        assert "skipped: classifier.4.weight" in caplog.text

    def test_a_first_convolution_for_other_channels_is_adapted(self, classifier):
        network = create_segmenter("resnet18", n_classes=5, in_channels=1, pretrained=classifier[1])
        torch.testing.assert_close(network.backbone.conv1.weight, classifier[0]["conv1.weight"].sum(1, keepdim=True))
        assert network.FIRST_CONV == "backbone.conv1"


def test_a_segmenter_describes_the_maps_that_its_head_reads():
    network = create_segmenter("resnet50", n_classes=3)
    assert isinstance(network, Segmenter)
    assert (network.feature_info.channels(), network.feature_info.reduction()) == ([2048], [8])

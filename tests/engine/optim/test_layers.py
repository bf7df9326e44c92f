"""Frozen parameters and their running statistics do not change by a bit; all others are trained."""

import copy
import pickle

import pytest
import torch
from torch import nn

from engine import load_config
from engine.optim.layers import freeze, stages
from engine.optim.optimizer import make_optimizer
from models import create_model

LAYERS = (1, 1, 1, 1)


def resnet(**options):
    torch.manual_seed(0)
    return create_model("resnet18", n_classes=4, in_channels=3, img_size=32, layers=LAYERS, **options)


def train(model, steps=3, forward=None):
    """Run a few updates, switching to eval mode between them as the training loop does."""
    train = load_config(None, {"train.optim.type": "AdamW"}).train
    optimizer, _ = make_optimizer(train.optim, train.base_lr, model)
    forward = model if forward is None else forward
    for _ in range(steps):
        forward.train()
        nn.functional.cross_entropy(forward(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
        forward.eval()


def changed_names(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        (["stem"], ("conv1.", "bn1.")),
        (["stage1", "stage2"], ("layer1.", "layer2.")),
        (["layer1"], ("layer1.",)),
        (["conv1*", "layer1.*"], ("conv1.", "layer1.")),
        (["layer2.0.bn1"], ("layer2.0.bn1.",)),
        (["*.weight"], None),
        (["trunk"], ("conv1.", "bn1.", "layer")),
    ],
)
def test_frozen_parameters_stay_unchanged_and_all_others_train(patterns, prefixes):
    model = resnet()
    before = snapshot(model)
    frozen = freeze(model, patterns)
    if prefixes is None:
        assert frozen == [name for name, _ in model.named_parameters() if name.endswith(".weight")]
        unchanged = set(frozen)  # a BatchNorm with a trainable bias still updates its statistics
    else:
        unchanged = {name for name in before if name.startswith(prefixes)}
        assert set(frozen) == {name for name, _ in model.named_parameters()} & unchanged
    train(model)
    assert changed_names(model, before) == before.keys() - unchanged


def test_linear_probe_trains_only_the_classifier():
    for model, head in ((resnet(), "fc"), (create_model("timm/test_vit", n_classes=4, img_size=32), "head")):
        before = snapshot(model)
        freeze(model, ["trunk"])
        assert [name for name, weight in model.named_parameters() if weight.requires_grad] == [f"{head}.weight", f"{head}.bias"]
        train(model)
        assert changed_names(model, before) == {f"{head}.weight", f"{head}.bias"}


def test_norm_without_parameters_follows_its_parent_module():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)),
    )
    freeze(model, ["0"])
    model.train()
    assert [model[0][1].training, model[1][1].training] == [False, True]


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copied_model_stays_frozen_independently(make_copy):
    model = resnet()
    freeze(model, ["stem", "layer1"])
    copied = make_copy(model)
    before = snapshot(copied)
    assert before.keys() == model.state_dict().keys() == resnet().state_dict().keys()
    train(model)
    assert not changed_names(copied, before)
    train(copied)
    assert not {name for name in changed_names(copied, before) if name.startswith(("conv1.", "bn1.", "layer1."))}


def test_compiled_model_stays_frozen():
    model = resnet()
    before = snapshot(model)
    freeze(model, ["stem", "layer1"])
    train(model, forward=torch.compile(model, backend="eager"))
    assert changed_names(model, before) == {name for name in before if not name.startswith(("conv1.", "bn1.", "layer1."))}


def test_ddp_model_stays_frozen(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = resnet()
        before = snapshot(model)
        freeze(model, ["stem", "layer1"])
        train(model, forward=nn.parallel.DistributedDataParallel(model))
        assert changed_names(model, before) == {name for name in before if not name.startswith(("conv1.", "bn1.", "layer1."))}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer9", "'layer9' matches no parameter of ResNet; did you mean layer4 or"),
        ("stage9", "did you mean stage4 or"),
        ("trnk", "did you mean trunk"),
        ("relu", "'relu' matches no parameter"),
        ("xyzzy*", "it has trunk, stem, stage1, stage2, stage3, stage4 and its modules' names"),
    ],
)
def test_pattern_without_a_match_is_an_error_with_a_suggestion(pattern, message):
    model = resnet()
    with pytest.raises(ValueError, match="matches no parameter") as caught:
        freeze(model, ["layer1", pattern])
    assert message in str(caught.value)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("patterns", [["*"], ["trunk", "fc"]])
def test_freezing_every_parameter_is_an_error(patterns):
    with pytest.raises(ValueError, match="nothing would be trained"):
        freeze(resnet(), patterns)


def test_empty_pattern_list_freezes_nothing():
    model = resnet()
    assert freeze(model, []) == []
    assert all(module.train().training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["stem", "stage1", "stage2", "stage3", "stage4"]),
        ("vgg11_bn", ["stem", "stage1", "stage2", "stage3", "stage4"]),
        ("vit_tiny", ["stem", "stage1"]),
        ("timm/convnext_atto", ["stem", "stage1", "stage2", "stage3", "stage4"]),
        ("hrnet_w18_small", ["stem"]),  # its own modules are called stage2, stage3, stage4
    ],
)
def test_stages_are_disjoint_and_cover_all_but_the_head(name, expected):
    with torch.device("meta"):
        model = create_model(name)
    found = stages(model)
    assert list(found) == expected
    names = [parameter for stage in found.values() for parameter in stage]
    assert len(names) == len(set(names))
    if len(expected) > 1 and not name.startswith("timm/"):
        left = {parameter for parameter, _ in model.named_parameters()} - set(names)
        assert left == {p for p, _ in model.named_parameters() if p.startswith(tuple(f"{head}." for head in model.HEAD))}

"""The contract of every model of this project. New families are covered automatically."""

import copy
import inspect
import re

import pytest
import torch

from engine.run.macs import count
from models import create_model, list_models, model_signature

N_CLASSES = 7
# Deeper or wider variants of a model with the same kinds of layers. They take minutes, so they run with the slow tests.
VARIANTS = re.compile(
    r"(18|34|50|101|152)(?<!resnet18)$|(32x4d|64x4d)$|vgg1[369]|shufflenet_(0_5|1|2)|shufflenet_0_25x_g[234]|_b[1-7]$"
    r"|hrnet_w(18|32|48)$|vit_(small|base|large)|mobilenet(_0_5x|_0_75x)?$"
)


def small_sizes(name: str) -> dict:
    """Return the arguments for the smallest images, and for the smallest network that still has all kinds of layers."""
    parameters = model_signature(name).parameters
    options: dict = {"img_size": 28, "in_channels": 1} if name == "lenet" else {"img_size": 64, "in_channels": 3}
    if "first_block" in parameters:
        options |= {"img_size": 32, "first_block": "cifar10"}
    if "patch_size" in parameters:
        options |= {"img_size": 32, "patch_size": 8}
    return options


def build(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, n_classes=N_CLASSES, **{**small_sizes(name), **kwargs})


def images(name: str, n: int = 2) -> torch.Tensor:
    options = small_sizes(name)
    return torch.randn(
        n, options["in_channels"], options["img_size"], options["img_size"], generator=torch.Generator().manual_seed(1)
    )


every_model = pytest.mark.parametrize("name", list_models())
every_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if VARIANTS.search(name) else name for name in list_models()]
)

each_kind = pytest.mark.parametrize("name", [name for name in list_models() if not VARIANTS.search(name)])


@every_model
def test_constructor_accepts_the_contract_arguments_and_rejects_unknown_ones(name):
    parameters = model_signature(name).parameters
    assert {"n_classes", "in_channels", "img_size"} <= parameters.keys()
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())
    if "first_block" in parameters:
        assert parameters["first_block"].default == "imagenet"
    with torch.device("meta"), pytest.raises(TypeError, match="unexpected keyword argument 'n_clases'"):
        create_model(name, n_clases=3)


@every_kind
def test_forward_returns_logits_and_backward_finite_gradients_for_every_parameter(name):
    model = build(name).train()
    outputs = model(images(name))
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(logits.shape == (2, N_CLASSES) for logits in every)
    sum(logits.logsumexp(1).sum() for logits in every).backward()
    missing = [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert not missing


@every_kind
def test_forward_is_forward_head_of_forward_features(name):
    model, x = build(name).eval(), images(name)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        embedding = model.forward_head(features, pre_logits=True)
        assert logits.shape == (2, N_CLASSES)
        assert torch.equal(model.forward_head(features), logits)
        assert embedding.shape == (2, model.num_features)


@every_kind
def test_feature_maps_match_feature_info(name):
    model, x = build(name, features_only=True).eval(), images(name)
    with torch.no_grad():
        maps = model(x)
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, *(-(-side // reduction) for side in x.shape[-2:]))
        for channels, reduction in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ] or all(
        m.shape[1] == channels and abs(m.shape[-1] - x.shape[-1] / reduction) <= 2  # without padding a map is a little smaller
        for m, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    )
    last = build(name, features_only=True, out_indices=(-1,)).eval()
    with torch.no_grad():
        assert torch.equal(last(x)[0], maps[-1])
    for entry in model.feature_info._info:
        model.backbone.get_submodule(entry["module"])
    with pytest.raises(ValueError, match="out_indices contains 99"):
        build(name, features_only=True, out_indices=(99,))


@every_kind
def test_output_for_an_image_does_not_depend_on_its_batch(name):
    model, x = build(name).eval().double(), images(name).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=1e-9, atol=1e-12)


@every_kind
def test_works_in_bf16_and_channels_last(name):
    model, x = build(name).eval(), images(name)
    with torch.no_grad():
        exact, doubles = copy.deepcopy(model).double(), x.double()  # in untrained networks, rounding errors grow with depth
        last = copy.deepcopy(exact).to(memory_format=torch.channels_last)(doubles.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, exact(doubles), rtol=1e-4, atol=1e-4)
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).isfinite().all()


@pytest.mark.slow
@each_kind
def test_can_be_exported(name):
    model, x = build(name).eval(), images(name)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    x = images(name, n=3)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@each_kind
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    model, x = build(name).train(), images(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outputs = compiled(x)
    (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()
    with torch.no_grad():
        assert compiled.eval()(x).shape == (2, N_CLASSES)


@pytest.mark.parametrize("name", ["lenet", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_compiles_with_inductor(name):
    torch.compiler.reset()
    model, x = build(name).eval(), images(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-3, atol=1e-4)


@every_model
def test_head_classifiers_and_first_conv_name_existing_modules(name):
    with torch.device("meta"):
        model = create_model(name, n_classes=N_CLASSES, **small_sizes(name))
    for module in (*model.HEAD, *model.CLASSIFIERS, model.FIRST_CONV):
        model.get_submodule(module)
    for module in model.CLASSIFIERS:
        layer = model.get_submodule(module)
        assert getattr(layer, "out_features", getattr(layer, "out_channels", None)) == N_CLASSES
    assert model.get_submodule(model.FIRST_CONV).in_channels == small_sizes(name)["in_channels"]


@each_kind
def test_fvcore_and_torch_count_the_same_products(name):
    """All variants are counted by the test of docs/models.md, which fails if one of them gives a warning."""
    options = small_sizes(name)
    by_fvcore, by_torch = count(build(name), options["in_channels"], options["img_size"]).products
    assert by_fvcore == by_torch > 0

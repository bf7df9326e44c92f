"""Every optimizer by name, and the learning rate and weight decay of each parameter."""

import inspect
import io

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.optim import get_optimizer_class, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

from engine import ConfigError, load_config
from engine.optim.optimizer import make_optimizer
from engine.state import TrainState
from models import create_model
from tests.running import assert_same_weights

NEED_A_PACKAGE = ("bnb", "fused")  # bitsandbytes, apex
CANNOT_RUN = {"lbfgs", "sparseadam", "adahessian"}
TORCH_OPTIMIZERS = [
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
]
TIMM_OPTIMIZERS = [name for name in list_optimizers() if not name.startswith(NEED_A_PACKAGE)]
TIMM_CLASSES = {get_optimizer_class(name, bind_defaults=False).__name__ for name in TIMM_OPTIMIZERS}
RUNNABLE = sorted(name for name in {*TORCH_OPTIMIZERS, *TIMM_OPTIMIZERS, *TIMM_CLASSES} if name.lower() not in CANNOT_RUN)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def config(name="SGD", **options):
    return load_config(None, {f"train.optim.{key}": value for key, value in {"type": name, **options}.items()})


def build_optimizer(name, model, **options):
    train = config(name, **options).train
    return make_optimizer(train.optim, train.base_lr, model)


def optimizer_of(name, model=None, **options):
    return build_optimizer(name, ConvNet() if model is None else model, **options)[0]


def train_state(name, model):
    optimizer, configured = build_optimizer(name, model)
    return TrainState(model, optimizer, configured=configured)


def error_message(name, model=None, **options):
    with pytest.raises(ConfigError) as caught:
        optimizer_of(name, model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def take_steps(model, optimizer, n=2):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        images, targets = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_parameter(model, optimizer, key):
    """Map the name of each parameter to the value of `key` in its group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group[key] for group in optimizer.param_groups for parameter in group["params"]}


def resnet18(**options):
    return create_model("resnet18", n_classes=4, img_size=32, **options)


def vit():
    return create_model("vit_tiny", n_classes=4, img_size=32, patch_size=16)


class TestNames:
    @pytest.mark.parametrize("name", RUNNABLE)
    def test_every_optimizer_updates_a_convnet_and_keeps_weights_finite(self, name):
        torch.manual_seed(0)
        model = ConvNet()
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        with torch.compiler.set_stance("force_eager"):  # compiling Kron takes half a minute
            take_steps(model, optimizer_of(name, model))
        for name, weight in model.named_parameters():
            assert weight.isfinite().all(), name
            # two steps of Lion can cancel out in a bias
            assert weight.ndim == 1 or not torch.equal(weight, before[name]), name

    @pytest.mark.parametrize("name", RUNNABLE)
    def test_every_optimizer_resumes_bit_exactly(self, name):
        torch.manual_seed(0)
        model, again = ConvNet(), ConvNet()
        state, resumed = (train_state(name, m) for m in (model, again))
        file = io.BytesIO()
        with torch.compiler.set_stance("force_eager"):
            take_steps(model, state.optimizer)
            torch.save(state.content(Accelerator(cpu=True))[1], file)
            file.seek(0)
            again.load_state_dict(model.state_dict())
            resumed.load_state_dict(torch.load(file, weights_only=True), rank=0, world_size=1)
            for m, optimizer in ((model, state.optimizer), (again, resumed.optimizer)):
                torch.manual_seed(1)  # as the training loop does in each step
                take_steps(m, optimizer)
        assert_same_weights(model.state_dict(), again.state_dict())

    @pytest.mark.parametrize("name", RUNNABLE)
    def test_a_nan_gradient_is_found_in_the_weights_or_the_state_of_every_optimizer(self, name):
        torch.manual_seed(0)
        state, accelerator = train_state(name, ConvNet()), Accelerator(cpu=True)
        with torch.compiler.set_stance("force_eager"):
            take_steps(state.model, state.optimizer)
            assert state.is_finite(accelerator)
            for parameter in state.model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
            state.optimizer.step()
        assert not state.is_finite(accelerator)

    @pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.999, 0.1), (0.9, "0.999"), 0.9])
    def test_a_saved_option_of_another_shape_is_refused(self, betas):
        state, (_, saved) = train_state("AdamW", ConvNet()), train_state("AdamW", ConvNet()).content(Accelerator(cpu=True))
        saved["optimizer"]["param_groups"][0]["betas"] = betas
        with pytest.raises(ValueError, match="betas of its optimizer is not valid"):
            state.load_state_dict(saved, rank=0, world_size=1)

    def test_nan_in_averaged_weights_is_found(self):
        state, accelerator = train_state("SGD", ConvNet()), Accelerator(cpu=True)
        state.ema = ModelEmaV3(state.model)
        assert state.is_finite(accelerator)
        state.ema.module.fc.bias.data[0] = torch.nan
        assert not state.is_finite(accelerator)

    def test_names_are_case_insensitive_and_prefer_torch(self):
        assert type(optimizer_of("ADAMW")) is torch.optim.AdamW
        assert type(optimizer_of("adafactor")) is torch.optim.Adafactor
        assert optimizer_of("sgd").defaults["nesterov"] is False
        assert type(optimizer_of("LAMB")) is type(optimizer_of("Lamb")) is timm.optim.Lamb
        assert type(optimizer_of("NvNovoGrad")) is timm.optim.NvNovoGrad

    def test_muon_updates_convolutions_and_adamw_updates_norms(self):
        model = ConvNet()
        optimizer = optimizer_of("Muon", model)
        take_steps(model, optimizer, n=1)
        assert optimizer.state[model.conv.weight]["use_muon"]
        assert not optimizer.state[model.norm.weight]["use_muon"]

    def test_adamw_updates_the_classifier_that_the_model_declares(self):
        model = resnet18(layers=(1, 1, 1, 1))
        optimizer = optimizer_of("Muon", model)
        take_steps(model, optimizer, n=1)
        by_muon = {name for name, weight in model.named_parameters() if optimizer.state[weight]["use_muon"]}
        assert by_muon == {name for name, weight in model.named_parameters() if weight.ndim == 4}
        assert not any("use_fallback" in group for group in optimizer_of("AdamW", resnet18()).param_groups)

    @pytest.mark.parametrize(
        ("name", "instead"), [("LBFGS", "AdamW"), ("SparseAdam", "Adam"), ("Adahessian", "AdamW"), ("fusedadam", "APEX")]
    )
    def test_unsupported_optimizer_is_an_error_with_an_alternative(self, name, instead):
        message = error_message(name)
        assert message.startswith("train.optim.type: ")
        assert name in message
        assert instead in message

    def test_unknown_optimizer_is_an_error_with_a_suggestion(self):
        assert "did you mean AdamW?" in error_message("AdamWW")

    @pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
    @pytest.mark.parametrize("option", ["fused", "foreach"])
    def test_fused_and_foreach_are_passed_to_the_optimizer(self, name, option):
        model = ConvNet()
        optimizer = optimizer_of(name, model, **{option: True})
        assert optimizer.defaults[option] is True
        take_steps(model, optimizer)

    def test_unsupported_fused_is_an_error_or_is_dropped_with_a_warning(self):
        assert "train.optim" in error_message("SGD", fused=True, foreach=True)
        assert optimizer_of("Lamb", fused=True).defaults.get("fused") is None
        assert any("train.optim.fused (--train.optim.fused) is dropped" in note for note in config("Lamb", fused=True).notes)


class TestGroups:
    def test_default_is_one_parameter_group(self):
        model = resnet18()
        (group,) = optimizer_of("SGD", model, lr=0.2).param_groups
        assert group["params"] == list(model.parameters())
        assert (group["lr"], group["initial_lr"], group["lr_scale"]) == (0.2, 0.2, 1.0)

    def test_scale_lr_scales_the_learning_rate_with_the_batch_size(self):
        options = {"train.optim.lr": 0.1, "train.optim.head_lr": 0.3, "train.batch_size": 512, "train.scale_lr": 256}
        model = resnet18()
        train = load_config(None, options).train
        optimizer, _ = make_optimizer(train.optim, train.base_lr, model)
        rates = by_parameter(model, optimizer, "lr")
        assert rates.pop("fc.weight") == rates.pop("fc.bias") == pytest.approx(0.6)
        assert set(rates.values()) == {0.2}

    def test_only_one_dimensional_parameters_are_exempt_from_weight_decay(self):
        model = resnet18()
        optimizer = optimizer_of("AdamW", model, weight_decay=0.05, decay_norm_and_bias=False)
        decay = by_parameter(model, optimizer, "weight_decay")
        assert decay == {name: 0.05 if weight.ndim > 1 else 0.0 for name, weight in model.named_parameters()}
        _assert_same_groups_as_timm(model, optimizer, param_groups_weight_decay(model, weight_decay=0.05))

    def test_parameters_that_the_model_lists_are_exempt_from_weight_decay(self):
        model = create_model("timm/vit_tiny_patch16_224", n_classes=4, img_size=32, depth=2)
        optimizer = optimizer_of("AdamW", model, weight_decay=0.05, decay_norm_and_bias=False)
        decay = by_parameter(model, optimizer, "weight_decay")
        assert {name for name, weight in model.named_parameters() if weight.ndim > 1 and not decay[name]} == {
            "cls_token",
            "pos_embed",
        }

    def test_optimizer_without_weight_decay_supports_groups(self):
        model = ConvNet()
        take_steps(model, optimizer_of("Rprop", model, decay_norm_and_bias=False))

    def test_layer_decay_of_resnet18_is_per_block(self):
        model = resnet18()
        scale = by_parameter(model, optimizer_of("AdamW", model, lr=1e-3, layer_decay=0.5), "lr_scale")
        blocks = ["conv1 bn1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "fc"]
        expected = {
            name: 0.5 ** (9 - layer)
            for layer, prefixes in enumerate(blocks)
            for name in scale
            if name.startswith(tuple(f"{prefix}." for prefix in prefixes.split()))
        }
        assert scale == expected

    def test_layer_decay_of_vit_is_per_block(self):
        model = vit()
        scale = by_parameter(model, optimizer_of("AdamW", model, lr=1e-3, layer_decay=0.75), "lr_scale")
        assert scale["cls_token"] == scale["pos_embed"] == scale["patch_embed.proj.weight"] == 0.75**13
        assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(12)] == [0.75 ** (12 - i) for i in range(12)]
        assert scale["norm.weight"] == 0.75  # same as the last block, as in BEiT and timm
        assert scale["head.weight"] == 1

    @pytest.mark.parametrize(
        ("name", "timm_name"),
        [
            ("resnet18", "resnet18"),
            ("resnet50", "resnet50"),
            ("vit_tiny", "vit_tiny_patch16_224"),
            ("timm/convnext_atto", "convnext_atto"),
            ("timm/test_resnet", "test_resnet"),
        ],
    )
    def test_layer_decay_matches_timm(self, name, timm_name):
        with torch.device("meta"):
            model, reference = create_model(name), timm.create_model(timm_name)
        optimizer = optimizer_of("AdamW", model, lr=1e-3, layer_decay=0.8, weight_decay=0.05, decay_norm_and_bias=False)
        groups = param_groups_layer_decay(reference, weight_decay=0.05, layer_decay=0.8)
        names = {parameter: name for name, parameter in reference.named_parameters()}
        expected = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
        assert by_parameter(model, optimizer, "lr_scale") == expected

    def test_layer_decay_is_strongest_at_the_stem_and_absent_at_the_classifiers(self):
        for name in ("lenet", "alexnet", "vgg11_bn", "googlenet", "efficientnet_b0", "preactresnet18", "hrnet_w18_small"):
            with torch.device("meta"):
                model = create_model(name)
            scale = by_parameter(model, optimizer_of("AdamW", model, lr=1e-3, layer_decay=0.5), "lr_scale")
            assert scale[f"{model.FIRST_CONV}.weight"] == min(scale.values())
            assert all(scale[f"{layer}.weight"] == 1 for layer in model.CLASSIFIERS)

    def test_layer_decay_treats_modules_around_a_backbone_as_the_head(self):
        backbone = create_model("resnet18", features_only=True)
        model = nn.ModuleDict({"neck": nn.Conv2d(512, 8, 1), "encoder": backbone})
        scale = by_parameter(model, optimizer_of("AdamW", model, lr=1e-3, layer_decay=0.5, head_lr=2e-3), "lr_scale")
        assert scale["neck.weight"] == scale["neck.bias"] == 2
        assert scale["encoder.backbone.layer4.1.conv1.weight"] == 0.5
        assert scale["encoder.backbone.conv1.weight"] == 0.5**9

    def test_head_lr_sets_the_learning_rate_of_the_head(self):
        for model, head in ((resnet18(), "fc"), (vit(), "head"), (create_model("timm/test_resnet", n_classes=4), "fc")):
            optimizer = optimizer_of("AdamW", model, lr=1e-4, head_lr=1e-2)
            lr = by_parameter(model, optimizer, "lr")
            assert {name for name in lr if lr[name] == pytest.approx(1e-2)} == {f"{head}.weight", f"{head}.bias"}
            assert sorted(set(lr.values())) == pytest.approx([1e-4, 1e-2])
            assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-4}

    def test_bias_lr_applies_to_norms_and_biases_except_in_the_classifier(self):
        model = resnet18()
        lr = by_parameter(model, optimizer_of("AdamW", model, lr=1e-3, bias_lr=1e-2, head_lr=1e-4), "lr")
        expected = {name: 1e-2 if weight.ndim == 1 else 1e-3 for name, weight in model.named_parameters()}
        assert lr == pytest.approx(expected | {"fc.weight": 1e-4, "fc.bias": 1e-4})

    def test_layer_decay_applies_to_bias_lr(self):
        model = resnet18()
        scale = by_parameter(model, optimizer_of("AdamW", model, lr=1e-3, bias_lr=2e-3, layer_decay=0.5), "lr_scale")
        assert scale["layer4.1.bn1.bias"] == pytest.approx(2 * scale["layer4.1.conv1.weight"])
        assert scale["bn1.weight"] == pytest.approx(2 * scale["conv1.weight"])

    def test_frozen_parameters_are_not_passed_to_the_optimizer(self):
        model = resnet18()
        model.layer1.requires_grad_(False)
        rates = by_parameter(model, optimizer_of("SGD", model, layer_decay=0.9), "lr")
        assert rates.keys() == {name for name, _ in model.named_parameters() if not name.startswith("layer1.")}

    def test_configured_options_include_the_options_of_the_groups(self):
        optimizer, configured = build_optimizer("AdamW", resnet18(), layer_decay=0.5, decay_norm_and_bias=False)
        assert {"lr", "weight_decay", "initial_lr", "lr_scale"} <= set(configured)
        assert all(name in group for name in configured for group in optimizer.param_groups)

    @pytest.mark.parametrize("key", ["layer_decay", "head_lr"])
    def test_model_without_declared_layers_is_a_one_line_error(self, key):
        assert error_message("SGD", ConvNet(), **{key: 0.5}).startswith(f"train.optim.{key}: ConvNet ")


def _assert_same_groups_as_timm(model, optimizer, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert by_parameter(model, optimizer, "weight_decay") == expected

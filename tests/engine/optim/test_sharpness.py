"""Sharpness-aware minimization, compared with a hand-written step."""

import copy

import pytest
import torch
from torch.nn import functional as F

from engine import load_config
from engine.build import Run, build
from engine.devices.accelerator import make_accelerator
from engine.train import train_batches
from tests.faults.campaign import SMALL
from tests.faults.children import train
from tests.running import metrics

OPTIONS = {
    "train.n_steps": 5,
    "train.batch_size": 16,
    "train.optim.lr": 0.05,
    "train.optim.momentum": 0.0,
    "train.optim.weight_decay": 0.0,
    "train.sched.type": "constant",
    "train.num_threads": 1,
}
RESNET = {"model__name": "resnet18", "model__layers": [1, 1, 1, 1]}
LENET = {"model__name": "lenet"}
RADIUS = 0.1


def build_run(**options) -> Run:
    config = load_config(None, OPTIONS | {name.replace("__", "."): value for name, value in options.items()})
    run = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    run.model.double()
    return run


def gradients(model, images, labels):
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def reference_step(model, images, labels, *, lr, radius, adaptive):
    """One step of SAM or ASAM with plain SGD, as in the papers; buffers keep their values from the first pass."""
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    first = gradients(model, images, labels)
    statistics = [buffer.clone() for buffer in model.buffers()]
    scales = [weight.abs() if adaptive else torch.ones_like(weight) for weight in weights]
    norm = sum((scale * gradient).square().sum() for scale, gradient in zip(scales, first, strict=True)).sqrt()
    with torch.no_grad():
        for parameter, scale, gradient in zip(model.parameters(), scales, first, strict=True):
            parameter += radius * scale**2 * gradient / norm
    second = gradients(model, images, labels)
    with torch.no_grad():
        for parameter, weight, gradient in zip(model.parameters(), weights, second, strict=True):
            parameter.copy_(weight - lr * gradient)
        for buffer, statistic in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(statistic)
    return first, second


@pytest.mark.parametrize("adaptive", [False, True])
def test_five_steps_match_a_hand_written_implementation(adaptive):
    run = build_run(**RESNET, train__sam=RADIUS, train__sam_adaptive=adaptive)
    plain = copy.deepcopy(run.model)
    for images, labels in train_batches(run, 0):
        batch = (images.double(), labels)
        run.update(run.state, batch, measure=False)
        first, second = reference_step(plain.train(), *batch, lr=0.05, radius=RADIUS, adaptive=adaptive)
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(first, second, strict=True))  # the two gradients differ
        for name, value in run.model.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=1e-10, msg=name)


def test_logged_loss_is_the_loss_of_the_unperturbed_weights():
    run, plain = build_run(**RESNET, train__sam=RADIUS), build_run(**RESNET)
    images, labels = next(train_batches(run, 0))
    for each in (run, plain):
        each.update(each.state, (images.double(), labels), measure=True)
    assert run.state.window["loss"] == plain.state.window["loss"]
    assert run.state.window["grad_norm"] != plain.state.window["grad_norm"]


def test_micro_batches_match_the_whole_batch():
    """The model has no BatchNorm, whose statistics would be per micro-batch."""
    whole, parts = (build_run(**LENET, train__sam=RADIUS, train__micro_batch_size=size) for size in (0, 6))
    for images, labels in train_batches(whole, 0):
        for run in (whole, parts):
            run.update(run.state, (images.double(), labels), measure=False)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_ranks_match_one_rank(tmp_path):
    argv = (*SMALL, "--train.n_steps", 6, "--train.batch_size", 64, "--train.print_freq", 2, "--train.sam", RADIUS)
    for name, ranks in (("one", 1), ("two", 2)):
        ended = train(tmp_path / name, *argv, ranks=ranks)
        assert ended.codes == [0] * ranks, ended.output
    losses = [[line["train/loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_weights_are_restored_bit_exactly():
    run = build_run(**RESNET, train__sam=RADIUS)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with run.update.sharpness.perturbed(run.model):
        moved = sum((p - before[name]).square().sum() for name, p in run.model.named_parameters()).sqrt()
        assert moved.item() == pytest.approx(RADIUS)
        assert all(parameter.grad is None for parameter in run.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())

"""The sprint recipe and its features: data-dependent initialization, bias learning rates, test-time views."""

from types import SimpleNamespace

import pytest
import torch

from datasets.pipeline.splits import Files
from engine import ConfigError, load_config
from engine import build as builder
from engine.config.schema import SchedConfig
from engine.devices.accelerator import make_accelerator
from engine.optim.schedule import make_schedule
from engine.train import train_batches
from models import create_model
from tests.running import ROOT, assert_same_weights, metrics, results, run_main, untimed, weights

CONFIG = ROOT / "configs" / "sprint94_cifar10.yaml"
SMALL = {"data.name": "shapes", "data.n_train": 96, "data.n_test": 32, "data.img_size": 16, "model.widths": [8, 16, 16]}
SMALL |= {"train.batch_size": 16, "train.num_threads": 1, "train.n_steps": 12, "eval.batch_size": 32}


def build_run(**options):
    config = load_config(CONFIG, SMALL | options)
    return builder.build(config, make_accelerator(config.train, deterministic=config.deterministic))


def argv(**options):
    return [f"--{name}={value}" for name, value in (SMALL | options).items()]


def test_first_layer_whitens_the_training_images():
    run = build_run(**{"augment.enabled": False, "train.precision": "fp32", "train.channels_last": False})
    images = torch.cat([batch[0] for batch in run.train_loader.batches(0, run.steps_per_epoch)])
    with torch.no_grad():
        outputs = run.model.whiten(images).transpose(0, 1).flatten(1)[:12]
    moments = outputs @ outputs.T / outputs.shape[1]
    assert (moments - torch.diag(moments.diagonal())).abs().max() < 1e-3
    assert moments.diagonal().max() == pytest.approx(1, abs=0.01)


def test_initialization_images_depend_on_the_seed_and_are_not_augmented():
    seen = []
    for options in ({}, {"augment.cutout": 8}, {"seed": 5}):
        seen.append(build_run(**options).model.whiten.weight.clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_initialization_from_image_files_uses_a_limited_number_of_images(data_root, monkeypatch):
    monkeypatch.setattr(builder, "N_FOR_INITIALIZATION", 10)
    seen = []
    monkeypatch.setattr("models.airbench.Airbench.initialize_from", lambda self, batches: seen.extend(map(len, batches)))
    options = {"data.name": "imagefolder", "data.dataroot": str(data_root / "imagefolder"), "data.img_size": 16}
    config = load_config(None, options | {"model.name": "airbench94", "train.batch_size": 8, "dataloader.num_workers": 0})
    run = builder.build(config, make_accelerator(config.train, deterministic=config.deterministic))
    assert isinstance(run.data.splits["train"], Files)
    assert sum(seen) == 10


def test_pretrained_weights_are_not_reinitialized(tmp_path):
    model = create_model("airbench94", widths=(8, 16, 16), img_size=16, n_classes=10)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    run = build_run(**{"model.pretrained": str(tmp_path / "weights.pt"), "train.channels_last": False})
    assert torch.equal(run.model.whiten.weight, model.whiten.weight)


def test_config_sets_learning_rate_and_optimizer_for_each_kind_of_weight():
    run = build_run()
    next_batch = next(train_batches(run, 0))
    run.update(run.state, next_batch, measure=False)
    optimizer, names = run.state.optimizer, {weight: name for name, weight in run.model.named_parameters()}
    found = {names[p]: (group["initial_lr"] * group["lr_scale"], optimizer.state[p]["use_muon"])
             for group in optimizer.param_groups for p in group["params"]}  # fmt: skip
    for name, (rate, by_muon) in found.items():
        expected = 0.01 if name == "head.weight" else 0.08 if name.endswith("bias") else 0.24
        assert rate == pytest.approx(expected), name
        assert by_muon == ("conv" in name), name


def test_learning_rate_decays_linearly_to_zero():
    run = build_run()
    assert [run.update.schedule(step, 0.24) for step in range(run.n_steps)] == pytest.approx(
        [0.24 * (1 - step / run.n_steps) for step in range(run.n_steps)]
    )


def test_warmup_with_linear_decay_is_a_triangle():
    schedule = make_schedule(SchedConfig(type="LinearLR", warmup_steps=23, eta_min=0.007), 100, steps_per_epoch=10)
    rises = [0.1 * (step + 1) / 24 for step in range(23)]
    falls = [0.1 + (0.007 - 0.1) * (step - 23) / 77 for step in range(23, 100)]
    assert [schedule(step, 0.1) for step in range(100)] == pytest.approx(rises + falls)


def test_run_evaluates_once_at_its_end_and_resumes_bit_exactly(tmp_path):
    save = {"train.save_freq": 6}
    for run in ("whole", "cut"):
        assert run_main("-c", CONFIG, *argv(**save), "-e", tmp_path / run) == 0
    assert run_main("-r", tmp_path / "cut" / "ckpt" / "step-000006") == 0
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert untimed(metrics(tmp_path / "whole")) == untimed(metrics(tmp_path / "cut"))
    assert ["valid/acc@1" in line for line in metrics(tmp_path / "whole")] == [False, True]


def test_classification_only_views_are_an_error_for_other_tasks():
    options = {"data.name": "shapes", "model.name": "resnet18", "task": "segmentation", "eval.tta": "flip_and_shift"}
    with pytest.raises(ConfigError, match=r"eval.tta: flip_and_shift .* not for task segmentation"):
        load_config(None, options)


def test_sync_batchnorm_of_norms_without_a_scale_is_an_error():
    two_gpus = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    with pytest.raises(ConfigError, match=r"train.sync_batchnorm: the norms of airbench94"):
        builder._synchronized(create_model("airbench94"), "airbench94", two_gpus)


@pytest.mark.slow
def test_shapes_are_learned_in_a_few_epochs(tmp_path):
    options = {"data.n_train": 2000, "data.n_test": 500, "data.img_size": 32, "model.widths": [32, 64, 64], "train.n_steps": 80}
    options |= {"train.batch_size": 100, "train.precision": "fp32", "eval.batch_size": 500}
    assert run_main("-c", CONFIG, *argv(**options), "-e", tmp_path / "run") == 0
    assert results(tmp_path / "run")["last"]["valid/acc@1"] > 0.8

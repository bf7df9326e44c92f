import math
import os
from dataclasses import FrozenInstanceError, fields

import pytest

from engine import ConfigError, load_config
from engine.config.command_line import parse_overrides
from engine.config.schema import Config, keys, to_dict, to_yaml
from tests.running import ROOT

MINIMAL = "data: {name: digits}\nmodel: {name: lenet}\ntrain: {n_steps: 10}\n"

FULL_CONFIG = """
seed: 1234
data:
  name: CIFAR-10
  dataroot: ~/data/CIFAR-10/
  img_size: 32
  n_classes: 10
dataloader:
  num_workers: 4
  pin_memory: true
  prefetch_factor: 2
model:
  name: resnet18
  first_block: cifar10
train:
  n_steps: 64000
  batch_size: 256
  micro_batch_size: 0
  print_freq: 200
  save_freq: 5000
  eval_freq: 1000
  optim: {type: SGD, lr: 0.1, weight_decay: 0.0005, momentum: 0.9}
  sched: {type: CosineAnnealingLR, t_max: 64000, eta_min: 0.001}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def error_message(*args):
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_full_config_loads_without_notes(write):
    config = load_config(write(FULL_CONFIG))
    assert config.train.optim.lr == 0.1
    assert config.model.args == {"first_block": "cifar10"}
    assert config.train.sched.eta_min == 0.001
    assert not config.notes


def test_everything_except_the_two_names_and_the_run_length_has_a_default(write):
    config = load_config(write(MINIMAL))
    assert config.seed == 1234
    for missing in ("data", "model", "train"):
        kept = [line for line in MINIMAL.splitlines() if not line.startswith(missing)]
        assert missing in error_message(write("\n".join(kept)))


def test_command_line_overrides_the_config_and_the_config_overrides_its_bases(write):
    write("seed: 1\ntrain: {batch_size: 1, n_steps: 1, print_freq: 1}", "base/a.yaml")
    write("seed: 2\ntrain: {batch_size: 2}", "base/b.yaml")
    path = write("base: [base/a.yaml, base/b.yaml]\nseed: 3\ndata: {name: digits}\nmodel: {name: lenet}")
    config = load_config(path, {"train.n_steps": 7})
    assert (config.seed, config.train.batch_size, config.train.print_freq, config.train.n_steps) == (3, 2, 1, 7)
    assert config.origin("train.batch_size").name.endswith("b.yaml")
    assert config.origin("train.n_steps").name == "--train.n_steps"


def test_overrides_can_be_a_mapping_or_command_line_arguments(write):
    path = write(MINIMAL)
    for overrides in ({"train.optim.lr": 1e-4}, ["--train.optim.lr", "1e-4"], ["--train.optim.lr=1e-4"], ["train.optim.lr=1e-4"]):
        assert load_config(path, overrides).train.optim.lr == 1e-4


def test_value_can_reference_another_key(write):
    assert load_config(write(MINIMAL + "eval: {batch_size: '${train.n_steps}'}")).eval.batch_size == 10


def test_resolved_config_round_trips(write):
    config = load_config(write(FULL_CONFIG), {"train.optim.betas": [0.9, 0.95], "data.dataroot": "1e-4", "train.optim.lr": 1e-05})
    assert to_dict(load_config(write(to_yaml(config), "again.yaml"))) == to_dict(config)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.optm.lr", 1, "did you mean train.optim?"),
        ("trian.n_steps", 1, "did you mean train?"),
        ("train.lr", 1, "did you mean train.optim.lr?"),
        ("learning_rate", 1, "no such option or config key"),
        ("train.n_steps", "abc", "expected a whole number or null, got 'abc'"),
        ("train.n_steps", 1.5, "expected a whole number"),
        ("train.n_steps", True, "got true"),
        ("train.n_steps", 0, "must be at least 1"),
        ("train.optim.lr", "0.1", "expected a number"),
        ("train.optim.lr", -0.1, "must be above 0"),
        ("train.compile", "yes", "expected true or false or regions, got 'yes'"),
        ("train.compile", 1, "expected true or false or regions, got 1"),
        ("data.name", None, "expected a string, got null"),
        ("data.valid_ratio", 1.0, "must be below 1"),
        ("train.sched.type", "Cosine", "expected CosineAnnealingLR or MultiStepLR"),
        ("train.optim", 3, "is a section"),
        ("train.sched.milestones", [10, 5], "must rise"),
        ("train.sched.milestones", ["a"], "expected a list of whole numbers"),
        ("augment.scale", [0.5], "two numbers"),
        ("augment.scale", {"low": 0.5}, "expected a list of numbers, got {'low': 0.5}"),
        ("data.args", {}, "no such key"),
        ("eval.batch_size", "${train.nothing}", "nothing"),
        ("train.optim.lr", math.inf, "must be a finite number, got inf"),
        ("train.optim.betas", [0.9, math.nan], "train.optim.betas.1: must be a finite number"),
        ("data.std", [math.nan], "must be a finite number"),
        ("seed", 10**23, "at most 64 bits"),
        ("model.layers", [16**6000], "at most 64 bits"),
        ("model.layers", [-(2**63) - 1], "at most 64 bits"),
        ("augment", {1: 2}, "a key is not a plain word"),
        ("augment", {16**6000: 2}, "a key is not a plain word"),
        ("model.first_block", "\x1b[31m", "must not contain control characters"),
        ("seed", "???", "must be given"),
    ],
)
def test_invalid_key_or_value_is_a_one_line_error_with_the_key_and_a_remedy(write, key, value, expected):
    path = write(MINIMAL)
    if key == "learning_rate":
        with pytest.raises(ConfigError, match=expected):
            parse_overrides([f"--{key}", "1"])
        return
    message = error_message(path, {key: value})
    assert key.partition(".")[0] in message
    assert expected in message


@pytest.mark.parametrize(("first", "second"), [([1], {"a": {"b": 2}}), ({"a": 1, "c": 0}, [2]), ({"a": 1}, (2, 3))])
def test_a_list_replaces_a_mapping_and_a_mapping_a_list(write, first, second):
    path = write(MINIMAL.replace("lenet", f"timm/test_resnet, layers: {first}"))
    layers = load_config(path, {"model.layers": second}).model.args["layers"]
    assert second in (layers, tuple(layers))  # OmegaConf 2.3 makes a list of a tuple


def test_error_names_the_file_that_contains_the_value(write):
    write("train: {batch_size: many}", "base.yaml")
    message = error_message(write("base: base.yaml\n" + MINIMAL))
    assert "train.batch_size" in message
    assert "base.yaml" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: config.yaml\n" + MINIMAL, "its own base"),
        ("base: nowhere.yaml\n" + MINIMAL, "no such config"),
        ("base: 3\n" + MINIMAL, "expected a file name"),
        ("- a\n- b", "a mapping"),
        ("a: [", "config.yaml"),
        ("seed: !!python/name:os.system x\n" + MINIMAL, "python/name"),
        (MINIMAL + "seed: 1\nseed: 2", "given twice"),
    ],
)
def test_invalid_config_file_is_an_error(write, text, expected):
    assert expected in error_message(write(text))


def test_missing_config_is_an_error_with_a_suggestion():
    assert "did you mean" in error_message(ROOT / "configs" / "lenet_digit.yaml")


def test_binary_or_huge_config_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.yaml").write_bytes(b"a" * 2_000_000)
    assert "a.yaml" in error_message(tmp_path / "a.yaml")
    assert "larger than" in error_message(tmp_path / "b.yaml")
    assert "can't be read" in error_message(tmp_path)


@pytest.mark.parametrize("special", ["pipe", "/dev/zero"])
def test_a_config_or_base_that_is_not_a_regular_file_is_an_error(write, tmp_path, special):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in error_message(tmp_path / special)
    assert "not a regular file" in error_message(write(f"base: {special}\n{MINIMAL}"))


def test_bases_that_multiply_are_an_error(write):
    for i in range(30):
        write(f"base: [{i + 1}.yaml, {i + 1}.yaml]" if i < 29 else MINIMAL, f"{i}.yaml")
    assert "more than 100 files" in error_message(write("base: 0.yaml"))


class TestRunLength:
    """Conflicts between n_steps, n_epochs and t_max."""

    def test_higher_priority_source_wins_with_a_note(self, write):
        config = load_config(write(FULL_CONFIG), {"train.n_epochs": 30})
        assert (config.train.n_steps, config.train.n_epochs, config.train.sched.t_max) == (None, 30, None)
        assert any("n_epochs 30" in note and "n_steps 64000" in note for note in config.notes)
        assert any("t_max 64000" in note for note in config.notes)

    def test_n_epochs_on_the_command_line_resets_frequencies_given_in_steps(self, write):
        config = load_config(write(FULL_CONFIG), {"train.n_epochs": 30})
        assert (config.train.print_freq, config.train.eval_freq, config.train.save_freq) == (None, None, None)
        config = load_config(write(FULL_CONFIG), {"train.n_epochs": 30, "train.print_freq": 5})
        assert config.train.print_freq == 5

    def test_t_max_is_reset_for_a_shorter_run(self, write):
        config = load_config(write(FULL_CONFIG), {"train.n_steps": 100})
        assert config.train.sched.t_max is None

    def test_t_max_from_a_higher_priority_source_is_kept_with_a_warning(self, write):
        config = load_config(write(FULL_CONFIG), {"train.sched.t_max": 100})
        assert config.train.sched.t_max == 100
        assert any(note.startswith("warning: ") and "t_max 100" in note for note in config.notes)

    def test_conflict_within_one_source_is_an_error(self, write):
        both = MINIMAL.replace("n_steps: 10", "n_steps: 10, n_epochs: 3")
        assert "give one of them" in error_message(write(both))
        t_max = MINIMAL.replace("n_steps: 10", "n_steps: 10, sched: {t_max: 7}")
        assert "contradicts" in error_message(write(t_max))

    @pytest.mark.parametrize("schedule_type", ["LinearLR", "PolynomialLR", "OneCycleLR"])
    def test_t_max_is_resolved_the_same_for_every_finite_schedule(self, write, schedule_type):
        config = load_config(write(FULL_CONFIG), {"train.sched.type": schedule_type, "train.n_steps": 100})
        assert config.train.sched.t_max is None
        config = load_config(write(FULL_CONFIG), {"train.sched.type": schedule_type, "train.sched.t_max": 100})
        assert config.train.sched.t_max == 100
        assert any(note.startswith("warning: ") and "t_max 100" in note for note in config.notes)
        assert "contradicts" in error_message(write(MINIMAL.replace("10", f"10, sched: {{type: {schedule_type}, t_max: 7}}")))

    def test_t_max_is_the_run_length_minus_the_cooldown(self, write):
        with_cooldown = MINIMAL.replace("10", "10, sched: {t_max: T, cooldown_steps: 3, eta_min: 0.01}")
        assert load_config(write(with_cooldown.replace("T", "7"))).train.sched.t_max == 7
        message = error_message(write(with_cooldown.replace("T", "10")))
        assert "t_max: 10 contradicts train.n_steps 10 less train.sched.cooldown_steps 3" in message
        config = load_config(write(FULL_CONFIG), {"train.sched.cooldown_steps": 4000})
        assert config.train.sched.t_max is None
        assert any("t_max 64000" in note and "cooldown_steps 4000" in note for note in config.notes)


class TestSchedule:
    """Keys of train.sched that conflict or have no effect."""

    @pytest.mark.parametrize(
        ("overrides", "names"),
        [
            ({"cooldown_steps": 4, "cooldown_epochs": 1}, ["cooldown_steps", "cooldown_epochs"]),
            ({"warmup_steps": 4, "warmup_epochs": 1}, ["warmup_steps", "warmup_epochs"]),
            ({"warmup_steps": 7, "cooldown_steps": 4}, ["warmup_steps: 7", "cooldown_steps 4", "train.n_steps 10"]),
            ({"cooldown_steps": 11}, ["cooldown_steps: 11", "train.n_steps 10"]),
            ({"type": "OneCycleLR", "warmup_epochs": 1}, ["warmup_epochs: 1", "OneCycleLR"]),
            ({"type": "OneCycleLR", "warmup_steps": 2}, ["warmup_steps: 2", "OneCycleLR"]),
            ({"type": "CosineAnnealingWarmRestarts"}, ["train.sched.t_0", "CosineAnnealingWarmRestarts"]),
            ({"type": "StepLR"}, ["train.sched.step_size", "StepLR"]),
            ({"type": "MultiStepLR"}, ["train.sched.milestones", "MultiStepLR"]),
            ({"t_max": 5, "warmup_steps": 5}, ["t_max: 5", "warmup_steps 5"]),
        ],
    )
    def test_conflict_is_an_error_with_both_keys(self, write, overrides, names):
        message = error_message(write(MINIMAL), {f"train.sched.{name}": value for name, value in overrides.items()})
        assert all(name in message for name in names)

    def test_warmup_and_cooldown_epochs_must_fit_into_the_run(self, write):
        path = write(MINIMAL.replace("n_steps", "n_epochs"))
        message = error_message(path, {"train.sched.warmup_epochs": 5, "train.sched.cooldown_epochs": 5.5})
        assert "warmup_epochs: 5 and train.sched.cooldown_epochs 5.5 are more than train.n_epochs 10" in message

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ({"type": "constant", "eta_min": 0.01}, "eta_min (--train.sched.eta_min) has no effect with constant"),
            ({"power": 2}, "power (--train.sched.power) has no effect with CosineAnnealingLR; it is for PolynomialLR"),
            ({"type": "LinearLR", "gamma": 0.5}, "it is for MultiStepLR, StepLR"),
            ({"type": "CosineAnnealingWarmRestarts", "t_0": 3, "t_max": 10}, "t_max (--train.sched.t_max) has no effect"),
            ({"t_mult": 2}, "t_mult"),
            ({"warmup_lr": 0.01}, "warmup_lr (--train.sched.warmup_lr) has no effect without train.sched.warmup_steps"),
            ({"cooldown_lr": 0.01}, "cooldown_lr (--train.sched.cooldown_lr) has no effect without"),
            ({"eta_min": 0.2}, "eta_min 0.2 (--train.sched.eta_min) is above train.optim.lr 0.1"),
            ({"cooldown_steps": 2}, "cool-down begins at train.sched.eta_min 0 and ends at train.sched.cooldown_lr 0"),
        ],
    )
    def test_ineffective_or_surprising_key_is_one_warning(self, write, overrides, expected):
        config = load_config(write(MINIMAL), {f"train.sched.{name}": value for name, value in overrides.items()})
        assert len(config.notes) == 1
        assert config.notes[0].startswith("warning: ")
        assert expected in config.notes[0]


def test_key_without_effect_is_a_warning(write):
    config = load_config(write(FULL_CONFIG), {"train.sched.type": "constant"})
    assert any("eta_min" in note and "no effect" in note for note in config.notes)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("augment.mix_prob", 0.5, "augment.mixup and augment.cutmix 0"),
        ("augment.mix_epochs", 2, "augment.mixup and augment.cutmix 0"),
        ("augment.mix_switch_prob", 0.3, "augment.mixup or augment.cutmix 0"),
        ("augment.auto_magnitude", 7, "augment.auto null"),
        ("augment.resize_step", 4, "augment.resize_from null"),
        ("train.ema_warmup", False, "train.ema null"),
        ("train.compile_mode", "max-autotune", "train.compile false"),
        ("train.most_skipped", 3, "train.nonfinite stop"),
        ("train.bce_threshold", 0.2, "train.loss cross_entropy"),
        ("train.micro_batch_size", 128, "train.batch_size 128"),
    ],
)
def test_key_disabled_by_another_key_is_a_warning_with_both_keys(write, key, value, reason):
    (note,) = load_config(write(MINIMAL), {key: value}).notes
    assert note.startswith(f"warning: {key} (--{key}) has no effect with {reason}")
    assert not load_config(write(MINIMAL)).notes


def test_augmentation_keys_are_warnings_when_augmentation_is_disabled(write):
    keys = {"augment.cutout": 4, "augment.hflip": True, "augment.color_jitter": 0.1, "augment.resize_from": 8}
    notes = load_config(write(MINIMAL), {"augment.enabled": False, **keys}).notes
    assert sorted(note.split()[1] for note in notes) == sorted(keys)
    assert not load_config(write(MINIMAL), keys).notes


@pytest.mark.parametrize(("key", "value"), [("augment.crop_pct", 0.9), ("eval.resize", "torch")])
def test_keys_for_images_in_files_are_warnings_for_images_in_memory(write, key, value):
    (note,) = load_config(write(MINIMAL), {key: value}).notes
    assert note.startswith(f"warning: {key} (--{key}) has no effect on")


def test_decay_norm_and_bias_without_weight_decay_is_a_warning(write):
    keys = {"train.optim.weight_decay": 0.0, "train.optim.decay_norm_and_bias": False}
    (note,) = load_config(write(MINIMAL), keys).notes
    assert "train.optim.decay_norm_and_bias (--train.optim.decay_norm_and_bias) has no effect" in note


def test_learning_rate_meant_for_another_optimizer_is_a_warning(write):
    config = load_config(write(FULL_CONFIG), {"train.optim.type": "Adam"})
    assert any("train.optim.lr 0.1" in note and "Adam" in note for note in config.notes)


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["--train.optim.lr", "-1e-4"], {"train.optim.lr": -1e-4}),
        (["--train.optim.lr=-.5", "--seed", "3"], {"train.optim.lr": -0.5, "seed": 3}),
        (["--train.optim.betas", "[0.9,0.95]"], {"train.optim.betas": [0.9, 0.95]}),
        (["--data.valid_ratio", "null"], {"data.valid_ratio": None}),
        (["--train.compile", "true"], {"train.compile": True}),
        (["--data.dataroot", "a=b"], {"data.dataroot": "a=b"}),
        (["--data.dataroot=a=b"], {"data.dataroot": "a=b"}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
    ],
)
def test_options_are_parsed_as_yaml(words, overrides):
    assert parse_overrides(words) == overrides


@pytest.mark.parametrize("words", [["--seed"], ["--seed", "--train.n_steps", "3"], ["3"], ["--train.optim.betas", "[1,", "2]"]])
def test_option_without_a_value_or_value_without_an_option_is_an_error(words):
    with pytest.raises(ConfigError):
        parse_overrides(words)


def test_every_key_is_documented():
    def meanings(section):
        for spec in fields(section):
            if "meaning" in spec.metadata:
                yield spec.name, spec.metadata["meaning"]
            else:
                yield from meanings(spec.default_factory)

    documented = dict(meanings(Config))
    assert len(keys()) > 40
    assert all(len(meaning) > 5 for meaning in documented.values())
    assert {key.rpartition(".")[2] for key in keys()} <= documented.keys()


class TestReferences:
    """`${section.key}` is the only reference, and it can't expand without bound."""

    @pytest.mark.parametrize("value", ["${oc.env:HOME}", "a ${oc.env:HOME}", "${oc.decode:1}", "${a.${b}}", "${.seed}"])
    def test_a_resolver_is_refused_and_never_called(self, write, value):
        message = error_message(write(MINIMAL), {"data.dataroot": value})
        assert message.startswith("data.dataroot: ")
        assert "only ${section.key} of the same config is read" in message

    def test_the_environment_does_not_reach_the_config(self, write, monkeypatch):
        monkeypatch.setenv("SECRET", "hidden")
        assert "hidden" not in error_message(write(MINIMAL + "tracking: {project: '${oc.env:SECRET}'}"))

    def test_a_reference_to_itself_is_refused(self, write):
        assert "refers to itself" in error_message(
            write(MINIMAL), {"data.dataroot": "${tracking.project}", "tracking.project": "${data.dataroot}"}
        )

    @pytest.mark.timeout(120)  # it took five minutes when each key copied the config
    def test_a_long_chain_of_references_is_refused(self, write):
        keys = {f"data.a{i}": f"${{data.a{i + 1}}}" for i in range(3_000)}
        assert "references lead to it" in error_message(write(MINIMAL), keys)

    def test_references_that_multiply_are_refused_before_they_are_followed(self, write):
        keys = {f"data.a{i}": f"${{data.a{i + 1}}}" * 8 for i in range(12)}
        assert "expand to more than 1,000 values" in error_message(write(MINIMAL), {**keys, "data.a12": "x"})


class TestModelArguments:
    """model.name alone switches between families."""

    def test_an_argument_of_another_model_is_dropped_with_a_warning(self, write):
        config = load_config(write(FULL_CONFIG), {"model.name": "vgg11"})
        assert config.model.args == {}
        (note,) = [note for note in config.notes if "first_block" in note]
        assert note.startswith("warning: model.first_block (")
        assert note.endswith("is dropped: vgg11 does not take it")

    def test_an_argument_that_the_other_model_has_is_kept(self, write):
        assert load_config(write(FULL_CONFIG), {"model.name": "se_resnet18"}).model.args == {"first_block": "cifar10"}

    def test_a_timm_model_gets_what_was_written_for_it(self, write):
        path = write(FULL_CONFIG)
        assert load_config(path, {"model.name": "timm/resnet18"}).model.args == {}
        given = load_config(path, {"model.name": "timm/resnet18", "model.drop_rate": 0.1}).model.args
        assert given == {"drop_rate": 0.1}

    @pytest.mark.parametrize(
        "argument", ["checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "scriptable", "num_classes"]
    )
    def test_a_timm_model_or_teacher_gets_no_argument_that_loads_files(self, write, argument):
        model = write(FULL_CONFIG.replace("name: resnet18\n", f"name: timm/resnet18\n  {argument}: evil.pth\n"))
        assert f"model.{argument}: is not an argument of the network" in error_message(model)
        teacher = {"distill.teacher": "timm/resnet18", "distill.pretrained": "w.pth", f"distill.{argument}": "evil.pth"}
        assert f"distill.{argument}: is not an argument of the network" in error_message(write(MINIMAL), teacher)

    def test_an_argument_that_no_model_has_is_an_error(self, write):
        assert "no such argument" in error_message(write(FULL_CONFIG), {"model.first_blok": "cifar10"})


class TestDatasetArguments:
    """data.name alone switches between datasets."""

    OBJECTS = "task: detection\ndata: {name: cocojson, train_images: pictures, drop_degenerate: true}\n"
    OBJECTS += "model: {name: resnet18}\ntrain: {n_epochs: 1}"

    def test_an_argument_of_the_dataset_before_is_dropped_with_a_warning(self, write):
        path = write(self.OBJECTS)
        assert load_config(path).data.args == {"train_images": "pictures", "drop_degenerate": True}
        config = load_config(path, {"data.name": "VOC"})
        assert config.data.args == {"drop_degenerate": True}
        (note,) = [note for note in config.notes if "train_images" in note]
        assert note == f"warning: data.train_images ({path}) is dropped: VOC does not take it"

    def test_an_argument_of_a_base_is_dropped_too(self, write):
        base = write(self.OBJECTS)
        assert load_config(write(f"base: {base.name}\ndata: {{name: shapes}}", "other.yaml")).data.args == {}

    def test_an_argument_written_for_this_dataset_is_an_error(self, write):
        path = write(self.OBJECTS)
        assert "data.year: no such argument" in error_message(path, {"data.year": 2007})
        assert "data.train_images: no such argument" in error_message(path, {"data.name": "VOC", "data.train_images": "x"})

    def test_an_argument_that_no_dataset_has_is_an_error(self, write):
        path = write(self.OBJECTS.replace("train_images", "train_imagse"))
        assert "data.train_imagse: no such argument" in error_message(path, {"data.name": "VOC"})


def test_the_config_is_frozen(write):
    config = load_config(write(MINIMAL))
    with pytest.raises(FrozenInstanceError):
        config.train.n_steps = 3

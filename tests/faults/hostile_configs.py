"""Hostile configs: each must be refused with one line and exit code 2, at once, and nothing of it may run."""

import contextlib
import io
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from engine import load_config
from engine.config import yaml12
from engine.config.command_line import run_tool
from engine.config.schema import to_dict, to_yaml
from engine.config.text import CONTROL
from tests.faults.fuzz import SECONDS, fuzz
from tests.faults.rows import Row
from tests.running import run_main

RUN = "data: {name: digits}\nmodel: {name: lenet}\ntrain: {n_steps: 10}\n"
VALID = {
    "config.yaml": b"""base: [base/data.yaml, base/optim.yaml]
seed: 3
model: {name: resnet18, first_block: cifar10, layers: [1, 1, 1, 1]}
augment: {mixup: 0.2, crop_padding: 4, hflip: true, resize_from: 16}
train:
  n_steps: 100
  batch_size: 32
  precision: bf16
  clip_grad_norm: 1.0
  freeze: [stem, 'layer1.*']
  sched: {type: LinearLR, warmup_steps: '${train.print_freq}'}
""",
    "base/data.yaml": b"data: {name: CIFAR-10, dataroot: ~/d, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], valid_ratio: 0.1}\n",
    "base/optim.yaml": b"train: {print_freq: 10, optim: {type: AdamW, lr: 1e-3, betas: [0.9, 0.99], eps: 1e-8}, ema: 0.99}\n",
}


def mutated_configs(folder: Path, n: int = 1_000) -> Row:
    """Load mutants of a config with two bases. Each fourth that loads must be equal after it was written and read again."""
    files = {folder / name: content for name, content in VALID.items()}
    for path, content in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    loaded = itertools.count()

    def load() -> int:
        config = load_config(folder / "config.yaml")
        assert next(loaded) % 4 or yaml12.parse(to_yaml(config)) == to_dict(config)
        return 0

    def open_it() -> None:
        code, message = _outcome(lambda: run_tool(load))
        assert code == 0 or _is_refusal(code, message), message

    assert load() == 0
    return fuzz("a mutated config", files, open_it, (), n, must="loaded, or one line")


def hostile_configs(folder: Path) -> Row:
    """Start the program with configs that were made to crash it, to stop it or to run code."""
    row = Row("a hostile config", "one line, exit code 2")
    for number, (name, config) in enumerate(_attacks(folder)):
        if isinstance(config, str):
            text, config = config, folder / f"attack-{number}.yaml"
            config.write_text(text, errors="surrogatepass")
        row.tried += 1
        row.wrong += [f"{name}: {problem}" for problem in _problems(config)]
        if (folder / "executed").exists():
            row.wrong.append(f"{name}: code of the config ran")
            (folder / "executed").unlink()
    return row


def _problems(config: Path) -> Iterator[str]:
    """Load a config as the program does, and yield each way in which the refusal is not the expected line."""

    def too_long(signum: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        code, message = _outcome(lambda: run_main("-c", config, "--print_config"))
        if not _is_refusal(code, message):
            yield f"exit code {code}, {message[:300]!r}"
    except BaseException as error:
        yield repr(error)[:300]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _outcome(run: Callable[[], int]) -> tuple[int, str]:
    """Return the exit code of a program, and the text on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        code = run()
    return code, stderr.getvalue().removesuffix("\n")


def _is_refusal(code: int, message: str) -> bool:
    return code == 2 and message.startswith("error: ") and not CONTROL.search(message) and len(message) < 5_000


def _attacks(folder: Path) -> Iterator[tuple[str, str | Path]]:
    """Yield the name of each attack with a config, as text or as a file."""
    yield from _numbers()
    yield from _keys_and_texts()
    yield from _files(folder)
    yield from _yaml(folder)
    for section in ("model: {name: timm/resnet18, ", "distill: {teacher: timm/resnet18, pretrained: weights.pth, "):
        for argument in (
            *(
                "checkpoint_path: evil.pth",
                "cache_dir: /tmp/evil",
                "pretrained_cfg: {file: evil.pth}",
                "pretrained_strict: false",
            ),
            *("pretrained_cfg_overlay: {url: 'http://evil'}", "scriptable: true", "features_only: true", "num_classes: 7"),
        ):
            config = f"{section}{argument}}}\ndata: {{name: digits}}\ntrain: {{n_steps: 10}}\n"
            yield argument, config if section.startswith("model") else f"{config}model: {{name: lenet}}\n"


def _numbers() -> Iterator[tuple[str, str]]:
    keys = ("train.optim.lr", "train.clip_grad_norm", "augment.mixup", "train.optim.nesterov", "eval.tta", "data.n_train")
    for key in keys:
        for value in (".inf", "-.inf", ".nan", "1e999", "1" + 23 * "0", "-9223372036854775809", "0x" + 6_000 * "f", 5_000 * "9"):
            yield f"{key} {value[:30]}", _nested(key, value)
    for key, value in (("seed", "1" + 23 * "0"), ("seed", "-1"), ("data.std", "[.nan]"), ("augment.scale", "[0.1, .inf]")):
        yield f"{key} {value}", _nested(key, value)
    yield "infinity deep inside", _nested("model.layers", "[1, [2, {a: [.inf]}]]")


def _keys_and_texts() -> Iterator[tuple[str, str]]:
    for key in (
        "1",
        "1.5",
        "null",
        "true",
        ".nan",
        "0x" + 6_000 * "f",
        "[a]",
        "{a: 1}",
        "''",
        '"\\e[31m"',
        '"a\\nb"',
        "? |\n  a\n",
    ):
        yield f"a key {key[:20]!r}", f"{RUN}{key}: 1\n"
        yield f"a key {key[:20]!r} in a section", f"{RUN}augment:\n  {key}: 1\n"
        yield (
            f"a key {key[:20]!r} among arguments",
            f"data: {{name: digits}}\ntrain: {{n_steps: 1}}\nmodel:\n  name: lenet\n  {key}: 1\n",
        )
    for text in ('"\\0"', '"\\e]0;title\\a"', '"a\\nb"', '"\\ud800"', '"\\u202eevil"'):
        for key in ("model.name", "data.dataroot", "train.optim.type", "distill.teacher", "task"):
            yield f"{key} {text}", _nested(key, text)
    yield "a long text", _nested("train.precision", "x" * 900_000)


def _nested(key: str, value: str) -> str:
    """Return a config that can run but for this value."""
    values: dict[str, dict[str, str] | str] = {"data": {"name": "digits"}, "model": {"name": "lenet"}, "train": {"n_steps": "10"}}
    section, _, rest = key.partition(".")
    for part in reversed(rest.split(".")[1:]):
        value = f"{{{part}: {value}}}"
    if rest:
        values = {**values, section: {**values.get(section, {}), rest.partition(".")[0]: value}}  # type: ignore[dict-item]  # a section
    else:
        values[section] = value
    return "".join(
        f"{k}: {v if isinstance(v, str) else '{' + ', '.join(f'{a}: {b}' for a, b in v.items()) + '}'}\n"
        for k, v in values.items()
    )


def _files(folder: Path) -> Iterator[tuple[str, str | Path]]:
    os.mkfifo(fifo := folder / "fifo.yaml")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "self.yaml").write_text(f"base: self.yaml\n{RUN}")
    (folder / "mutual-a.yaml").write_text("base: mutual-b.yaml\n")
    (folder / "mutual-b.yaml").write_text("base: mutual-a.yaml\n")
    (folder / "huge.yaml").write_bytes(b"a" * 2_000_000)
    (folder / "half.yaml").write_text("#" * 600_000)
    for i in range(40):
        (folder / f"double-{i}.yaml").write_text(f"base: [double-{i + 1}.yaml, double-{i + 1}.yaml]\n" if i < 39 else RUN)
    for i in range(2_000):
        (folder / f"chain-{i}.yaml").write_text(f"base: chain-{i + 1}.yaml\n")
    for name in (
        fifo,
        folder,
        "/dev/zero",
        "/dev/null",
        "/dev/stdin",
        folder / "loop.yaml",
        folder / "huge.yaml",
        folder / ("x" * 300),
    ):
        yield f"-c {str(name)[:40]}", Path(name)
        yield f"base {str(name)[:40]}", f"base: {name}\n{RUN}"
    for name in ("self", "mutual-a", "double-0", "chain-0", "nowhere"):
        yield f"base {name}", f"base: {name}.yaml\n{RUN}"
    for bases in ("[half.yaml, half.yaml]", "[1]", "{a: b}", "3", '"a\\0b"', "[[config.yaml]]", "${seed}"):
        yield f"base {bases}", f"base: {bases}\n{RUN}"


def _yaml(folder: Path) -> Iterator[tuple[str, str]]:
    mark = folder / "executed"
    for tag in ("python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system", "binary", "timestamp"):
        yield tag, f"{RUN}seed: !!{tag} ['touch {mark}']\n"
    yield "anchors that multiply", "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 30))
    yield (
        "merges that multiply",
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{f'*a{i - 1}, ' * 9}]}}\n" for i in range(1, 30)),
    )
    yield "an anchor inside itself", "a: &a [*a]"
    yield "a merge of a number", f"{RUN}<<: 5\n"
    yield "deep nesting", "[" * 100_000
    yield "deep mappings", "{a: " * 5_000
    yield "many values", f"{RUN}a: [{'x,' * 300_000}]\n"
    yield "two documents", f"{RUN}---\n{RUN}"
    yield "a key twice", f"{RUN}seed: 1\nseed: 2\n"
    yield "a list", "- 1\n- 2\n"
    yield "an unknown alias", "a: *b"
    yield "a NUL", f"{RUN}seed: \0\n"
    for value in ("${oc.env:HOME}", "${oc.decode:x}", "${seed}", "${nothing}", "${", "${a:${b}}", "${train}", "???"):
        yield f"a reference {value}", f"{RUN}seed: '{value}'\n"
    yield (
        "references that multiply",
        f"{RUN}eval: {{{', '.join(f'k{i}: ' + repr(f'${{eval.k{i + 1}}}' * 9) for i in range(12))}}}\n",
    )


PARTS: dict[str, Callable[[Path], Row]] = {"mutated configs": mutated_configs, "hostile configs": hostile_configs}

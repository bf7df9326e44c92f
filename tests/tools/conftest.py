from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from tests.running import run_main

SHAPES = ("--data.name", "shapes", "--data.n_train", 192, "--data.n_test", 64, "--train.batch_size", 32)
LENGTH = ("--train.n_epochs", 2, "--train.optim.type", "AdamW", "--train.optim.lr", 0.001)
SMALL_RUNS = {
    "lenet": ("--train.n_epochs", 6, "--train.optim.lr", 0.03, "--data.valid_ratio", 0.2),
    "resnet18": ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", *SHAPES, *LENGTH),
    "googlenet": ("--model.name", "googlenet", *SHAPES, *LENGTH),
    "vit": ("--model.name", "vit_tiny", "--model.depth", 3, "--model.patch_size", 4, *SHAPES, *LENGTH),
}


class SmallRuns(Mapping[str, Path]):
    """The folders of the runs above, each trained on first use. Tests share them and must not change them."""

    def __init__(self, root: Path) -> None:
        self.root, self.trained = root, set()

    def __getitem__(self, name: str) -> Path:
        path = self.root / name
        if name not in self.trained:
            self.trained.add(name)
            argv = ("--data.img_size", 28 if name == "lenet" else 32, *SMALL_RUNS[name])
            with torch.enable_grad():  # the requesting test may have disabled gradients
                assert run_main("-e", path, *argv) == 0
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(SMALL_RUNS)

    def __len__(self) -> int:
        return len(SMALL_RUNS)


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory) -> SmallRuns:
    """Real runs of LeNet (on digits), ResNet-18, GoogLeNet and ViT (on shapes), each trained in seconds."""
    return SmallRuns(tmp_path_factory.mktemp("small-runs"))

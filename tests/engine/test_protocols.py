"""Training with a task, a metric and loaders that implement only their protocols."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from datasets import DatasetSpec, Loaded
from datasets.pipeline.catalog import DATASETS
from engine import load_config, train

SMALL = {"train.n_epochs": 2, "train.batch_size": 32, "train.optim.lr": 0.05}


class BareMetric:
    def __init__(self):
        self.counted = torch.zeros(2, dtype=torch.float64)

    def update(self, model, batch):
        logits = model(batch[0])
        self.counted += torch.tensor([(logits.argmax(1) == batch[1]).sum(), len(logits)])

    def sums(self):
        return self.counted

    def compute(self, sums):
        return {"share": float(sums[0] / sums[1])}


class BareTask:
    monitor = "share"
    shown = ("share",)

    def weight(self, batch):
        return len(batch[1])

    def loss_sum(self, model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return loss, {"loss": loss}

    def metric(self, device):
        return BareMetric()

    def with_tables(self, *tables):
        return self

    def predict(self, model, batch):
        return model(batch[0]).argmax(1)

    def draw(self, images, batch, predictions):
        from engine.plots.style import new_figure

        return new_figure()


def test_task_with_only_the_protocol_trains(tmp_path):
    result = train(load_config(None, SMALL), exp_dir=tmp_path / "run", task=BareTask())
    assert result.status == "completed"
    assert result.best["valid/share"] > 0.2


class BareNormalization:
    def undo(self, images):
        return images


class BareTrainLoader:
    def __init__(self, split, order):
        self.split, self.order, self.normalize = split, order, BareNormalization()

    def batches(self, first, last):
        for step in range(first, last):
            samples = self.order.samples(step)
            yield self.split.images[samples], self.split.labels[samples]


class BareEvalLoader:
    n_common_batches = 0  # set by the function that creates the loader

    def __init__(self, split):
        self.split = split

    def batches(self):
        yield self.split.images, self.split.labels


@dataclass
class BareSplit:
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return BareSplit(self.images[indices], self.labels[indices])

    def train_loader(self, order, prepare, workers, device):
        return BareTrainLoader(self, order)

    def eval_loader(self, batch_size, prepare, workers, device):
        return BareEvalLoader(self)


def test_loaders_with_only_the_protocol_train(tmp_path):
    def load(source):
        labels = torch.arange(128) % 2
        images = torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1)
        split = BareSplit(images, labels)
        return Loaded(split, split, ("dark", "light"))

    spec = DatasetSpec("bare", load, channels=1, img_size=28, mean=(0.5,), std=(0.5,), n_classes=2)
    DATASETS.register([spec], "this test")
    try:
        config = load_config(None, {**SMALL, "data.name": "bare", "train.n_epochs": 5})
        result = train(config, exp_dir=tmp_path / "run")
    finally:
        del DATASETS.entries["bare", "classes"]
    assert result.status == "completed"
    assert result.best["valid/acc@1"] > 0.9

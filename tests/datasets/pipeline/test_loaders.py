import pytest
import torch

from datasets import Images, Source, find_dataset
from datasets.pipeline.loaders import EvalLoader, Normalization, TrainLoader, eval_loader, train_loader
from datasets.pipeline.order import Order
from datasets.pipeline.preparation import Preparation
from datasets.pipeline.workers import Workers
from tests import on_disk

CPU = torch.device("cpu")
PREPARE = Preparation(
    img_size=24,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    augment=True,
    crop_padding=2,
    padding_mode="constant",
    hflip=True,
    cutout=0,
    color_jitter=0.3,
    scale=(0.3, 1.0),
    crop_pct=0.875,
)


@pytest.fixture(scope="module")
def in_files(data_root):
    return find_dataset("imagefolder").load(Source(data_root / "imagefolder")).train


@pytest.fixture(scope="module")
def in_memory():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 24, 24), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(24))


def batches(split, first, last, n_workers=0, **order):
    loader = train_loader(split, Order(len(split), 6, seed=1, **order), PREPARE, Workers(n_workers), CPU)
    return list(loader.batches(first, last))


def assert_same(a, b):
    assert len(a) == len(b)
    for (images_a, labels_a), (images_b, labels_b) in zip(a, b, strict=True):
        assert torch.equal(images_a, images_b)
        assert torch.equal(labels_a, labels_b)


@pytest.mark.parametrize("kind", ["in_files", "in_memory"])
def test_batches_are_the_same_after_a_jump_into_the_third_epoch(kind, request):
    split = request.getfixturevalue(kind)
    assert_same(batches(split, 0, 14)[10:], batches(split, 10, 14))


def test_batches_are_the_same_with_any_number_of_workers(in_files):
    without = batches(in_files, 2, 7)
    assert_same(without, batches(in_files, 2, 7, n_workers=1))
    assert_same(without, batches(in_files, 2, 7, n_workers=2))


@pytest.mark.parametrize("kind", ["in_files", "in_memory"])
def test_two_ranks_see_the_halves_of_each_batch(kind, request):
    split = request.getfixturevalue(kind)
    halves = [batches(split, 0, 4, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, first, second in zip(batches(split, 0, 4), *halves, strict=True):
        assert torch.equal(whole[0], torch.cat([first[0], second[0]]))
        assert torch.equal(whole[1], torch.cat([first[1], second[1]]))


@pytest.mark.parametrize("n", [1, 7, 23, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_sample_once(in_memory, n, world_size):
    split = in_memory.subset(torch.arange(n))
    seen = []
    for rank in range(world_size):
        seen += [labels for _, labels in eval_loader(split, 6, rank, world_size, PREPARE, Workers(), CPU).batches()]
    assert torch.equal(torch.cat(seen), torch.arange(n))


@pytest.fixture(scope="module")
def splits(in_files, in_memory, tmp_path_factory):
    """One split of each kind."""
    folder = tmp_path_factory.mktemp("splits")
    on_disk.write_pairs(folder / "pairs", n=12)
    on_disk.write_coco(folder / "coco", n_train=12)
    shapes = {"n_train": 12, "n_test": 6, "size": 32}
    return {
        "images": in_memory,
        "files": in_files,
        "images with masks": find_dataset("shapes", "masks").load(Source(None), **shapes).train,
        "files with masks": find_dataset("pairs", "masks").load(Source(folder / "pairs")).train,
        "images with boxes": find_dataset("shapes", "boxes").load(Source(None), **shapes).train,
        "files with boxes": find_dataset("cocojson", "boxes").load(Source(folder / "coco")).train,
    }


@pytest.mark.parametrize("kind", ["images", "files", *(f"{a} with {b}" for a in ("images", "files") for b in ("masks", "boxes"))])
def test_every_loader_has_what_its_protocol_lists(splits, kind):
    order = Order(len(splits[kind]), 4, seed=1)
    loader = train_loader(splits[kind], order, PREPARE, Workers(), CPU)
    assert isinstance(loader, TrainLoader)
    assert isinstance(loader.normalize, Normalization)
    assert loader.order is order
    (batch,) = loader.batches(1, 2)
    images = loader.normalize.undo(batch[0])
    assert images.shape[:2] == (4, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    evaluation = eval_loader(splits[kind], 4, 0, 1, PREPARE, Workers(), CPU)
    assert isinstance(evaluation, EvalLoader)
    assert evaluation.n_common_batches == len(list(evaluation.batches()))


def test_the_number_of_common_batches_is_the_same_on_every_rank(in_memory):
    loaders = [eval_loader(in_memory.subset(torch.arange(13)), 6, rank, 2, PREPARE, Workers(), CPU) for rank in (0, 1)]
    assert [loader.n_common_batches for loader in loaders] == [1, 1]
    assert [len(list(loader.batches())) for loader in loaders] == [1, 2]

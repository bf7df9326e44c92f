"""The datasets, read from files in their real format."""

import gzip
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch

from datasets import Source, find_dataset, list_datasets, mnist
from datasets.pipeline.downloads import unpack_tar
from datasets.pipeline.splits import Images, hold_out
from models.loading.files import MalformedFile
from tests import on_disk
from tests.faults.hostile_files import PIXELS, python2_batch


def load(name, root, **options):
    return find_dataset(name).load(Source(root, verify=False, download=False), **options)


def test_case_and_dashes_of_a_name_do_not_matter():
    assert find_dataset("cifar10") is find_dataset("CIFAR-10") is find_dataset("Cifar_10")
    with pytest.raises(ValueError, match="did you mean CIFAR-100"):
        find_dataset("CIFAR-1000")
    assert {"digits", "MNIST", "FashionMNIST", "CIFAR-10", "CIFAR-100", "imagefolder", "ImageNet"} <= set(list_datasets())


def test_digits_hold_out_a_fifth_by_the_seed_with_every_class_in_proportion():
    first, again, other = (find_dataset("digits").load(Source(None, seed=seed)) for seed in (1, 1, 2))
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)
    assert first.test.labels.bincount().min() >= 34


def test_the_statistics_of_digits_are_those_of_the_data():
    train, spec = find_dataset("digits").load(Source(None, seed=1234)).train, find_dataset("digits")
    assert train.images.float().div(255).mean().item() == pytest.approx(spec.mean[0], abs=0.005)
    assert train.images.float().div(255).std().item() == pytest.approx(spec.std[0], abs=0.005)


def test_cifar_has_the_pixels_and_labels_of_its_files(data_root):
    from torchvision.datasets import CIFAR10

    loaded = load("CIFAR-10", data_root / "CIFAR-10")
    with (data_root / "CIFAR-10" / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        entry = pickle.load(file, encoding="latin1")
    assert torch.equal(loaded.test.labels, torch.tensor(entry["labels"]))
    assert np.array_equal(loaded.test.images[3].numpy(), entry["data"][3].reshape(3, 32, 32))
    assert len(loaded.train) == 60
    assert CIFAR10.base_folder == "cifar-10-batches-py"
    assert len(load("CIFAR-100", data_root / "CIFAR-100").classes) == 100


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_is_read_as_python_2_and_3_pickle_it(tmp_path, protocol):
    """The published files are from Python 2, in which bytes were text."""
    folder = on_disk.write_cifar10(tmp_path, n_train=5, n_test=1) / "cifar-10-batches-py"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    (folder / "data_batch_1").write_bytes(python2_batch(2).replace(PIXELS * 2, pixels.tobytes()))
    for i, array in ((2, pixels), (3, np.asfortranarray(pixels))):
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps({"data": array, "labels": [7, 8]}, protocol))
    loaded = load("CIFAR-10", tmp_path).train
    assert np.array_equal(loaded.images[:6].flatten(1).numpy(), np.concatenate([pixels] * 3))
    assert loaded.labels[:6].tolist() == [3, 3, 7, 8, 7, 8]


def test_an_array_may_be_larger_than_what_an_archive_may_hold(tmp_path, monkeypatch):
    content = bytes([0, 0, 8, 1, 0, 0, 0, 9]) + b"123456789"
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(mnist, "MAX_UNPACKED", 8)
    assert bytes(mnist.read_idx(tmp_path / "a").numpy()) == b"123456789"
    with pytest.raises(MalformedFile, match=r"a\.gz: its header declares 9 bytes, more than 8"):
        mnist.read_idx(tmp_path / "a.gz")


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_packed_and_unpacked_as_torchvision_reads_it(tmp_path, packed):
    from torchvision.datasets import MNIST

    loaded = load("MNIST", on_disk.write_mnist(tmp_path / "ours", packed=packed))
    theirs = MNIST(on_disk.write_mnist(tmp_path / "theirs"), train=False)
    assert torch.equal(loaded.test.images[:, 0], theirs.data)
    assert torch.equal(loaded.test.labels, theirs.targets)


def test_checksums_are_verified_by_default(data_root):
    for name in ("CIFAR-10", "MNIST"):
        with pytest.raises(OSError, match="not the published file"):
            find_dataset(name).load(Source(data_root / name, verify=True, download=False))


def test_an_image_folder_has_its_classes_and_paths(data_root):
    loaded = load("imagefolder", data_root / "imagefolder")
    assert loaded.classes == ("class_0", "class_1", "class_2")
    assert (len(loaded.train), len(loaded.test)) == (24, 9)
    assert loaded.train.paths[9].endswith(b"class_1/0001.jpg")
    assert loaded.train.labels[9] == 1


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (lambda root: shutil.rmtree(root), "train: no such folder"),
        (lambda root: shutil.copytree(root / "val", root / "valid"), "val and .*/valid: there can be one folder"),
        (
            lambda root: (
                [shutil.move(root / "val" / f"class_{i}" / "0000.jpg", root / "val" / f"{i}.jpg") for i in range(3)]
                + [shutil.rmtree(root / "val" / f"class_{i}") for i in range(3)]
            ),
            "val holds no class folders",
        ),
        (lambda root: shutil.rmtree(root / "train"), "train: no such folder"),
        (lambda root: (root / "train" / "empty").mkdir(), "empty holds no image"),
        (lambda root: shutil.move(root / "val" / "class_0", root / "val" / "other"), "other is a class that"),
    ],
)
def test_the_error_describes_the_problem_of_an_image_folder(tmp_path, breaks, expected):
    root = on_disk.write_image_folder(tmp_path / "set")
    breaks(root)
    with pytest.raises(OSError, match=expected):
        load("imagefolder", root)


def test_a_cifar_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    root = on_disk.write_cifar10(tmp_path / "set")
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(OSError, match="data_batch_2: refused"):
        load("CIFAR-10", root)
    assert not (tmp_path / "executed").exists()


def test_the_error_names_a_truncated_archive(tmp_path):
    root = on_disk.write_mnist(tmp_path, packed=True)
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(OSError, match=r"train-images-idx3-ubyte.gz: it can't be unpacked"):
        load("MNIST", root)


@pytest.mark.parametrize("keep", [0, 100])
def test_the_error_names_a_truncated_file(tmp_path, keep):
    cifar, mnist = on_disk.write_cifar10(tmp_path / "cifar"), on_disk.write_mnist(tmp_path / "mnist")
    for path in (cifar / "cifar-10-batches-py" / "test_batch", mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"):
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match="test_batch"):
        load("CIFAR-10", cifar)
    with pytest.raises(OSError, match="t10k-images"):
        load("MNIST", mnist)


def test_the_error_names_a_label_out_of_range(tmp_path):
    root = on_disk.write_mnist(tmp_path)
    path = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(OSError, match="the label 11"):
        load("MNIST", root)


def test_the_error_names_a_cifar_file_with_a_label_out_of_range(tmp_path):
    path = on_disk.write_cifar10(tmp_path) / "cifar-10-batches-py" / "data_batch_3"
    entry = pickle.loads(path.read_bytes())
    entry["labels"][2] = 10
    path.write_bytes(pickle.dumps(entry))
    with pytest.raises(OSError, match=r"data_batch_3: it holds a label outside 0 to 9"):
        load("CIFAR-10", tmp_path)


def test_an_archive_with_a_path_outside_its_folder_is_an_error_and_writes_nothing(tmp_path):
    (tmp_path / "evil.txt").write_text("evil")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "evil.txt", arcname="good.txt")
        tar.add(tmp_path / "evil.txt", arcname="../../climbed.txt")
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OSError, match="can't be unpacked"):
        unpack_tar(tmp_path / "set.tar.gz", tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    assert not (tmp_path / "climbed.txt").exists()


def test_a_hold_out_depends_on_the_seed_and_puts_every_sample_on_one_side(data_root):
    whole = load("CIFAR-10", data_root / "CIFAR-10").train
    kept, held_out = hold_out(whole, 0.2, seed=1)
    assert (len(kept), len(held_out)) == (48, 12)
    again = hold_out(whole, 0.2, seed=1)[1]
    assert torch.equal(held_out.images, again.images)
    rows = torch.cat([kept.images, held_out.images]).flatten(1).unique(dim=0)
    assert len(rows) == 60
    with pytest.raises(ValueError, match="leaves one side empty"):
        hold_out(whole, 0.001, seed=1)


@pytest.mark.parametrize("counts", [(40, 10, 5), (1, 30, 2), (3, 3, 3, 3), (100, 0, 7)])
def test_a_hold_out_by_class_takes_the_same_share_of_each(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    whole = Images(torch.arange(len(labels)).view(-1, 1, 1, 1), labels)
    kept, held_out = hold_out(whole, 0.2, seed=3, by_class=True)
    assert len(held_out) == round(0.2 * len(labels))
    assert torch.equal(torch.cat([kept.images, held_out.images]).flatten().sort().values, torch.arange(len(labels)))
    for label, n in enumerate(counts):
        taken = int((held_out.labels == label).sum())
        assert abs(taken - 0.2 * n) <= 1
        assert taken < n or n == 0
    assert torch.equal(hold_out(whole, 0.2, seed=3, by_class=True)[1].images, held_out.images)
    assert not torch.equal(hold_out(whole, 0.2, seed=4, by_class=True)[1].images, held_out.images)

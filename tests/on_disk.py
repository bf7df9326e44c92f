"""Small datasets in the formats of the published ones."""

import csv
import gzip
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tools.benchmarks import random_sets
from tools.benchmarks.random_sets import write_cifar10


def write_cifar100(root: Path) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in (("train", 60), ("test", 20)):
        pixels = random.integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": random.integers(0, 100, n).tolist()}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}, protocol=2))
    return root


def write_mnist(root: Path, name: str = "MNIST", *, packed: bool = False) -> Path:
    """Write the four files, as .gz if they are `packed`."""
    random_sets.write_mnist(root, name)
    for path in sorted((root / name / "raw").iterdir()) if packed else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return root


def write_image_folder(root: Path, n_classes: int = 3, n_train: int = 8, n_val: int = 3, seed: int = 0) -> Path:
    """Write JPEGs of different sizes; `n_train` and `n_val` are per class."""
    random = np.random.default_rng(seed)
    for part, n in (("train", n_train), ("val", n_val)):
        for c in range(n_classes):
            folder = root / part / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                height, width = random.integers(40, 80, 2)
                coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((int(width), int(height))).save(folder / f"{i:04d}.jpg")
    return root


def labeled_images(root: Path) -> dict[str, list[tuple[Path, int]]]:
    """Return the images of an image folder, and their labels, by split and in order."""
    return {
        part: [(path, label) for label, folder in enumerate(sorted((root / part).iterdir())) for path in sorted(folder.iterdir())]
        for part in ("train", "val")
    }


def write_table(root: Path, n_train: int = 8) -> Path:
    """Write an image folder, and tables of its images beside its train/ and val/."""
    for part, images in labeled_images(write_image_folder(root, n_train=n_train)).items():
        with (root / f"{part}.csv").open("w", newline="") as file:
            rows = [(path.relative_to(root), f"class_{label}") for path, label in images]
            csv.writer(file).writerows([("path", "label"), *rows])
    return root


def write_parquet(root: Path, image_folder: Path) -> Path:
    """Write the images of an image folder into parquet files, as the Hugging Face Hub stores them."""
    import pyarrow as pa
    from pyarrow import parquet

    (root / "data").mkdir(parents=True)
    names = [f"class_{i}" for i in range(3)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    for part, images in labeled_images(image_folder).items():
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in images]
        table = pa.table({"image": cells, "label": [label for _, label in images]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        name = {"train": "train", "val": "validation"}[part]
        parquet.write_table(table, root / "data" / f"{name}-00000-of-00001.parquet", row_group_size=5)
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(root: Path, image_folder: Path, per_shard: int = 10) -> Path:
    """Write the images of an image folder into tar files, as WebDataset's writer does."""
    for part, images in labeled_images(image_folder).items():
        samples = [
            [(f"{i:06d}.cls", b"%d" % label), (f"{i:06d}.jpg", path.read_bytes())] for i, (path, label) in enumerate(images)
        ]
        for first in range(0, len(samples), per_shard):
            path = root / f"{part}-{first // per_shard:06d}.tar"
            write_tar(path, [member for sample in samples[first : first + per_shard] for member in sample])
    (root / "classes.txt").write_text("class_0\nclass_1\nclass_2\n")
    return root


def write_pairs(folder: Path, n: int = 8, n_classes: int = 3, seed: int = 0, ending: str = ".jpg") -> Path:
    """Write images/ and masks/ of different sizes. The class determines the color of a pixel; the top two rows are ignored."""
    random = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(n):
        height, width = (int(side) for side in random.integers(30, 70, 2))
        classes = random.integers(0, n_classes, (3, 3), dtype=np.uint8)
        mask = np.array(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
        image = np.stack([mask * (250 // n_classes), 255 - mask * (250 // n_classes), np.full_like(mask, 100)], axis=-1)
        mask[:2] = 255
        Image.fromarray(image).save(folder / "images" / f"{i:04d}{ending}", quality=95)
        Image.fromarray(mask).save(folder / "masks" / f"{i:04d}.png")
    return folder


def write_voc(root: Path, n_train: int = 6, n_val: int = 3) -> Path:
    """Write the folders of the unpacked archive. The masks have a palette, like the published ones."""
    folder = root / "VOCdevkit" / "VOC2012"
    made = write_pairs(root / "made", n_train + n_val, n_classes=21)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (made / "images").rename(folder / "JPEGImages")
    (made / "masks").rename(folder / "SegmentationClass")
    made.rmdir()
    for path in (folder / "SegmentationClass").iterdir():
        mask = Image.open(path)
        mask.putpalette(list(range(256)) * 3)
        mask.save(path)
    names = [f"{i:04d}" for i in range(n_train + n_val)]
    for kind in ("Segmentation", "Main"):
        (folder / "ImageSets" / kind).mkdir(exist_ok=True)
        for part, in_part in (("train", names[:n_train]), ("trainaug", names[:n_train]), ("val", names[n_train:])):
            (folder / "ImageSets" / kind / f"{part}.txt").write_text("".join(f"{name}\n" for name in in_part))
    (folder / "Annotations").mkdir()
    for i, name in enumerate(names):
        width, height = Image.open(folder / "JPEGImages" / f"{name}.jpg").size
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        box = f"<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>{width}</xmax><ymax>20</ymax></bndbox>"
        cat = f"<object><name>cat</name><difficult>{i % 2}</difficult>{box}</object>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{cat}</annotation>")
    return root


def write_coco(
    root: Path,
    n_train: int = 6,
    n_val: int = 3,
    parts: tuple[str, str] = ("train", "val"),
    seed: int = 0,
    category_ids: tuple[int, int] = (1, 3),
    ending: str = ".jpg",
) -> Path:
    """Write images of different sizes with one to three boxes in their category's color; the last image of a split has none."""
    random = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": category, "name": name} for category, name in zip(category_ids, ("red", "blue"), strict=True)]
    for part, n in zip(parts, (n_train, n_val), strict=True):
        (root / part).mkdir()
        content: dict = {"images": [], "annotations": [], "categories": categories}
        for i in range(n):
            height, width = (int(side) for side in random.integers(40, 70, 2))
            pixels = np.full((height, width, 3), 200, dtype=np.uint8)
            content["images"].append({"id": 100 + i, "file_name": f"{i:06d}{ending}", "height": height, "width": width})
            for _ in range(random.integers(1, 4) if i < n - 1 else 0):
                (left, top), (across, down) = random.integers(0, 20, 2).tolist(), random.integers(8, 20, 2).tolist()
                is_blue = int(random.choice([0, 1]))
                pixels[top : top + down, left : left + across] = (30, 30, 220) if is_blue else (220, 30, 30)
                one = {"id": len(content["annotations"]) + 1, "image_id": 100 + i, "iscrowd": 0}
                one["category_id"] = category_ids[is_blue]
                content["annotations"].append({**one, "bbox": [left, top, across, down], "area": across * down})
            Image.fromarray(pixels).save(root / part / f"{i:06d}{ending}", quality=95)
        name = f"instances_{part}.json" if parts != ("train", "val") else f"{part}.json"
        (root / "annotations" / name).write_text(json.dumps(content))
    return root


def write_yolo(root: Path, n_train: int = 6, n_val: int = 3) -> Path:
    """Write the folders of Ultralytics, with the images and boxes of write_coco; the last image of a split has no label file."""
    made = write_coco(root / "made", n_train, n_val, category_ids=(0, 1))
    for part in ("train", "val"):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "labels" / part).mkdir(parents=True)
        (made / part).rename(root / "images" / part)
        content = json.loads((made / "annotations" / f"{part}.json").read_text())
        sizes = {image["id"]: (image["width"], image["height"], image["file_name"]) for image in content["images"]}
        for one in content["annotations"]:
            width, height, name = sizes[one["image_id"]]
            (left, top, across, down), label = one["bbox"], (root / "labels" / part / name).with_suffix(".txt")
            box = ((left + across / 2) / width, (top + down / 2) / height, across / width, down / height)
            with label.open("a") as file:
                file.write(" ".join((str(one["category_id"]), *(f"{value:.6f}" for value in box))) + "\n")
    shutil.rmtree(made)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\ntest:\nnames:\n  0: red\n  1: blue\n")
    return root


def write_all(root: Path) -> Path:
    """Write every dataset that the configs of this project use, each in a separate folder."""
    write_cifar10(root / "CIFAR-10")
    write_cifar100(root / "CIFAR-100")
    write_mnist(root / "MNIST")
    write_mnist(root / "FashionMNIST", "FashionMNIST")
    write_image_folder(root / "ImageNet")
    write_image_folder(root / "imagefolder")
    write_table(root / "table")
    write_voc(root / "VOC")
    write_coco(root / "COCO", parts=("train2017", "val2017"))
    write_yolo(root / "YOLO")
    write_pairs(root / "pairs")
    return root

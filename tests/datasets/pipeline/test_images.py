"""Images in files: decoding, cropping, distortion, and reproducibility."""

import io
import math
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision.models import EfficientNet_B0_Weights, ResNet50_Weights
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as v2

from datasets import Files
from datasets.pipeline import images as files
from datasets.pipeline.images import EvaluationImages, ImageFile, Request, TrainingImages, UnreadableImage, random_box
from datasets.pipeline.loaders import eval_loader, train_loader
from datasets.pipeline.order import Order
from datasets.pipeline.preparation import Preparation
from datasets.pipeline.workers import ReusedMemory, Workers
from tests.running import run_command

CPU = torch.device("cpu")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def photograph(height=375, width=500, seed=0):
    """An image that is smooth at large scales and grainy at small ones, as photographs are."""
    random = np.random.default_rng(seed)
    layers = [
        strength * np.asarray(Image.fromarray(random.normal(size=(n, n)).astype(np.float32)).resize((width, height)))
        for n, strength in ((4, 60), (16, 30), (64, 15))
    ]
    gray = 128 + sum(layers) + random.normal(0, 4, (height, width))
    color = np.stack([gray, np.roll(gray, height // 3, 0), np.roll(gray, width // 4, 1)], axis=-1)
    return Image.fromarray(color.clip(0, 255).astype(np.uint8))


WRITE = {
    "photograph.jpg": lambda path: photograph().save(path, quality=90),
    "upright.jpg": lambda path: photograph(611, 407).save(path, quality=75, progressive=True, subsampling=0),
    "large.jpg": lambda path: photograph(1296, 1704).save(path, quality=85),
    "small.jpg": lambda path: photograph(97, 61).save(path, quality=95),
    "gray.jpg": lambda path: photograph().convert("L").save(path),
    "print.jpg": lambda path: photograph().convert("CMYK").save(path),
    "drawing.png": lambda path: photograph().quantize(16).save(path),
    "clear.png": lambda path: photograph().convert("RGBA").save(path),
    "still.webp": lambda path: photograph().save(path, lossless=True),
    "frame.gif": lambda path: photograph().save(path),
    "plain.bmp": lambda path: photograph().save(path),
    "named_wrongly.jpg": lambda path: photograph().save(path, format="PNG"),
    "scanned.tif": lambda path: photograph().save(path, compression="tiff_lzw"),
    "print.tiff": lambda path: photograph().convert("CMYK").save(path),
    "still.avif": lambda path: photograph().save(path),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, write in WRITE.items():
        write(folder / name)
    return folder


def preparation(**kwargs):
    common = {"augment": True, "crop_padding": 0, "padding_mode": "constant", "hflip": True, "cutout": 0}
    return Preparation(**{"img_size": 24, **HALF, **common, **kwargs})


def training_images(**kwargs):
    prepare = preparation(**{"img_size": 224, "hflip": False, **kwargs})
    images = TrainingImages(prepare, seed=1)
    images.img_size = prepare.img_size  # read() uses it
    return images


def read(images, paths, epoch=0):
    out = torch.zeros(len(paths), 3, images.img_size, images.img_size, dtype=torch.uint8)
    images(Request(np.array([str(path).encode() for path in paths]), np.arange(len(paths)), epoch), out)
    return out


@pytest.fixture(scope="module")
def split(data_root):
    paths = sorted((data_root / "imagefolder" / "train").glob("*/*.jpg"))
    return Files(np.array([str(path).encode() for path in paths]), torch.arange(len(paths)))


# Evaluation


def evaluated(path, prepare):
    one = Files(np.array([str(path).encode()]), torch.zeros(1, dtype=torch.int64))
    ((images, _),) = eval_loader(one, 1, 0, 1, prepare, Workers(), CPU).batches()
    return images[0]


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize(
    ("weights", "crop_pct", "interpolation"),
    [
        (ResNet50_Weights.IMAGENET1K_V1, 0.875, "bilinear"),
        (ResNet50_Weights.IMAGENET1K_V2, 224 / 232, "bilinear"),
        (EfficientNet_B0_Weights.IMAGENET1K_V1, 0.875, "bicubic"),
    ],
    ids=["resize 256", "resize 232", "bicubic"],
)
def test_evaluation_equals_the_transforms_of_torchvisions_weights(pictures, name, weights, crop_pct, interpolation):
    theirs = weights.transforms()(Image.open(pictures / name).convert("RGB"))
    ours = evaluated(pictures / name, preparation(img_size=224, crop_pct=crop_pct, interpolation=interpolation, **IMAGENET))
    in_pixels = (ours - theirs) * torch.tensor(IMAGENET["std"]).view(3, 1, 1)
    assert in_pixels.abs().max() <= 1 / 255


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize(
    ("img_size", "crop_pct", "interpolation"), [(224, 0.9, "bicubic"), (299, 0.875, "bilinear"), (64, 1.0, "bicubic")]
)
def test_evaluation_equals_timms_transform(pictures, name, img_size, crop_pct, interpolation):
    transform = create_transform(img_size, crop_pct=crop_pct, interpolation=interpolation, **HALF)
    theirs = transform(Image.open(pictures / name).convert("RGB"))
    ours = evaluated(pictures / name, preparation(img_size=img_size, crop_pct=crop_pct, interpolation=interpolation))
    assert (ours - theirs).abs().max() * 0.5 <= 1 / 255


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_scaled_by_torch_is_at_most_two_levels_off(pictures, interpolation):
    for name in WRITE:
        by_pillow, by_torch = (
            evaluated(pictures / name, preparation(img_size=224, interpolation=interpolation, resize_by_torch=by_torch))
            for by_torch in (False, True)
        )
        levels = (by_pillow - by_torch).abs() * 0.5 * 255
        assert levels.max() < 2.1
        assert levels.mean() < 0.01


@pytest.mark.parametrize("name", [name for name in WRITE if name.endswith(".jpg")])
def test_every_pixel_of_a_jpeg_is_as_pillow_decodes_it(pictures, name):
    expected = np.array(Image.open(pictures / name).convert("RGB"))
    file = ImageFile(str(pictures / name))
    assert file.is_plain_jpeg == (name not in ("print.jpg", "named_wrongly.jpg"))
    assert np.array_equal(file.pixels(), expected)
    assert np.array_equal(file.decode(), expected)


def test_without_augmentation_training_sees_what_evaluation_sees(split):
    prepare = preparation(augment=False)
    images, labels = next(train_loader(split, Order(len(split), 6, seed=1), prepare, Workers(), CPU).batches(0, 1))
    evaluation = torch.cat([batch for batch, _ in eval_loader(split, 7, 0, 1, prepare, Workers(), CPU).batches()])
    assert torch.equal(images, evaluation[labels])


# 16 bits, and formats that need a package


LEVELS = np.arange(0, 65536, 13, dtype=np.uint16)[:5000].reshape(50, 100)


def png_of_16_bits(pixels):
    """Write a PNG of 16-bit gray or RGB, which Pillow can't."""
    kind, (height, width) = {2: 0, 3: 2}[pixels.ndim], pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    for tag, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
    return content


def tiff_of_16_bits(byte_order):
    file = io.BytesIO()
    mode = {"<": "I;16", ">": "I;16B"}[byte_order]
    Image.frombytes(mode, LEVELS.shape[::-1], LEVELS.astype(f"{byte_order}u2").tobytes()).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [png_of_16_bits(LEVELS), tiff_of_16_bits("<"), tiff_of_16_bits(">")], ids=["PNG", "TIFF", "big-endian TIFF"]
)
def test_gray_levels_of_16_bits_are_scaled_to_8(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    file = ImageFile(str(tmp_path / "x"))
    expected = np.rint(LEVELS / 257).astype(np.uint8)
    assert np.array_equal(file.decode(), np.stack([expected] * 3, axis=-1))
    assert np.array_equal(file.pixels(), np.stack([expected] * 3, axis=-1))


def test_colors_of_16_bits_are_at_most_a_level_off(tmp_path):
    colors = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]], axis=-1)
    (tmp_path / "x.png").write_bytes(png_of_16_bits(colors))
    assert np.abs(np.array(ImageFile(str(tmp_path / "x.png")).decode()) - colors / 257).max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_gray_levels_of_unknown_range_are_an_error(tmp_path, dtype):
    Image.fromarray(LEVELS.astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match=r"x\.tif: this image can't be read \(its gray levels .* of unknown range"):
        ImageFile(str(tmp_path / "x.tif")).decode()


def test_heic_is_read_where_pillow_heif_is_installed_and_else_the_error_names_it(tmp_path):
    if not files.HAS_HEIF:
        (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
        assert not {".heic", ".heif"} & set(files.IMAGE_ENDINGS)
        with pytest.raises(UnreadableImage, match=r"x\.heic: .*\(its content is not an image; pip install pillow-heif if it is"):
            ImageFile(str(tmp_path / "x.heic"))
        return
    import pillow_heif

    pillow_heif.from_pillow(photograph()).save(tmp_path / "x.heic", quality=95)
    code = f"from datasets.pipeline.images import ImageFile; print(ImageFile({str(tmp_path / 'x.heic')!r}).decode().size)"
    assert run_command("python", "-c", code).stdout == "(500, 375)\n"  # a process that has read no HEIC before, as a worker


# EXIF


@pytest.fixture(scope="module", params=range(1, 9))
def turned(request, tmp_path_factory):
    """The same picture as a camera held in each way stores it."""
    folder = tmp_path_factory.mktemp("turned")
    exif = Image.Exif()
    exif[0x0112] = request.param
    back = {None: None, **{turn.method: turn.method for turn in files.TURNS.values()}}
    back |= {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
    method = back[files.TURNS.get(request.param, files.UPRIGHT).method]
    stored = photograph() if method is None else photograph().transpose(method)
    for name in ("x.jpg", "x.png", "x.tif", "x.webp"):
        options = {"quality": 95, "subsampling": 0} if name == "x.jpg" else {"lossless": True} if name == "x.webp" else {}
        stored.save(folder / name, exif=exif, **options)
    stored.resize((stored.width * 4, stored.height * 4)).save(folder / "large.jpg", exif=exif)
    return folder


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp", "large.jpg"])
def test_exif_rotate_equals_pillows_exif_transpose(turned, name):
    upright = ImageOps.exif_transpose(Image.open(turned / name)).convert("RGB")
    file = ImageFile(str(turned / name), exif_rotate=True)
    assert (file.width, file.height) == upright.size
    assert np.array_equal(file.decode(), upright)
    assert np.array_equal(file.tensor().permute(1, 2, 0), upright)
    upright.save(turned / "upright.bmp")
    evaluation = EvaluationImages(64, 0.875, "bilinear", exif_rotate=True)
    assert torch.equal(evaluation.read(str(turned / name)), evaluation.read(str(turned / "upright.bmp")))
    ignored = np.array(Image.open(turned / name).convert("RGB"))  # Pillow always turns a TIFF
    assert np.array_equal(ImageFile(str(turned / name)).decode(), ignored)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "large.jpg"])
def test_training_crops_the_turned_picture(turned, name):
    upright = v2.pil_to_tensor(ImageOps.exif_transpose(Image.open(turned / name)).convert("RGB"))
    images = training_images(img_size=96, exif_rotate=True, scale=(0.05, 1.0))
    file = ImageFile(str(turned / name), exif_rotate=True)
    for i in range(20):
        numbers = np.random.default_rng(i).random(22).tolist()
        theirs = v2.resized_crop(upright, *random_box(*upright.shape[1:], (0.05, 1.0), numbers), [96, 96], antialias=True)
        assert (images._cropped(file, 96, numbers).int() - theirs.int()).abs().float().mean() < 1.5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exif_data_that_are_damaged_do_not_stop_a_training(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(40, 60).save(tmp_path / "x.jpg", exif=exif)
    sound = (tmp_path / "x.jpg").read_bytes()
    begin, size = sound.index(b"Exif"), len(exif.tobytes())
    for i in range(begin, begin + size):
        for value in (0, 1, 7, 127, 255):
            (tmp_path / "x.jpg").write_bytes(sound[:i] + bytes([value]) + sound[i + 1 :])
            assert ImageFile(str(tmp_path / "x.jpg"), exif_rotate=True).decode().size in ((60, 40), (40, 60))


def test_the_log_counts_the_first_images_that_exif_data_rotate(tmp_path, caplog):
    caplog.set_level("INFO")
    for i in range(5):
        exif = Image.Exif()
        exif[0x0112] = 6 if i in (1, 3) else 1
        photograph(20, 30).save(tmp_path / f"{i}.jpg", exif=exif)
    paths = np.array([str(tmp_path / f"{i}.jpg").encode() for i in (0, 2, 4, 5)])
    files.log_rotated(paths)
    assert not caplog.text
    files.log_rotated(np.append(paths, [str(tmp_path / "1.jpg").encode(), str(tmp_path / "3.jpg").encode()] * 100))
    assert "EXIF data rotate 96 of the first 100 training images, and are ignored; data.exif_rotate true turns" in caplog.text


# Training


def test_random_boxes_are_distributed_as_torchvisions():
    n = 4000
    torch.manual_seed(0)
    random, image = np.random.default_rng(0), torch.zeros(3, 375, 500)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ours = [random_box(375, 500, (0.08, 1.0), random.random(22).tolist()) for _ in range(n)]
    for statistic in (
        lambda top, left, height, width: height * width / (375 * 500),
        lambda top, left, height, width: math.log(width / height),
        lambda top, left, height, width: top / max(1, 375 - height),
        lambda top, left, height, width: left / max(1, 500 - width),
    ):
        a, b = (np.sort([statistic(*box) for box in boxes]) for boxes in (ours, theirs))
        both = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / n
        assert distance < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, 99.9 %


@pytest.mark.parametrize(("height", "width"), [(20, 500), (500, 20), (300, 300)])
def test_a_box_that_never_fits_becomes_the_largest_centered_one(height, width):
    theirs = RandomResizedCrop.get_params(torch.zeros(3, height, width), [50.0, 60.0], [3 / 4, 4 / 3])
    assert random_box(height, width, (50.0, 60.0), [0.3] * 22) == theirs


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_nearly_equal_to_torchvisions(pictures, interpolation, monkeypatch):
    box = files.Box(31, 57, 290, 256)
    monkeypatch.setattr(files, "random_box", lambda *args: box)
    ours = read(training_images(interpolation=interpolation), [pictures / "photograph.jpg", pictures / "clear.png"])
    for image, name in zip(ours, ("photograph.jpg", "clear.png"), strict=True):
        whole = v2.pil_to_tensor(Image.open(pictures / name).convert("RGB"))
        theirs = v2.resized_crop(whole, *box, [224, 224], interpolation=InterpolationMode(interpolation), antialias=True)
        assert (image.int() - theirs.int()).abs().max() <= 1


KINDS_OF_JPEG = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"subsampling": 2, "progressive": True},
    "gray": {},
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", KINDS_OF_JPEG)
def test_crops_deviate_little_from_torchvisions_on_pillow_at_every_scale(tmp_path, kind, interpolation):
    picture = photograph(144, 173).resize((517, 431), Image.Resampling.BICUBIC)  # without grain
    picture = Image.blend(picture, picture.convert("L").convert("RGB"), 0.7)  # colors vary less than brightness
    picture.convert("L" if kind == "gray" else "RGB").save(tmp_path / "x.jpg", quality=90, **KINDS_OF_JPEG[kind])
    whole = v2.pil_to_tensor(Image.open(tmp_path / "x.jpg").convert("RGB"))
    file, means = ImageFile(str(tmp_path / "x.jpg")), {}
    for i in range(60):
        size, numbers = (32, 48, 96, 192)[i % 4], np.random.default_rng(i).random(22).tolist()
        box = random_box(431, 517, (0.3, 1.0), numbers)
        shrink = next((n for n in (8, 4, 2) if min(box.height, box.width) >= n * size), 1)
        ours = training_images(interpolation=interpolation, scale=(0.3, 1.0))._cropped(file, size, numbers)
        theirs = v2.resized_crop(whole, *box, [size, size], interpolation=InterpolationMode(interpolation), antialias=True)
        means.setdefault(shrink, []).append((ours.int() - theirs.int()).abs().float().mean())
    assert max(means.pop(1)) < 0.01
    of_scales = {shrink: np.mean(of_crops) for shrink, of_crops in means.items()}
    assert of_scales.keys() == {2, 4, 8}
    assert max(of_scales.values()) < 1.5, of_scales


def test_a_large_jpeg_is_decoded_at_reduced_scale_but_never_below_its_crop(pictures, monkeypatch):
    decoded = []
    decode = ImageFile.pixels

    def spy(self, shrink, n_rows):
        decoded.append((shrink, decode(self, shrink, n_rows)))
        return decoded[-1][1]

    scaled = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(ImageFile, "pixels", spy)
    monkeypatch.setattr(files.F, "interpolate", lambda x, *args, **kw: scaled.append(x.shape) or interpolate(x, *args, **kw))
    images = training_images(img_size=96)
    for i in range(60):
        box = random_box(1296, 1704, (0.01, 1.0), np.random.default_rng(i).random(22).tolist())
        monkeypatch.setattr(files, "random_box", lambda *args, box=box: box)
        small = read(images, [pictures / "large.jpg"])[0]
        shrink, pixels = decoded.pop()
        assert pixels.shape[1] == 1704 // shrink
        assert (box.top + box.height) // shrink <= len(pixels) <= (box.top + box.height + shrink + 15) // shrink
        assert shrink == 1 or min(scaled.pop()[2:]) >= 96
        assert shrink == 8 or 2 * shrink * 96 > min(box.height, box.width)
        whole = v2.pil_to_tensor(Image.open(pictures / "large.jpg"))
        assert (small.int() - v2.resized_crop(whole, *box, [96, 96], antialias=True).int()).abs().float().mean() < 2


SEQUENTIAL = [{"subsampling": 2}, {"subsampling": 1, "quality": 95}, {"subsampling": 0, "optimize": True}]
OTHERWISE = [{"progressive": True}, {"restart_marker_rows": 1}]


@pytest.mark.parametrize("shrink", [1, 2, 8])
@pytest.mark.parametrize("how", [*SEQUENTIAL, *OTHERWISE], ids=str)
def test_rows_below_the_crop_are_not_decoded_and_those_above_are_unchanged(tmp_path, how, shrink):
    photograph(375, 500).save(tmp_path / "photograph.jpg", **how)
    file = ImageFile(str(tmp_path / "photograph.jpg"))
    whole = file.pixels(shrink)
    for n_rows in (1, 16, 17, 200, 360, 368, 375):
        pixels = file.pixels(shrink, n_rows)
        n_needed = -(-n_rows // shrink)  # below, colors may be interpolated from rows that are missing
        assert np.array_equal(pixels[:n_needed], whole[:n_needed])
        assert pixels.shape[1:] == whole.shape[1:]
        shortest = -(-(n_rows + shrink) // 16) * 16 if how in SEQUENTIAL else 375
        assert len(pixels) == math.ceil(min(shortest, 375) / shrink)


@pytest.mark.parametrize("how", [*SEQUENTIAL, *OTHERWISE], ids=str)
def test_a_jpeg_truncated_below_the_crop_is_still_an_error(tmp_path, how):
    path = tmp_path / "truncated.jpg"
    photograph(375, 500).save(path, **how)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnreadableImage, match=r"truncated\.jpg"):
        ImageFile(str(path)).pixels(n_rows=64)


def test_damage_above_the_end_of_the_crop_is_left_to_pillow(tmp_path):
    path = tmp_path / "damaged.jpg"
    photograph(375, 500).save(path)
    sound = path.read_bytes()
    for begin in range(1000, 6000, 250):
        path.write_bytes(sound[:begin] + b"\xff\xd3" + bytes(range(60)) + sound[begin + 62 :])
        file = ImageFile(str(path))
        assert np.array_equal(file.pixels(n_rows=320), np.array(file.decode()))


def test_half_of_the_images_are_mirrored_and_otherwise_unchanged(split):
    path = [split.paths[0].decode()] * 400
    plain, maybe = (read(training_images(img_size=24, hflip=hflip), path) for hflip in (False, True))
    mirrored = (maybe == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(maybe[~mirrored], plain[~mirrored])
    assert 160 < mirrored.sum() < 240


def test_erasing_fills_a_rectangle_with_the_mean_color_in_some_images(split):
    path = [split.paths[0].decode()] * 600
    mean = (0.2, 0.4, 0.6)
    plain, erased = (read(training_images(img_size=32, erasing=p, mean=mean), path) for p in (0.0, 0.25))
    changed = (plain != erased).any(1)
    hit = changed.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    areas = []
    for where, image in zip(changed[hit], erased[hit], strict=True):
        rows, columns = where.any(1).nonzero(), where.any(0).nonzero()
        inside = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert torch.equal(inside, torch.tensor([51, 102, 153], dtype=torch.uint8).view(3, 1, 1).expand_as(inside))
        areas.append(inside[0].numel() / 32**2)
    assert min(areas) < 0.06
    assert 0.27 < max(areas) < 0.40


@pytest.mark.parametrize(
    "kind", [{"policy": "randaugment"}, {"policy": "trivialaugment"}, {"policy": "augmix"}, {"color_jitter": 0.4}]
)
def test_distortions_change_images_by_epoch_and_leave_torchs_generator_alone(split, kind):
    paths = [path.decode() for path in split.paths[:8]]
    images = training_images(img_size=24, **kind)
    torch.manual_seed(5)
    first = read(images, paths)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first, read(images, paths))
    assert not torch.equal(first, read(training_images(img_size=24), paths))
    assert not torch.equal(first, read(images, paths, epoch=1))


def test_each_sample_is_distorted_differently(split, monkeypatch):
    monkeypatch.setattr(files, "random_box", lambda height, width, *args: files.Box(0, 0, height, width))
    distorted = read(training_images(img_size=24, policy="trivialaugment"), [split.paths[0].decode()] * 16)
    assert len(distorted.unique(dim=0)) > 10


def test_randaugment_distorts_more_at_a_higher_magnitude(split):
    paths = [path.decode() for path in split.paths] * 4
    plain = read(training_images(img_size=24), paths).float()
    little, much = (read(training_images(img_size=24, policy="randaugment", magnitude=m), paths).float() for m in (1, 25))
    assert (little - plain).abs().mean() < 0.7 * (much - plain).abs().mean()


# Order and workers


EVERYTHING = {"policy": "trivialaugment", "color_jitter": 0.3, "erasing": 0.5, "repeats": 3}


def batches(split, first, last, n_workers=0, **kwargs):
    prepare = preparation(**kwargs)
    loader = train_loader(split, Order(len(split), 6 // prepare.repeats, seed=1), prepare, Workers(n_workers), CPU)
    return list(loader.batches(first, last))


def assert_same(a, b):
    assert len(a) == len(b)
    for (images_a, labels_a), (images_b, labels_b) in zip(a, b, strict=True):
        assert torch.equal(images_a, images_b)
        assert torch.equal(labels_a, labels_b)


@pytest.mark.parametrize("kind", [{}, {"policy": "randaugment"}, {"policy": "augmix", "interpolation": "bicubic"}, EVERYTHING])
def test_batches_are_the_same_with_0_1_and_2_workers_and_after_a_jump_into_the_third_epoch(split, kind):
    steps_per_epoch = 12 if kind == EVERYTHING else 4
    first = 2 * steps_per_epoch + 2
    whole = batches(split, 0, first + 3, **kind)[first:]
    for n_workers in (0, 1, 2):
        assert_same(whole, batches(split, first, first + 3, n_workers, **kind))


def test_a_jump_does_not_read_skipped_images(split, monkeypatch):
    opened = []
    init = ImageFile.__init__
    monkeypatch.setattr(ImageFile, "__init__", lambda self, *args: opened.append(args) or init(self, *args))
    assert len(batches(split, 1001, 1003)) == 2
    assert len(opened) == 12


def test_repeats_put_differently_augmented_copies_of_an_image_into_a_batch(split):
    (images, labels), *_ = batches(split, 0, 12, repeats=3)
    assert labels.view(2, 3).eq(labels.view(2, 3)[:, :1]).all()
    assert len(labels.unique()) == 2
    for copies in images.view(2, 3, -1):
        assert len(copies.unique(dim=0)) == 3
    seen = torch.cat([labels for _, labels in batches(split, 0, 12, repeats=3)])
    assert torch.equal(seen.bincount(), torch.full((24,), 3))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_batch_that_is_kept_is_not_overwritten_by_later_ones(split, n_workers):
    loader = train_loader(split, Order(len(split), 4, seed=1), preparation(), Workers(n_workers), CPU)
    kept, copies = [], []
    for images, _ in loader.batches(0, 14):
        kept.append(images[1:3])  # a view keeps its batch
        copies.append(images[1:3].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_memory_is_reused_only_after_its_last_view_is_gone():
    memory = ReusedMemory()
    batch = memory.take(torch.Size([2, 3]))
    place, view = batch.data_ptr(), batch[1]
    del batch
    assert memory.take(torch.Size([2, 3])).data_ptr() != place
    del view
    assert place in {memory.take(torch.Size([2, 3])).data_ptr() for _ in range(2)} | {
        array.ctypes.data for array in memory.idle[6]
    }


@pytest.mark.parametrize("n", [1, 7, 23, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_of_files_sees_every_sample_once(split, n, world_size):
    part = split.subset(torch.arange(n))
    seen = [
        labels
        for rank in range(world_size)
        for _, labels in eval_loader(part, 6, rank, world_size, preparation(), Workers(), CPU).batches()
    ]
    assert torch.equal(torch.cat(seen), torch.arange(n))


def test_the_size_of_a_workers_state_does_not_depend_on_the_number_of_files(split, monkeypatch):
    sent = []
    monkeypatch.setattr("datasets.pipeline.workers._Results", lambda loader: sent.append(pickle.dumps(loader.dataset.read)) or [])
    for n in (10, 100_000):
        many = Files(np.repeat(split.paths[:1], n), torch.zeros(n, dtype=torch.int64))
        list(train_loader(many, Order(n, 5, seed=1), preparation(), Workers(2), CPU).batches(0, 1))
    assert len(sent) == 2
    assert len(sent[0]) == len(sent[1])


# Unreadable files


def jpeg_bytes():
    buffer = io.BytesIO()
    photograph(80, 100).save(buffer, "JPEG")
    return buffer.getvalue()


def png_bytes():
    buffer = io.BytesIO()
    photograph(80, 100).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "truncated": lambda: jpeg_bytes()[:-200],
    "cut in its header": lambda: jpeg_bytes()[:100],
    "empty": lambda: b"",
    "text": lambda: b"no image at all",
    "truncated PNG": lambda: png_bytes()[:-200],
    "damaged PNG": lambda: png_bytes()[:300] + b"\0" * 40 + png_bytes()[340:],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_the_error_names_a_broken_file_in_training_and_in_evaluation(tmp_path, kind):
    path = tmp_path / "broken.jpg"
    path.write_bytes(BROKEN[kind]())
    for images in (training_images(img_size=24), EvaluationImages(24, 0.875, "bilinear")):
        with pytest.raises(UnreadableImage, match=r"broken\.jpg: this image can't be read \(.+\)$"):
            read(images, [path])


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tif"])
def test_training_and_evaluation_refuse_the_same_images_in_the_same_words(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for height in (50, 51):
        Image.new("RGB", (40, height)).save(tmp_path / f"{height}.{ending}")
    file = ImageFile(str(tmp_path / f"50.{ending}"))
    assert file.pixels().shape == np.asarray(file.decode()).shape == (50, 40, 3)
    too_large = tmp_path / f"51.{ending}"
    for images in (training_images(img_size=24), EvaluationImages(24, 0.875, "bilinear")):
        with pytest.raises(UnreadableImage) as error:
            read(images, [too_large])
        assert str(error.value) == f"{too_large}: this image can't be read (it has more than 2,000 pixels)"


def test_an_image_below_that_limit_is_read_without_a_warning(tmp_path):
    Image.new("RGB", (40, 50)).save(tmp_path / "x.png")
    check = "from datasets.pipeline.images import Image, ImageFile; Image.MAX_IMAGE_PIXELS = 1000; ImageFile({!r}).decode()"
    ended = run_command("python", "-c", check.format(str(tmp_path / "x.png")))
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("size", [(60, 900), (900, 60)])
def test_of_an_oblong_image_only_the_center_is_scaled(tmp_path, monkeypatch, size, by_torch):
    photograph(*size).save(tmp_path / "long.png")
    scaled, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *args, **kw: scaled.append(size) or resize(self, size, *args, **kw)
    )
    monkeypatch.setattr(files.F, "interpolate", None)
    center = EvaluationImages(24, 0.8, "bilinear", by_torch=by_torch).read(str(tmp_path / "long.png"))
    assert max(width * height for width, height in scaled) < 24 * 120
    whole = v2.center_crop(v2.resize(Image.open(tmp_path / "long.png"), 30), [24, 24])
    assert (center.int() - v2.pil_to_tensor(whole).int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_images_of_one_row_or_column_are_read(tmp_path, size):
    Image.new("RGB", size, (50, 100, 150)).save(tmp_path / "line.png")
    for images in (training_images(img_size=24), EvaluationImages(24, 0.875, "bilinear")):
        assert (read(images, [tmp_path / "line.png"])[0] == torch.tensor([50, 100, 150]).view(3, 1, 1)).all()


def test_the_error_names_a_missing_file(tmp_path):
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: this image can't be read \(No such file or directory\)"):
        read(training_images(), [tmp_path / "gone.jpg"])


@pytest.mark.parametrize("n_workers", [0, 2])
def test_the_error_of_a_broken_file_is_one_line_with_any_number_of_workers(tmp_path, split, n_workers):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"")
    with_it = Files(np.append(split.paths, str(path).encode()), torch.arange(25))
    with pytest.raises(UnreadableImage) as error:
        batches(with_it, 0, 5, n_workers)
    assert str(error.value) == f"{path}: this image can't be read (it is empty)"


def test_a_jpeg_with_a_harmless_flaw_is_read_as_pillow_reads_it(tmp_path):
    path = tmp_path / "flawed.jpg"
    path.write_bytes(jpeg_bytes()[:-2] + b"\x00\x11\x22" + b"\xff\xd9")
    assert np.array_equal(ImageFile(str(path)).pixels().shape, (80, 100, 3))
    assert ImageFile(str(path)).decode().size == (100, 80)


def test_a_file_name_of_any_bytes_can_be_read(tmp_path):
    path = Path(tmp_path) / "名 \udcff.jpg"
    path.write_bytes(jpeg_bytes())
    out = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    EvaluationImages(24, 0.875, "bilinear")(Request(np.array([str(path).encode("utf-8", "surrogateescape")]), np.arange(1)), out)
    assert out.any()


LEFT_IN_THE_MIDDLE = """
from pathlib import Path
import torch
from datasets import Source, find_dataset
from datasets.pipeline.loaders import Preparation, Workers, train_loader
from datasets.pipeline.order import Order
from tests.running import run_command

split = find_dataset("imagefolder").load(Source(Path({root!r}))).train
prepare = Preparation(24, (0.5,) * 3, (0.25,) * 3, augment=True, crop_padding=0, padding_mode="constant", hflip=True, cutout=0)
batches = train_loader(split, Order(len(split), 6, seed=1), prepare, Workers(2), torch.device("cpu")).batches(0, 100)
next(batches)
kept_by_the_traceback = batches
raise ZeroDivisionError
"""


def test_workers_end_with_a_program_that_fails_between_two_batches(data_root):
    ended = run_command("python", "-c", LEFT_IN_THE_MIDDLE.format(root=str(data_root / "imagefolder")), timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("ZeroDivisionError")

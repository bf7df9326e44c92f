"""Ten shapes, generated: colorful, of any image size, and there without a download. Made for this project, after no paper.

An image is a textured background, clutter behind and in front, one or more objects of random color, texture, size, stretch,
rotation and position, light from one side, and noise. Image i of a seed is a function of (seed, i) alone: it does not depend on
how many are generated, in what order or in what batches.

`generate` gives a class, a box and a mask for each object. `load` makes a classification set of it, with one object per image,
`load_masks` and `load_boxes` sets for segmentation and detection, with several.
Shapes and textures are looked up in pictures made once, each image through an affine map of its own, so that a batch costs a few
lookups per figure and no loop over samples. The arithmetic is a sequence of single float operations, which give the same bits
wherever in a batch a number stands; functions such as sin and lerp need not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.pipeline.boxes import AREA, CLASS, COLUMNS, BoxedImages
from datasets.pipeline.counters import below, derive, draws
from datasets.pipeline.masks import MaskedImages
from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source

SHAPES = 4  # separates this use of the seed from the order's, the augmentation's and the steps'
TRAIN, TEST = 0, 1
SCENE, OBJECT, BEHIND, IN_FRONT, NOISE = range(5)

SMALLEST = 16  # pixels of an image with one object; in fewer, the smallest shapes can't be told apart
N_BEHIND, N_IN_FRONT = 3, 2  # figures of clutter, at most
VISIBLE = 0.7  # the part of an object that stays in sight; what would hide more of it is left out
TURNS = 4096  # directions that a rotation is drawn from
STAMP = 1.3  # a stamp shows its figure, of radius 1, from -STAMP to STAMP
CHUNK = 1 << 18  # pixels that are rendered at a time: about what the caches of a processor hold

Rendered = tuple[Tensor, Tensor, Tensor]  # images, labels and masks, as below


@dataclass(frozen=True)
class Shapes:
    """Images with up to K objects in each. Where there are fewer, the label is -1, the box 0 0 0 0 and the mask empty."""

    images: Tensor  # N 3 H W, uint8
    labels: Tensor  # N K, int64; the first object is always there
    boxes: Tensor  # N K 4, int64: left, top, right, bottom of the mask; right and bottom are the first pixels outside
    masks: Tensor  # N K H W, bool: the pixels in which the object is seen


def load(source: Source, *, n_train: int = 20000, n_test: int = 4000, size: int | None = None, difficulty: float = 0.5) -> Loaded:
    """`size` null generates images as large as the model sees them, data.img_size; another size is resized to that."""
    _check_counts(n_train, n_test)
    size = _size(source, size)
    _check(size, difficulty, max_objects=1)
    train, test = (
        _one_object_each(derive(source.seed, SHAPES, part), n, size, difficulty) for part, n in ((TRAIN, n_train), (TEST, n_test))
    )
    return Loaded(train, test, CLASSES)


def load_masks(
    source: Source,
    *,
    n_train: int = 4000,
    n_test: int = 500,
    size: int | None = None,
    difficulty: float = 0.5,
    max_objects: int = 3,
) -> Loaded:
    """Every pixel has the class of the object that is seen there, or the first one, background."""
    _check_counts(n_train, n_test)
    size = _size(source, size)
    _check(size, difficulty, max_objects)
    splits = []
    for part, n in ((TRAIN, n_train), (TEST, n_test)):
        images, masks = torch.empty((n, 3, size, size), dtype=torch.uint8), torch.empty((n, size, size), dtype=torch.uint8)
        seed = derive(source.seed, SHAPES, part)
        for some, (rendered, labels, of_objects) in _chunks(seed, torch.arange(n), size, difficulty, max_objects):
            # masks of one image never overlap, and where there is no object its mask is empty
            images[some], masks[some] = rendered, (of_objects * (labels + 1)[:, :, None, None]).sum(1).to(torch.uint8)
        splits.append(MaskedImages(images, masks))
    return Loaded(*splits, ("background", *CLASSES))


def load_boxes(
    source: Source,
    *,
    n_train: int = 4000,
    n_test: int = 500,
    size: int | None = None,
    difficulty: float = 0.5,
    max_objects: int = 3,
) -> Loaded:
    """Every image with the boxes of its objects; class 0 is the background."""
    _check_counts(n_train, n_test)
    size = _size(source, size)
    _check(size, difficulty, max_objects)
    splits = []
    for part, n in ((TRAIN, n_train), (TEST, n_test)):
        images, objects = torch.empty((n, 3, size, size), dtype=torch.uint8), torch.zeros(n, max_objects, COLUMNS)
        seed = derive(source.seed, SHAPES, part)
        for some, (rendered, labels, masks) in _chunks(seed, torch.arange(n), size, difficulty, max_objects):
            images[some], objects[some, :, :4] = rendered, boxes_of(masks).float()
            objects[some, :, CLASS], objects[some, :, AREA] = (labels + 1).float(), masks.sum((-2, -1)).float()
        splits.append(BoxedImages(images, objects))
    return Loaded(*splits, ("background", *CLASSES))


def generate(seed: int, indices: Tensor, *, size: int, difficulty: float = 0.5, max_objects: int = 1) -> Shapes:
    """The images of these indices, each with 1 to `max_objects` objects, of which a later one lies over an earlier one.

    `difficulty`, from 0 to 1, is the amount of noise and clutter, the strength of the textures, the likeness of objects and
    background, and how small an object can be.
    """
    _check(size, difficulty, max_objects)
    chunks = (rendered for _, rendered in _chunks(seed, indices, size, difficulty, max_objects))
    images, labels, masks = map(torch.cat, zip(*chunks, strict=True))
    return Shapes(images, labels, boxes_of(masks), masks)


def _check_counts(n_train: int, n_test: int) -> None:
    if n_train < 1 or n_test < 1:
        raise ValueError(f"n_train and n_test are {n_train} and {n_test}; they must be at least 1")


def _size(source: Source, size: int | None) -> int:
    return next(given for given in (size, source.img_size, IMG_SIZE) if given is not None)


def _check(size: int, difficulty: float, max_objects: int) -> None:
    if max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; it must be at least 1")
    least = math.ceil(SMALLEST * math.sqrt(max_objects))
    if size < least:
        objects = f" with {max_objects} objects" if max_objects > 1 else ""
        raise ValueError(f"shapes can be told apart in images of {least}x{least} and more{objects}; the size is {size}")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty}; it can be 0 to 1")


def _one_object_each(seed: int, n: int, size: int, difficulty: float) -> Images:
    images, labels = torch.empty((n, 3, size, size), dtype=torch.uint8), torch.empty(n, dtype=torch.int64)
    for some, (rendered, of_objects, _) in _chunks(seed, torch.arange(n), size, difficulty, max_objects=1):
        images[some], labels[some] = rendered, of_objects[:, 0]
    return Images(images, labels)


def _chunks(seed: int, indices: Tensor, size: int, difficulty: float, max_objects: int) -> Iterator[tuple[slice, Rendered]]:
    """A few images at a time, and which of `indices` they are."""
    done = 0
    for chunk in indices.split(max(1, CHUNK // size**2)):
        yield slice(done, done + len(chunk)), _render(seed, chunk, size, difficulty, max_objects)
        done += len(chunk)


# What is drawn where


@dataclass(frozen=True)
class Pose:
    """Where a picture lies in each of N images. Lengths are parts of the image's side."""

    x: Tensor
    y: Tensor
    radius: Tensor
    aspect: Tensor  # the picture's height is shrunk to this part
    turn: Tensor  # int64, in parts of TURNS

    def coordinates(self, size: int, center: float, radius: float) -> tuple[Tensor, Tensor]:
        """Every pixel in the picture's own coordinates, as two tensors N H W; there the picture has this center and radius."""
        cos, sin = _directions()[:, self.turn]
        pixels = (torch.arange(size) + 0.5) / size
        x, y = pixels - self.x.unsqueeze(1), pixels - self.y.unsqueeze(1)  # N W, N H
        across, down = radius / self.radius, radius / (self.radius * self.aspect)
        u = (x * (cos * across).unsqueeze(1)).unsqueeze(1) + (y * (sin * across).unsqueeze(1) + center).unsqueeze(2)
        v = (x * (-sin * down).unsqueeze(1)).unsqueeze(1) + (y * (cos * down).unsqueeze(1) + center).unsqueeze(2)
        return u, v


@dataclass(frozen=True)
class Look:
    """A texture of two colors."""

    texture: Tensor  # int64, a place in TEXTURES
    pose: Pose  # its radius is the length of a repeat
    colors: Tensor  # N 2 3, from 0 to 1


def draw_pose(bits: Tensor, smallest: float, largest: float) -> Pose:
    """Anywhere in the image and wholly inside, in any direction, from 5 x N draws; the sizes are diameters."""
    radius = _between(bits[0], smallest / 2, largest / 2)
    x, y = (radius + _unit(along) * (1 - 2 * radius) for along in bits[1:3])
    return Pose(x, y, radius, _between(bits[3], 0.7, 1.0), below(bits[4], TURNS))


def draw_look(bits: Tensor, strength: float) -> Look:
    """From 11 x N draws. At strength 0 both colors are the same."""
    first, second = _unit(bits[:6]).view(2, 3, -1).permute(0, 2, 1)  # 2 N 3
    pose = Pose(_unit(bits[6]), _unit(bits[7]), _between(bits[8], 0.15, 0.5), torch.ones(bits.shape[1]), below(bits[9], TURNS))
    return Look(below(bits[10], len(TEXTURES)), pose, torch.stack([first, first + (second - first) * strength], dim=1))


def set_apart(look: Look, channel: Tensor, high: Tensor, gap: float) -> Look:
    """The look with `channel` of both colors in the upper or the lower part of its range, which lie `gap` apart."""
    where = channel.view(-1, 1, 1).expand(-1, 2, 1)
    level = look.colors.gather(2, where) * ((1 - gap) / 2)
    level = torch.where(high.view(-1, 1, 1), 1 - level, level)
    return Look(look.texture, look.pose, look.colors.scatter(2, where, level))


def _unit(bits: Tensor) -> Tensor:
    """Numbers of 31 bits as numbers from 0 to 1."""
    return bits.float() / 2**31


def _between(bits: Tensor, low: float, high: float) -> Tensor:
    return low + _unit(bits) * (high - low)


# How it is drawn


@dataclass
class Canvas:
    images: Tensor  # N 3 H W, from 0 to 1
    masks: list[Tensor]  # of each object, N H W: where it is seen
    areas: list[Tensor]  # of each object: its pixels before anything lay over it

    def paint(self, coverage: Tensor, color: Tensor, wanted: Tensor) -> Tensor:
        """Lay a figure over the images that want it, but where it would hide too much of an object; gives its mask."""
        inside = coverage >= 0.5
        for mask, area in zip(self.masks, self.areas, strict=True):
            wanted = wanted & ((mask & ~inside).sum((1, 2)) >= area * VISIBLE)
        wanted = wanted.view(-1, 1, 1)
        inside = inside & wanted
        self.masks = [mask & ~inside for mask in self.masks]
        self.images += (color - self.images).mul_((coverage * wanted).unsqueeze(1))
        return inside

    def paint_object(self, coverage: Tensor, color: Tensor, wanted: Tensor) -> None:
        mask = self.paint(coverage, color, wanted)
        self.masks.append(mask)
        self.areas.append(mask.sum((1, 2)))


def _render(seed: int, indices: Tensor, size: int, difficulty: float, max_objects: int) -> Rendered:
    gap = 0.6 - 0.5 * difficulty
    smallest, largest = (diameter / math.sqrt(max_objects) for diameter in (0.7 - 0.4 * difficulty, 0.85))
    scene = draws(derive(seed, SCENE), 0, indices, 18)
    channel, high, n_objects = below(scene[0], 3), below(scene[1], 2).bool(), 1 + below(scene[2], max_objects)
    background = set_apart(draw_look(scene[3:14], difficulty), channel, ~high, gap)
    canvas = Canvas(_textured(background, size), [], [])
    _paint_clutter(canvas, derive(seed, BEHIND), N_BEHIND, indices, difficulty)
    kinds = []
    for k in range(max_objects):
        bits = draws(derive(seed, OBJECT), k, indices, 17)
        kinds.append(below(bits[0], len(CLASSES)))
        coverage = _coverage(kinds[-1], draw_pose(bits[1:6], smallest, largest), size)
        look = set_apart(draw_look(bits[6:17], difficulty), channel, high, gap)
        canvas.paint_object(coverage, _textured(look, size), n_objects > k)
    _paint_clutter(canvas, derive(seed, IN_FRONT), N_IN_FRONT, indices, difficulty)
    _light(canvas.images, scene[14:16], difficulty)
    _add_noise(canvas.images, scene[16:18], difficulty)
    labels = [kind.masked_fill(area == 0, -1) for kind, area in zip(kinds, canvas.areas, strict=True)]
    images = canvas.images.mul_(255).clamp_(0, 255).to(torch.uint8)
    return images, torch.stack(labels, dim=1), torch.stack(canvas.masks, dim=1)


def boxes_of(masks: Tensor) -> Tensor:
    """The smallest boxes that hold the masks, ... H W -> ... 4; of an empty mask, 0 0 0 0."""
    left, right = _extent(masks.any(-2))
    top, bottom = _extent(masks.any(-1))
    return torch.stack([left, top, right, bottom], dim=-1)


def _extent(taken: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(taken.shape[-1])
    end = torch.where(taken, places + 1, 0).amax(-1)
    return torch.minimum(torch.where(taken, places, len(places)).amin(-1), end), end


def _paint_clutter(canvas: Canvas, seed: int, n: int, indices: Tensor, difficulty: float) -> None:
    """Figures of one color and of no class. How many of the `n` are there is a matter of difficulty."""
    size = canvas.images.shape[-1]
    for k in range(n):
        bits = draws(seed, k, indices, 10)
        kind = len(CLASSES) + below(bits[0], len(CLUTTER))
        coverage = _coverage(kind, draw_pose(bits[1:6], 0.15, 0.6), size)
        color = _unit(bits[6:9]).T[:, :, None, None]
        canvas.paint(coverage, color, _unit(bits[9]) < difficulty)


def _light(images: Tensor, bits: Tensor, difficulty: float) -> None:
    """Brighter towards one side."""
    across, down = (_unit(bits) - 0.5) * difficulty
    ramp = torch.linspace(-1, 1, images.shape[-1])
    images += (across.view(-1, 1, 1) * ramp + down.view(-1, 1, 1) * ramp.unsqueeze(1)).unsqueeze(1)


def _add_noise(images: Tensor, bits: Tensor, difficulty: float) -> None:
    """Each image reads a stretch of a long row of noise, from a place and at a strength of its own."""
    length = images.shape[1:].numel()
    row = _noise(length)
    stretches = row.unfold(0, length, 1)
    strength = _unit(bits[1]) * (0.3 * difficulty)
    images += stretches.index_select(0, below(bits[0], len(stretches))).mul_(strength.unsqueeze(1)).view_as(images)


def _coverage(kind: Tensor, pose: Pose, size: int) -> Tensor:
    """How much of each pixel a figure covers, N H W, from 0 to 1."""
    stamps, side = _stamps(size)
    u, v = (x.clamp_(0, side - 1).int() for x in pose.coordinates(size, side / 2, side / (2 * STAMP)))
    index = v.mul_(side).add_(u).add_((kind.int() * side**2).view(-1, 1, 1))
    distance = stamps.index_select(0, index.flatten()).view(index.shape)
    return distance.mul_((pose.radius * pose.aspect * size).view(-1, 1, 1)).add_(0.5).clamp_(0, 1)


def _textured(look: Look, size: int) -> Tensor:
    """N 3 H W"""
    tiles, side = _tiles(size)
    # the center is moved by whole repeats, so that no coordinate is below 0, where int() would round the other way
    u, v = (x.int().bitwise_and_(side - 1) for x in look.pose.coordinates(size, 16 * side, side))
    index = v.mul_(side).add_(u).add_((look.texture.int() * side**2).view(-1, 1, 1))
    weight = tiles.index_select(0, index.flatten()).view(index.shape)
    first, second = look.colors.unbind(1)
    return (weight.unsqueeze(1) * (second - first)[:, :, None, None]).add_(first[:, :, None, None])


# The pictures that are looked up


@lru_cache(maxsize=1)
def _directions() -> Tensor:
    """cos and sin of each of TURNS directions."""
    angles = torch.arange(TURNS, dtype=torch.float64) * (2 * math.pi / TURNS)
    return torch.stack([angles.cos(), angles.sin()]).float()


@lru_cache(maxsize=4)
def _noise(longest: int) -> Tensor:
    """A row of noise of mean 0 and deviation 1: a sum of four uniform numbers, which is nearly normal. Every seed shares it."""
    bits = draws(derive(SHAPES, NOISE), 0, torch.arange((1 << 20) + longest), 1)[0]
    total = sum((bits >> 7 * i) & 127 for i in range(4))
    return (total.float() - 4 * 63.5) / math.sqrt(4 * (128**2 - 1) / 12)


@lru_cache(maxsize=4)
def _stamps(size: int) -> tuple[Tensor, int]:
    """For each figure, class or clutter, a square of distances to its outline, positive inside; flat, and the square's side."""
    base = 128
    centers = ((torch.arange(base) + 0.5) / base * 2 - 1) * STAMP
    points = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), dim=-1).view(-1, 2)
    squares = torch.stack([signed_distance(loops, points) for loops in OUTLINES.values()]).view(1, -1, base, base)
    side = max(base, 1 << (2 * size - 1).bit_length())
    # between the points where it is measured, distance is nearly linear
    return F.interpolate(squares, (side, side), mode="bilinear", align_corners=False).flatten(), side


@lru_cache(maxsize=4)
def _tiles(size: int) -> tuple[Tensor, int]:
    """For each texture, one repeat as a square of numbers from 0 to 1; flat, and the square's side, a power of two."""
    side = 1 << (2 * size - 1).bit_length()
    places = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.cat([texture(x, y).float().flatten() for texture in TEXTURES.values()]), side


def signed_distance(loops: list[Tensor], points: Tensor) -> Tensor:
    """Of points, M x 2, to the nearest edge of the figure between closed loops of corners; negative outside."""
    a = torch.cat(loops)
    b = torch.cat([loop.roll(-1, 0) for loop in loops])
    edge, to_point = b - a, points.unsqueeze(1) - a  # P 2, M P 2
    along = ((to_point * edge).sum(-1) / edge.square().sum(-1)).clamp(0, 1)
    distance = (to_point - along.unsqueeze(-1) * edge).norm(dim=-1).amin(1)
    # a ray to the right crosses the edges of what it starts in an odd number of times
    x, y = points.unsqueeze(1).unbind(-1)
    spans = (a[:, 1] > y) != (b[:, 1] > y)
    crosses = spans & (x < a[:, 0] + (y - a[:, 1]) * edge[:, 0] / edge[:, 1])
    return torch.where(crosses.sum(1) % 2 == 1, distance, -distance)


def _wave(x: Tensor) -> Tensor:
    return (2 * math.pi * x).sin() / 2 + 0.5


TEXTURES = {
    "plain": lambda x, y: torch.zeros_like(x),
    "stripes": lambda x, y: x < 0.5,
    "checks": lambda x, y: (x < 0.5) ^ (y < 0.5),
    "dots": lambda x, y: (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.3**2,
    "waves": lambda x, y: _wave(x),
    "cushions": lambda x, y: _wave(x) * _wave(y),
}


def _arc(radius: float, first: float, last: float, x: float = 0.0) -> list[tuple[float, float]]:
    """Corners along an arc around (x, 0); the angles are parts of a full circle."""
    angles = torch.linspace(first, last, 48) * 2 * math.pi
    return [(x + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles.tolist()]


def _circle(radius: float) -> list[tuple[float, float]]:
    return _arc(radius, 0, 47 / 48)


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in angles
    ]


def _spokes(radii: list[float]) -> list[tuple[float, float]]:
    """Corners at equal angles."""
    n = len(radii)
    return [(r * math.cos(2 * math.pi * i / n), r * math.sin(2 * math.pi * i / n)) for i, r in enumerate(radii)]


def _fitted(*loops: list[tuple[float, float]]) -> list[Tensor]:
    """Moved and scaled so that the box around all corners is centered and the farthest corner has distance 1."""
    corners = torch.tensor([corner for loop in loops for corner in loop])
    center = (corners.amin(0) + corners.amax(0)) / 2
    radius = (corners - center).norm(dim=1).max()
    return [(torch.tensor(loop) - center) / radius for loop in loops]


SHAPE_OUTLINES = {
    "disc": _fitted(_circle(1)),
    "ring": _fitted(_circle(1), _circle(0.55)),
    "crescent": _fitted(_arc(1, 0.129, 0.871) + _arc(0.75, 0.79, 0.21, x=0.5)),
    "heart": _fitted(_heart()),
    "triangle": _fitted(_spokes([1, 1, 1])),
    "square": _fitted(_spokes([1, 1, 1, 1])),
    "star": _fitted(_spokes([1, 0.42] * 5)),
    "cross": _fitted(
        [(3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1)],
    ),
    "arrow": _fitted([(4, 0), (0, 3), (0, 1), (-4, 1), (-4, -1), (0, -1), (0, -3)]),
    "hourglass": _fitted([(3, 4), (0.6, 0), (3, -4), (-3, -4), (-0.6, 0), (-3, 4)]),
}
CLUTTER_OUTLINES = {
    "bar": _fitted([(6, 1), (-6, 1), (-6, -1), (6, -1)]),
    "arc": _fitted(_arc(1, 0.1, 0.9) + _arc(0.8, 0.9, 0.1)),
    "zigzag": _fitted([(-6, -2), (-2, 2), (2, -2), (6, 2), (6, 3), (2, -1), (-2, 3), (-6, -1)]),
    "crumbs": _fitted(
        _circle(0.3), *([(x + 3 * dx, y + 3 * dy) for x, y in _circle(1)] for dx, dy in ((1, 0.3), (-0.7, 1), (0, -1)))
    ),
}
OUTLINES = SHAPE_OUTLINES | CLUTTER_OUTLINES
CLASSES, CLUTTER = tuple(SHAPE_OUTLINES), tuple(CLUTTER_OUTLINES)
IMG_SIZE = 32

_SHAPES = partial(
    DatasetSpec,
    name="shapes",
    channels=3,
    img_size=IMG_SIZE,
    mean=(0.5, 0.5, 0.5),
    std=(0.30, 0.30, 0.30),
    crop_padding=2,
    hflip=True,
    any_size=True,
)

DATASETS = [
    _SHAPES(load=load, n_classes=len(CLASSES)),
    _SHAPES(load=load_masks, targets="masks", n_classes=len(CLASSES) + 1),
    _SHAPES(load=load_boxes, targets="boxes", n_classes=len(CLASSES) + 1),
]

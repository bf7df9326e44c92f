"""Ten shapes, generated: colorful, at any image size, and without a download. Made for this project; there is no paper.

An image is a textured background, clutter behind and in front, one or more objects of random color, texture, size, stretch,
rotation and position, light from one side, and noise. Image i of a seed is a function of (seed, i) alone: it does not depend on
how many are generated, in what order or in what batches.

`chunks` renders images, with a class and a mask for each object. `load` makes a classification dataset of them, with one object
per image, and `load_objects` datasets for segmentation and detection, with several.
Shapes and textures are read from lookup tables, which are computed once, through an affine map per image. A batch costs a few
lookups per figure and no loop over samples. The arithmetic is a sequence of single float operations, whose bits don't depend on
the position in a batch; those of functions such as sin and lerp may.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.pipeline.boxes import AREA, CLASS, COLUMNS, BoxedImages
from datasets.pipeline.counters import below, derive, draws
from datasets.pipeline.masks import MaskedImages
from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source

SHAPES = 4  # separates this use of the seed from others
TRAIN, TEST = 0, 1
SCENE, OBJECT, BEHIND, IN_FRONT, NOISE = range(5)

SMALLEST = 16  # pixels of an image with one object; below, the smallest shapes are indistinguishable
N_BEHIND, N_IN_FRONT = 3, 2  # figures of clutter, at most
VISIBLE = 0.7  # the part of an object that stays visible; a figure that would hide more of it is not painted
TURNS = 4096  # possible rotations
STAMP = 1.3  # a stamp covers its figure, of radius 1, from -STAMP to STAMP
CHUNK = 1 << 18  # pixels that are rendered at a time, to fit into a processor's caches

# Images N 3 H W, uint8; the labels of up to K objects, N K, of which the first one always exists, and -1 is a missing one; their
# masks, N K H W, bool: the pixels in which an object is visible, none of a missing one.
Rendered = tuple[Tensor, Tensor, Tensor]


def load(source: Source, *, n_train: int = 20000, n_test: int = 4000, size: int | None = None, difficulty: float = 0.5) -> Loaded:
    """Load one object per image. For the options see load_objects."""
    make = partial(load_objects, Images, lambda labels, masks: labels[:, 0], source, max_objects=1)
    return make(n_train=n_train, n_test=n_test, size=size, difficulty=difficulty)


def load_objects(
    split: Callable[[Tensor, Tensor], Images],
    targets_of: Callable[[Tensor, Tensor], Tensor],  # of labels N K and masks N K H W
    source: Source,
    *,
    n_train: int = 4000,
    n_test: int = 500,
    size: int | None = None,
    difficulty: float = 0.5,
    max_objects: int = 3,
) -> Loaded:
    """Load several objects per image. Masks and boxes have one more class: 0, background.

    `size` null generates images at the size that the model sees, data.img_size; another size is resized to that.
    """
    if n_train < 1 or n_test < 1:
        raise ValueError(f"n_train and n_test are {n_train} and {n_test}; they must be at least 1")
    size = next(given for given in (size, source.img_size, IMG_SIZE) if given is not None)
    splits = []
    for part, n in ((TRAIN, n_train), (TEST, n_test)):
        images = targets = torch.empty(0)
        seed = derive(source.seed, SHAPES, part)
        for some, (rendered, labels, masks) in chunks(seed, torch.arange(n), size, difficulty, max_objects):
            made = targets_of(labels, masks)
            if some.start == 0:
                images, targets = (one.new_empty(n, *one.shape[1:]) for one in (rendered, made))
            images[some], targets[some] = rendered, made
        splits.append(split(images, targets))
    train, test = splits
    return Loaded(train, test, CLASSES if split is Images else ("background", *CLASSES))


def label_targets(labels: Tensor, masks: Tensor) -> Tensor:
    """Return which classes occur, N x classes, uint8."""
    return F.one_hot(labels + 1, len(CLASSES) + 1).amax(1)[:, 1:].to(torch.uint8)


def mask_targets(labels: Tensor, masks: Tensor) -> Tensor:
    """Return the class of the object that is visible in each pixel, N H W."""
    # masks of one image never overlap, and the mask of a missing object is empty
    return (masks * (labels + 1)[:, :, None, None]).sum(1).to(torch.uint8)


def box_targets(labels: Tensor, masks: Tensor) -> Tensor:
    """Return the rows of boxes.py, N K COLUMNS."""
    objects = torch.zeros(*labels.shape, COLUMNS)
    objects[..., :4], objects[..., CLASS], objects[..., AREA] = boxes_of(masks), labels + 1, masks.sum((-2, -1))
    return objects


def chunks(seed: int, indices: Tensor, size: int, difficulty: float, max_objects: int) -> Iterator[tuple[slice, Rendered]]:
    """Render the images of these indices, a few at a time; yield their positions in `indices` and the result.

    Each image has 1 to `max_objects` objects, of which a later one covers an earlier one. A higher `difficulty`, from 0 to 1,
    means more noise and clutter, stronger textures, objects that differ less from the background, and smaller ones.
    """
    if max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; it must be at least 1")
    least = math.ceil(SMALLEST * math.sqrt(max_objects))
    if size < least:
        objects = f" with {max_objects} objects" if max_objects > 1 else ""
        raise ValueError(f"shapes are distinguishable in images of {least}x{least} and more{objects}; the size is {size}")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty}; it can be 0 to 1")
    done = 0
    for chunk in indices.split(max(1, CHUNK // size**2)):
        yield slice(done, done + len(chunk)), _render(seed, chunk, size, difficulty, max_objects)
        done += len(chunk)


# Poses and patterns


@dataclass(frozen=True)
class Pose:
    """The position of a table's picture in each of N images. Lengths are fractions of the image's side."""

    x: Tensor
    y: Tensor
    radius: Tensor
    aspect: Tensor  # the picture's height is scaled by this factor
    turn: Tensor  # int64, in TURNS per circle

    def coordinates(self, size: int, center: float, radius: float) -> tuple[Tensor, Tensor]:
        """Return every pixel's coordinates in the picture, as two tensors N H W. The picture has this center and radius there."""
        cos, sin = _directions()[:, self.turn]
        pixels = (torch.arange(size) + 0.5) / size
        x, y = pixels - self.x.unsqueeze(1), pixels - self.y.unsqueeze(1)  # N W, N H
        across, down = radius / self.radius, radius / (self.radius * self.aspect)
        u = (x * (cos * across).unsqueeze(1)).unsqueeze(1) + (y * (sin * across).unsqueeze(1) + center).unsqueeze(2)
        v = (x * (-sin * down).unsqueeze(1)).unsqueeze(1) + (y * (cos * down).unsqueeze(1) + center).unsqueeze(2)
        return u, v


@dataclass(frozen=True)
class Pattern:
    """A texture of two colors."""

    texture: Tensor  # int64, an index of TEXTURES
    pose: Pose  # its radius is the period
    colors: Tensor  # N 2 3, from 0 to 1


def draw_pose(bits: Tensor, smallest: float, largest: float) -> Pose:
    """Draw a pose anywhere inside the image, in any direction, from 5 x N random numbers. The sizes are diameters."""
    radius = _between(bits[0], smallest / 2, largest / 2)
    x, y = (radius + _unit(along) * (1 - 2 * radius) for along in bits[1:3])
    return Pose(x, y, radius, _between(bits[3], 0.7, 1.0), below(bits[4], TURNS))


def draw_pattern(bits: Tensor, strength: float) -> Pattern:
    """Draw a pattern from 11 x N random numbers. At strength 0 both colors are the same."""
    first, second = _unit(bits[:6]).view(2, 3, -1).permute(0, 2, 1)  # 2 N 3
    pose = Pose(_unit(bits[6]), _unit(bits[7]), _between(bits[8], 0.15, 0.5), torch.ones(bits.shape[1]), below(bits[9], TURNS))
    return Pattern(below(bits[10], len(TEXTURES)), pose, torch.stack([first, first + (second - first) * strength], dim=1))


def with_level(pattern: Pattern, channel: Tensor, high: Tensor, gap: float) -> Pattern:
    """Move `channel` of both colors into the upper or the lower part of its range, which lie `gap` apart."""
    where = channel.view(-1, 1, 1).expand(-1, 2, 1)
    level = pattern.colors.gather(2, where) * ((1 - gap) / 2)
    level = torch.where(high.view(-1, 1, 1), 1 - level, level)
    return Pattern(pattern.texture, pattern.pose, pattern.colors.scatter(2, where, level))


def _unit(bits: Tensor) -> Tensor:
    """Map numbers of 31 bits to floats from 0 to 1."""
    return bits.float() / 2**31


def _between(bits: Tensor, low: float, high: float) -> Tensor:
    return low + _unit(bits) * (high - low)


# Painting


@dataclass
class Canvas:
    images: Tensor  # N 3 H W, from 0 to 1
    masks: list[Tensor]  # of each object, N H W: where it is visible
    areas: list[Tensor]  # of each object: its pixels before another figure covered it

    def paint(self, coverage: Tensor, color: Tensor, wanted: Tensor) -> Tensor:
        """Paint a figure over the `wanted` images, except where it would hide too much of an object, and return its mask."""
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
    background = with_level(draw_pattern(scene[3:14], difficulty), channel, ~high, gap)
    canvas = Canvas(_textured(background, size), [], [])
    _paint_clutter(canvas, derive(seed, BEHIND), N_BEHIND, indices, difficulty)
    kinds = []
    for k in range(max_objects):
        bits = draws(derive(seed, OBJECT), k, indices, 17)
        kinds.append(below(bits[0], len(CLASSES)))
        coverage = _coverage(kinds[-1], draw_pose(bits[1:6], smallest, largest), size)
        pattern = with_level(draw_pattern(bits[6:17], difficulty), channel, high, gap)
        canvas.paint_object(coverage, _textured(pattern, size), n_objects > k)
    _paint_clutter(canvas, derive(seed, IN_FRONT), N_IN_FRONT, indices, difficulty)
    _light(canvas.images, scene[14:16], difficulty)
    _add_noise(canvas.images, scene[16:18], difficulty)
    labels = [kind.masked_fill(area == 0, -1) for kind, area in zip(kinds, canvas.areas, strict=True)]
    images = canvas.images.mul_(255).clamp_(0, 255).to(torch.uint8)
    return images, torch.stack(labels, dim=1), torch.stack(canvas.masks, dim=1)


def boxes_of(masks: Tensor) -> Tensor:
    """Return the smallest boxes around the masks, ... H W -> ... 4; of an empty mask, 0 0 0 0."""
    extents = []
    for covered in (masks.any(-2), masks.any(-1)):  # columns and rows
        places = torch.arange(covered.shape[-1])
        end = torch.where(covered, places + 1, 0).amax(-1)
        extents.append((torch.minimum(torch.where(covered, places, len(places)).amin(-1), end), end))
    (left, right), (top, bottom) = extents
    return torch.stack([left, top, right, bottom], dim=-1)


def _paint_clutter(canvas: Canvas, seed: int, n: int, indices: Tensor, difficulty: float) -> None:
    """Paint up to `n` figures of one color and no class, more of them at a higher difficulty."""
    size = canvas.images.shape[-1]
    for k in range(n):
        bits = draws(seed, k, indices, 10)
        kind = len(CLASSES) + below(bits[0], len(CLUTTER))
        coverage = _coverage(kind, draw_pose(bits[1:6], 0.15, 0.6), size)
        color = _unit(bits[6:9]).T[:, :, None, None]
        canvas.paint(coverage, color, _unit(bits[9]) < difficulty)


def _light(images: Tensor, bits: Tensor, difficulty: float) -> None:
    """Brighten the images towards one side."""
    across, down = (_unit(bits) - 0.5) * difficulty
    ramp = torch.linspace(-1, 1, images.shape[-1])
    images += (across.view(-1, 1, 1) * ramp + down.view(-1, 1, 1) * ramp.unsqueeze(1)).unsqueeze(1)


def _add_noise(images: Tensor, bits: Tensor, difficulty: float) -> None:
    """Add to each image a random stretch of a long row of noise, at a random strength."""
    length = images.shape[1:].numel()
    row = _noise(length)
    stretches = row.unfold(0, length, 1)
    strength = _unit(bits[1]) * (0.3 * difficulty)
    images += stretches.index_select(0, below(bits[0], len(stretches))).mul_(strength.unsqueeze(1)).view_as(images)


def _coverage(kind: Tensor, pose: Pose, size: int) -> Tensor:
    """Return the part of each pixel that a figure covers, N H W, from 0 to 1."""
    stamps, side = _stamps(size)
    u, v = (x.clamp_(0, side - 1).int() for x in pose.coordinates(size, side / 2, side / (2 * STAMP)))
    index = v.mul_(side).add_(u).add_((kind.int() * side**2).view(-1, 1, 1))
    distance = stamps.index_select(0, index.flatten()).view(index.shape)
    return distance.mul_((pose.radius * pose.aspect * size).view(-1, 1, 1)).add_(0.5).clamp_(0, 1)


def _textured(pattern: Pattern, size: int) -> Tensor:
    """Return images full of the pattern, N 3 H W."""
    tiles, side = _tiles(size)
    # the center is shifted by whole periods, so that no coordinate is negative, where int() would round up
    u, v = (x.int().bitwise_and_(side - 1) for x in pattern.pose.coordinates(size, 16 * side, side))
    index = v.mul_(side).add_(u).add_((pattern.texture.int() * side**2).view(-1, 1, 1))
    weight = tiles.index_select(0, index.flatten()).view(index.shape)
    first, second = pattern.colors.unbind(1)
    return (weight.unsqueeze(1) * (second - first)[:, :, None, None]).add_(first[:, :, None, None])


# Lookup tables


@lru_cache(maxsize=1)
def _directions() -> Tensor:
    """Return cos and sin of each of TURNS directions, 2 TURNS."""
    angles = torch.arange(TURNS, dtype=torch.float64) * (2 * math.pi / TURNS)
    return torch.stack([angles.cos(), angles.sin()]).float()


@lru_cache(maxsize=4)
def _noise(longest: int) -> Tensor:
    """Return a row of noise, the same for every seed: sums of four uniform numbers, nearly normal, with mean 0 and variance 1."""
    bits = draws(derive(SHAPES, NOISE), 0, torch.arange((1 << 20) + longest), 1)[0]
    total = sum(((bits >> 7 * i) & 127 for i in range(4)), torch.zeros_like(bits))
    return (total.float() - 4 * 63.5) / math.sqrt(4 * (128**2 - 1) / 12)


@lru_cache(maxsize=4)
def _stamps(size: int) -> tuple[Tensor, int]:
    """Return squares of distances to each figure's outline, positive inside, as one flat tensor, and the side of a square."""
    base = 128
    centers = ((torch.arange(base) + 0.5) / base * 2 - 1) * STAMP
    points = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), dim=-1).view(-1, 2)
    squares = torch.stack([signed_distance(loops, points) for loops in OUTLINES.values()]).view(1, -1, base, base)
    side = max(base, 1 << (2 * size - 1).bit_length())
    # distance is nearly linear between the points at which it is computed
    return F.interpolate(squares, (side, side), mode="bilinear", align_corners=False).flatten(), side


@lru_cache(maxsize=4)
def _tiles(size: int) -> tuple[Tensor, int]:
    """Return a period of each texture as squares of numbers from 0 to 1, as one flat tensor, and their side, a power of two."""
    side = 1 << (2 * size - 1).bit_length()
    places = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.cat([texture(x, y).float().flatten() for texture in TEXTURES.values()]), side


def signed_distance(loops: list[Tensor], points: Tensor) -> Tensor:
    """Return the distance of points, M x 2, to the nearest edge of a figure bounded by closed loops; negative outside."""
    a = torch.cat(loops)
    b = torch.cat([loop.roll(-1, 0) for loop in loops])
    edge, to_point = b - a, points.unsqueeze(1) - a  # P 2, M P 2
    along = ((to_point * edge).sum(-1) / edge.square().sum(-1)).clamp(0, 1)
    distance = (to_point - along.unsqueeze(-1) * edge).norm(dim=-1).amin(1)
    # a ray from a point inside crosses the edges an odd number of times
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
    """Return corners along an arc around (x, 0). The angles are fractions of a full circle."""
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
    """Return corners at equal angles."""
    n = len(radii)
    return [(r * math.cos(2 * math.pi * i / n), r * math.sin(2 * math.pi * i / n)) for i, r in enumerate(radii)]


def _fitted(*loops: list[tuple[float, float]]) -> list[Tensor]:
    """Move and scale loops so that the box around all corners is centered and the farthest corner has distance 1."""
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
IMG_SIZE, MEAN, STD = 32, (0.5,) * 3, (0.3,) * 3

_SHAPES = partial(
    DatasetSpec, name="shapes", channels=3, img_size=IMG_SIZE, mean=MEAN, std=STD, crop_padding=2, hflip=True, any_size=True
)

DATASETS = [
    _SHAPES(load=load, n_classes=len(CLASSES)),
    _SHAPES(load=partial(load_objects, Images, label_targets), targets="labels", n_classes=len(CLASSES)),
    _SHAPES(load=partial(load_objects, MaskedImages, mask_targets), targets="masks", n_classes=len(CLASSES) + 1),
    _SHAPES(load=partial(load_objects, BoxedImages, box_targets), targets="boxes", n_classes=len(CLASSES) + 1),
]

"""Duplicates: images with the same pixels, and near duplicates: encoded again, resized, mirrored, or cropped by up to 10 %.

A near duplicate is found in two steps. Candidates have similar descriptors (a thumbnail of 8x8 in luma, 4x4 in chroma): those of
each image, of nine windows of 90 % of it, and of all of these mirrored, are searched among the descriptors of all images, in the
cells of the nearest pivots only, so that the time grows with n^1.5 and the memory with n. Then the fine detail of both thumbnails
has to agree, after a small shift and stretch that a linear fit finds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from tools.dataset_report.facts import SIDE, Facts, thumbnails

LEAST_SIDE = 32  # pixels; smaller images, such as digits, look alike without being duplicates
LEAST_DETAIL = 4.0  # levels: the standard deviation of a thumbnail below which it has nothing to compare
SIMILAR = 0.92  # the cosine of two descriptors from which they are candidates
SAME_DETAIL = 0.8  # the share of the detail's variance that the other image explains in a near duplicate
FINE = 16  # side of the thumbnails whose detail is compared
WINDOW = 0.9
WINDOWS = ((1.0, 0.0, 0.0), *((WINDOW, (1 - WINDOW) * y / 2, (1 - WINDOW) * x / 2) for y in range(3) for x in range(3)))
PROBES = 8  # cells that are searched for each image
MOST_CANDIDATES = 4  # of an image in a cell: in a video, more would only confirm each other
BLOCK = 4096  # images at a time
MOST_PRODUCTS = 1 << 24  # numbers in memory at a time

Pairs = dict[tuple[int, int], str]  # two images, the smaller index first -> what distinguishes them


@dataclass(frozen=True)
class Group:
    """Images that are duplicates of one another."""

    members: tuple[int, ...]
    kinds: tuple[str, ...]  # same pixels, nearly the same, cropped, mirrored
    conflict: bool  # their labels differ
    leak: bool  # some are in train, others in a split to evaluate on


def find_groups(facts: Sequence[Facts], targets: str) -> list[Group]:
    """Return the groups of duplicates: those with different labels first, then those that leak from train."""
    first: dict[bytes, int] = {}
    pairs: Pairs = {}
    for i, one in enumerate(facts):
        if not one.problem and (other := first.setdefault(one.pixels, i)) != i:
            pairs[other, i] = "same pixels"
    chosen = np.array([i for i in first.values() if min(facts[i].width, facts[i].height) >= LEAST_SIDE], dtype=np.int64)
    near = near_duplicates(thumbnails([facts[i] for i in chosen]))
    pairs |= {(int(chosen[i]), int(chosen[j])): kind for (i, j), kind in near.items()}
    if not pairs:
        return []
    numbers = group_numbers(pairs, len(facts))
    kinds: dict[int, set[str]] = {}
    for (a, _), kind in pairs.items():
        kinds.setdefault(numbers[a], set()).add(kind)
    order, ends = _by_number(numbers, int(numbers.max()) + 1)
    groups = []
    for number, of_group in kinds.items():
        members = order[ends[number] : ends[number + 1]].tolist()
        splits = {facts[i].split for i in members}
        if targets in ("classes", "labels"):
            conflict = len({facts[i].labels for i in members}) > 1
        else:  # the mask or the boxes of a crop differ rightly
            conflict = len({(facts[i].pixels, facts[i].target) for i in members}) > len({facts[i].pixels for i in members})
        leak = "train" in splits and len(splits) > 1
        groups.append(Group(tuple(members), tuple(sorted(of_group)), conflict, leak))
    return sorted(groups, key=lambda group: (not group.conflict, not group.leak, group.members))


@threadpool_limits.wrap(limits=1)  # small products: a second thread would mostly wait for the first one
def near_duplicates(thumbs: np.ndarray) -> Pairs:
    """Return pairs that connect all near duplicates among thumbnails N 3 SIDE SIDE, YCbCr."""
    has_detail = np.concatenate([*(thumbs[i : i + BLOCK, 0].std((1, 2)) >= LEAST_DETAIL for i in _starts(thumbs)), [False]])
    chosen = np.flatnonzero(has_detail)
    thumbs, pairs, scores = thumbs[chosen], Pairs(), dict[tuple[int, int], float]()
    if len(thumbs) < 2:
        return pairs
    cells = Cells(_descriptors(thumbs, 0, mirrored=False))
    variants = [(window, mirrored) for mirrored in (False, True) for window in range(len(WINDOWS))]
    for window, mirrored in tqdm(variants, "near duplicates", unit="view", leave=False):
        kind = "mirrored" if mirrored else "cropped" if window else "nearly the same"
        groups = group_numbers(pairs, len(chosen))  # of what the views before have found: it is not compared again
        for i, j in cells.search(_descriptors(thumbs, window, mirrored=mirrored), groups):
            for first in _starts(i):
                some = slice(first, first + BLOCK)
                seen, whole = (thumbs[of[some]].reshape(-1, SIDE, SIDE) for of in (i, j))  # N 3 ... -> 3N ...
                views = _view(seen, window, FINE, mirrored=mirrored), _view(whole, 0, FINE)
                same = _same_detail(*(view.reshape(-1, 3, FINE, FINE) for view in views))
                for hit in np.flatnonzero(same >= SAME_DETAIL):
                    a, b = sorted((int(i[first + hit]), int(j[first + hit])))
                    if same[hit] > scores.get((a, b), 0):
                        scores[a, b], pairs[a, b] = float(same[hit]), kind
    return {(int(chosen[a]), int(chosen[b])): kind for (a, b), kind in pairs.items()}


def group_numbers(pairs: Pairs, n: int) -> np.ndarray:
    """Return the number of the group of each of n images, which pairs connect."""
    i, j = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    return connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)[1]


def _starts(items: np.ndarray) -> range:
    return range(0, len(items), BLOCK)


def _view(planes: np.ndarray, window: int, side: int, *, mirrored: bool = False) -> np.ndarray:
    """Cut a window out of planes, N SIDE SIDE, and scale it to N `side` `side`, by bilinear interpolation and averaging."""
    length, top, left = WINDOWS[window]
    matrices = []  # rows and columns: `side` x SIDE each, to resample a part of a line
    for start in (top, left):
        places = np.clip((np.arange(SIDE) + 0.5) * length + start * SIDE - 0.5, 0, SIDE - 1)
        weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(SIDE)))
        matrices.append(weights.reshape(side, SIDE // side, SIDE).mean(1).astype(np.float32))
    rows, columns = matrices
    both = np.kron(rows, columns[:, ::-1] if mirrored else columns)
    return (planes.reshape(len(planes), -1).astype(np.float32) @ both.T).reshape(-1, side, side)


def _descriptors(thumbs: np.ndarray, window: int, *, mirrored: bool) -> np.ndarray:
    """Return unit vectors, N 96: luma without its mean and contrast, and chroma, which weighs less in images of little color."""
    parts = []
    for i in _starts(thumbs):
        some = thumbs[i : i + BLOCK]
        luma = _view(some[:, 0], window, 8, mirrored=mirrored).reshape(len(some), -1)
        luma -= luma.mean(1, keepdims=True)
        luma /= np.maximum(np.linalg.norm(luma, axis=1, keepdims=True), 1)
        chroma = _view(some[:, 1:].reshape(-1, SIDE, SIDE), window, 4, mirrored=mirrored).reshape(len(some), -1) - 128
        chroma /= np.maximum(np.linalg.norm(chroma, axis=1, keepdims=True), 80)
        both = np.concatenate([luma, chroma], 1)
        parts.append(both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 0.1))
    return np.concatenate(parts)


class Cells:
    """Descriptors, each in the cell of its nearest pivot. The pivots are descriptors chosen at random, sqrt(n) of them."""

    def __init__(self, base: np.ndarray) -> None:
        self.base, n = base, max(1, round(len(base) ** 0.5))
        self.pivots = base[np.random.default_rng(0).choice(len(base), n, replace=False)]
        self.order, self.ends = _by_number(self._nearest(base, 1).ravel(), n)

    def _nearest(self, queries: np.ndarray, n: int) -> np.ndarray:
        """Return the numbers of the n nearest pivots of each query."""
        parts = (queries[i : i + BLOCK] @ self.pivots.T for i in _starts(queries))
        return np.concatenate([np.argpartition(-part, n - 1, axis=1)[:, :n] for part in parts])

    def search(self, queries: np.ndarray, groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield indices of queries, and of descriptors of another group that are similar to them."""
        n_probes = min(PROBES, len(self.pivots))
        asking, ends = _by_number(self._nearest(queries, n_probes).ravel(), len(self.pivots))
        for cell in range(len(self.pivots)):
            members = self.order[self.ends[cell] : self.ends[cell + 1]]
            rows = asking[ends[cell] : ends[cell + 1]] // n_probes
            step = max(1, MOST_PRODUCTS // max(1, len(members)))
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                similarity = queries[some] @ self.base[members].T
                i, j = np.nonzero(similarity > SIMILAR)
                values = similarity[i, j]
                i, j, values = (part[groups[some[i]] != groups[members[j]]] for part in (i, j, values))
                best = np.lexsort((-values, i))
                i, j = i[best], j[best]
                rank = np.arange(len(i)) - np.searchsorted(i, i)
                yield some[i[rank < MOST_CANDIDATES]], members[j[rank < MOST_CANDIDATES]]


def _by_number(numbers: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order that sorts numbers below n, and where each number begins in it."""
    order = np.argsort(numbers, kind="stable")
    return order, np.searchsorted(numbers[order], np.arange(n + 1))


def _same_detail(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the share of b's fine detail that a explains, shifted and stretched a little: views N 3 FINE FINE."""
    a, b = (view - uniform_filter(view, (0, 0, 7, 7), mode="nearest") for view in (a, b))
    down, across = np.gradient(a, axis=(2, 3))
    line = np.linspace(-1, 1, FINE, dtype=np.float32)
    known = np.stack([a, down, across, down * line[:, None], across * line], 1).reshape(len(a), 5, -1)
    wanted = b.reshape(len(b), -1, 1)
    weights = np.linalg.solve(known @ known.transpose(0, 2, 1) + 1e-2 * np.eye(5, dtype=np.float32), known @ wanted)
    rest = wanted - known.transpose(0, 2, 1) @ weights
    return 1 - (rest**2).sum((1, 2)) / np.maximum((wanted**2).sum((1, 2)), FINE * FINE * LEAST_DETAIL)

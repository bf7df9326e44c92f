"""The features of the penultimate layer in two dimensions, colored by class."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from engine.config.command_line import require_packages
from engine.config.errors import ConfigError
from engine.inference.trained import Trained
from engine.plots.images import short
from engine.plots.style import COLORS, new_figure, style
from tools.pictures.output import save_pictures
from tools.pictures.subject import find_split, model_title, open_classifier, penultimate, read_batches, require_positive, spread

BATCH = 64
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
MOST_IN_LEGEND = 20  # classes


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    if args.method == "umap":
        require_packages("umap", needed_by="--method umap")
    n = require_positive("--n", args.n)
    trained = open_classifier(args, overrides)
    features, labels = read_features(trained, args.split, n)
    if len(features) < 3:
        raise ConfigError(f"--n: at least 3 images are needed, and there are {len(features)}")
    points, method = project(features, args.method, trained.config.seed)
    title = f"{model_title(trained)}, {len(points):,} images of {args.split}: {features.shape[1]} features by {method}"
    draw(figure := new_figure(show=args.show), points, labels, trained.data.classes, title)
    save_pictures({"embeddings": figure}, args, trained.run_dir, trained.step)


def read_features(trained: Trained, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the classifier layer, n x `num_features`, and the labels of n images, spread over the split."""
    features_of, features, labels = penultimate(trained.model), [], []
    with torch.no_grad():
        for inputs, targets in read_batches(trained, split, spread(n, len(find_split(trained, split))), BATCH):
            features.append(features_of(inputs))
            labels.append(targets.cpu())
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def project(features: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, str]:
    """Points, n x 2, and a description of the method."""
    n, seed = len(features), seed % 2**32
    if method == "pca":
        pca = PCA(2, random_state=seed)
        points = pca.fit_transform(features)
        return points, f"PCA ({100 * pca.explained_variance_ratio_.sum():.0f} % of the variance)"
    if method == "umap":
        from umap import UMAP

        neighbors = min(15, n - 1)
        umap = UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1)
        return umap.fit_transform(features), f"UMAP ({neighbors} neighbors)"
    perplexity = min(30, (n - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return tsne.fit_transform(features), f"t-SNE (perplexity {perplexity:.3g})"


def draw(figure: Figure, points: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draw each class in its own color and marker, with its name at the median of its points."""
    occurring = np.unique(labels).tolist()
    halo = [withStroke(linewidth=2.5, foreground="white")]
    with style():
        figure.set_size_inches(8.4 if len(occurring) <= MOST_IN_LEGEND else 8, 7)
        axes = figure.subplots()
        for i, label in enumerate(occurring):
            x, y = points[labels == label].T
            color, marker = COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]
            name = short(classes[label])
            axes.scatter(x, y, s=14, color=color, marker=marker, alpha=0.7, linewidths=0, label=name)
            axes.text(np.median(x), np.median(y), name, ha="center", va="center", path_effects=halo, fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
        if len(occurring) <= MOST_IN_LEGEND:
            figure.legend(loc="outside right center", markerscale=1.6)

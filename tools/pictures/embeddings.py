"""What the classifier sees of each image: the features of the penultimate layer, in two dimensions, colored by class.

t-SNE: van der Maaten, Hinton (2008): Visualizing Data using t-SNE. https://jmlr.org/papers/v9/vandermaaten08a.html
UMAP: McInnes, Healy, Melville (2018): Uniform Manifold Approximation and Projection. https://arxiv.org/abs/1802.03426
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.config.command_line import require_packages
from engine.config.errors import ConfigError, RunError
from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.subject import (
    SOURCE,
    USAGE,
    add_source,
    add_split,
    batches_of,
    expect_classes,
    expect_positive,
    name_of,
    open_source,
    split_of,
    spread,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from engine.inference.trained import Trained

EXAMPLES = """
Only PCA keeps distances; t-SNE and UMAP keep who is whose neighbor. UMAP needs umap-learn.

examples:
  python tools/visualize.py embeddings runs/first
  python tools/visualize.py embeddings runs/first --method pca --n 5000
  python tools/visualize.py embeddings timm/resnet18 -c configs/resnet18_cifar10.yaml      other images than it was trained on
"""
METHODS = {"tsne": "t-SNE", "pca": "PCA", "umap": "UMAP"}
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
MOST_IN_LEGEND = 20  # classes


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "embeddings",
        help="the penultimate layer in two dimensions",
        description=__doc__,
        epilog=SOURCE + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL [--method tsne|pca|umap] [--n N] [--split SPLIT] " + USAGE,
    )
    add_source(parser)
    add_split(parser)
    parser.add_argument("--method", default="tsne", choices=METHODS, help="default: tsne")
    parser.add_argument("--n", type=int, default=2000, help="how many images, spread over the split (default: 2000)")
    add_output(parser, "embeddings.png, in figures/ of a run")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    if args.method == "umap":
        require_packages("umap", needed_by="--method umap")
    n = expect_positive("--n", args.n)
    trained = open_source(args, overrides)
    expect_classes(trained.task, trained.config, "embeddings")
    features, labels = features_of(trained, args.split, n)
    if len(features) < 3:
        raise ConfigError(f"--n: {len(features)} images make no picture of neighbors")
    points, said = laid_out(features, args.method, trained.config.seed)
    title = f"{name_of(trained)}, {len(points):,} images of {args.split}: {features.shape[1]} features by {said}"
    draw(figure := new_figure(args), points, labels, trained.data.classes, title)
    deliver({"embeddings": figure}, args, trained.run_dir, trained.step)
    return 0


def features_of(trained: "Trained", split: str, n: int) -> "tuple[np.ndarray, np.ndarray]":
    """Of n images, spread over the split: their features, n x `num_features`, and labels."""
    import torch

    found = []
    with torch.no_grad():
        for inputs, labels in batches_of(trained, split, spread(n, len(split_of(trained, split)))):
            found.append((penultimate(trained.model, inputs).cpu(), labels.cpu()))
    features, labels = map(torch.cat, zip(*found, strict=True))
    return features.float().numpy(), labels.numpy()


def penultimate(model: "nn.Module", inputs: "Tensor") -> "Tensor":
    """What the classifier is given, B num_features."""
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise RunError(f"{type(model).__name__} has no forward_features and forward_head, so what its classifier sees is unknown")
    return model.forward_head(model.forward_features(inputs), pre_logits=True).flatten(1)


def laid_out(features: "np.ndarray", method: str, seed: int) -> "tuple[np.ndarray, str]":
    """Points, n x 2, and how they came about."""
    n, seed = len(features), seed % 2**32
    if method == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(2, random_state=seed)
        points = pca.fit_transform(features)
        return points, f"PCA ({100 * pca.explained_variance_ratio_.sum():.0f} % of the variance)"
    if method == "umap":
        from umap import UMAP

        neighbors = min(15, n - 1)
        umap = UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1)
        return umap.fit_transform(features), f"UMAP ({neighbors} neighbors)"
    from sklearn.manifold import TSNE

    perplexity = min(30, (n - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return tsne.fit_transform(features), f"t-SNE (perplexity {perplexity:.3g})"


def draw(figure: "Figure", points: "np.ndarray", labels: "np.ndarray", classes: Sequence[str], title: str) -> None:
    """Each class has a color, a marker and its name where its middle is."""
    import numpy as np
    from matplotlib.patheffects import withStroke

    from engine.plots.images import short
    from engine.plots.style import COLORS, style

    there = np.unique(labels).tolist()
    with style():
        figure.set_size_inches(8.4 if len(there) <= MOST_IN_LEGEND else 8, 7)
        axes = figure.subplots()
        for i, label in enumerate(there):
            of_class = points[labels == label]
            color, marker = COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]
            name = short(classes[label])
            axes.scatter(*of_class.T, s=14, color=color, marker=marker, alpha=0.7, linewidths=0, label=name)
            halo = [withStroke(linewidth=2.5, foreground="white")]
            axes.text(*np.median(of_class, axis=0), name, ha="center", va="center", path_effects=halo, fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
        if len(there) <= MOST_IN_LEGEND:
            figure.legend(loc="outside right center", markerscale=1.6)

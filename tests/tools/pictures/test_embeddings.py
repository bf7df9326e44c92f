import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from engine.config.command_line import run_tool
from engine.inference.trained import load_trained
from tools.pictures.embeddings import draw, project, read_features
from tools.visualize import main

CLASSIFIERS = {"lenet": "fc3", "resnet18": "fc", "googlenet": "fc", "vit": "head"}


@torch.no_grad()
def read_by_the_classifier(trained, name):
    """Return the inputs of the classifier layer for the whole split."""
    seen, labels = [], []
    layer = trained.model.get_submodule(CLASSIFIERS[name])
    layer.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    for images, targets in trained.data.loader("valid").batches():
        trained.model(images)
        labels.append(targets)
    return torch.cat(seen).numpy(), torch.cat(labels).numpy()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_features_are_the_inputs_of_the_classifier(small_runs, name):
    trained = load_trained(small_runs[name], {})
    features, labels = read_features(trained, "valid", 10_000)
    expected_features, expected_labels = read_by_the_classifier(trained, name)
    np.testing.assert_allclose(features, expected_features, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(labels, expected_labels)
    assert features.shape[1] == trained.model.num_features


@pytest.mark.parametrize("name", ["lenet", "resnet18", "vit"])  # the features of an untrained GoogLeNet hardly differ
def test_pca_is_sklearns(small_runs, name):
    trained = load_trained(small_runs[name], {})
    features, _ = read_features(trained, "valid", 10_000)
    expected_features, _ = read_by_the_classifier(trained, name)
    points, description = project(features, "pca", seed=0)
    pca = PCA(n_components=2, svd_solver="full").fit(expected_features)
    expected = pca.transform(expected_features)
    signs = np.sign((points * expected).sum(0))
    np.testing.assert_allclose(points * signs, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert description == f"PCA ({100 * pca.explained_variance_ratio_.sum():.0f} % of the variance)"


@pytest.mark.parametrize("method", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])  # its numba compiles first
def test_neighbors_stay_neighbors_and_the_same_seed_gives_the_same_picture(method):
    random = np.random.default_rng(0)
    features = (random.normal(size=(4, 1, 20)) * 5 + random.normal(size=(4, 30, 20))).reshape(120, 20).astype(np.float32)
    points, _ = project(features, method, seed=2**40)
    assert trustworthiness(features, points) > 0.8
    np.testing.assert_array_equal(points, project(features, method, seed=2**40)[0])


def test_fewer_images_are_spread_over_the_split(small_runs):
    trained = load_trained(small_runs["resnet18"], {})
    all_of_them, _ = read_features(trained, "valid", 64)
    some, labels = read_features(trained, "valid", 16)
    np.testing.assert_allclose(some, all_of_them[::4], rtol=1e-4, atol=1e-5)
    assert labels.tolist() == trained.data.splits["valid"].labels[::4].tolist()


def test_classes_differ_in_color_or_marker_and_have_names():
    points, labels = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 20
    draw(figure := Figure(), points, labels, [f"class {i}" for i in range(20)], "title")
    drawn = figure.axes[0].collections
    styles = {(scatter.get_facecolor().tobytes(), scatter.get_paths()[0].vertices.tobytes()) for scatter in drawn}
    assert len(styles) == 20
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"class {i}" for i in range(20)]
    for i, scatter in enumerate(drawn):
        np.testing.assert_array_equal(scatter.get_offsets(), points[labels == i])


def test_a_missing_umap_is_one_line_with_the_command_that_installs_it(small_runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "umap", None)
    assert run_tool(lambda: main(["embeddings", str(small_runs["lenet"]), "--method", "umap"])) == 1
    assert (
        "--method umap needs packages that are not installed: umap; pip install -r requirements-extra.txt"
        in capsys.readouterr().err
    )

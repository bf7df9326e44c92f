"""Likely wrong labels, by confident learning on held-out predictions.

Curtis G. Northcutt, Lu Jiang, Isaac L. Chuang (2021): Confident Learning: Estimating Uncertainty in Dataset Labels. JAIR.
https://arxiv.org/abs/1911.00068
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from engine.inference.trained import Trained
from tools.dataset_report.facts import Facts
from tools.pictures.subject import penultimate, read_batches, require_classification, spread

BATCH = 64
FOLDS = 5
MOST_TRAINING_IMAGES = 100_000  # that a linear classifier is trained on, as it takes minutes for them


@dataclass(frozen=True)
class Judged:
    """The images whose labels were judged, by their indices in the list of facts."""

    indices: np.ndarray
    suspicion: np.ndarray  # from 0 to 1: how much more probable another class is
    is_suspect: np.ndarray
    suggested: np.ndarray  # the class that is more probable
    how: tuple[str, ...]  # sentences for people

    @property
    def suspects(self) -> list[tuple[int, int, float]]:
        """The suspects: index, suggested class and suspicion, the most suspicious first."""
        order = np.argsort(-self.suspicion, kind="stable")
        rows = zip(self.indices[order], self.suggested[order], self.suspicion[order], self.is_suspect[order], strict=True)
        return [(int(i), int(suggested), float(suspicion)) for i, suggested, suspicion, is_one in rows if is_one]


def judge_labels(trained: Trained, facts: Sequence[Facts]) -> Judged:
    """Judge labels by predictions for images that the classifier was not trained on.

    A run's predictions are held out for every split but train. The labels of train, and all labels for a model that was trained
    on other classes, are judged by a linear classifier on the model's features, in cross-validation.
    """
    require_classification(trained.task, trained.config, "--run")
    is_own = trained.checkpoint is not None and trained.classes == trained.data.classes
    parts, by_features, how = [], [], []
    for split, whole in trained.data.splits.items():
        first = next(i for i, one in enumerate(facts) if one.split == split)
        readable = [i for i in range(len(whole)) if not facts[first + i].problem]
        if is_own and split != "train":
            _, probabilities = _outputs(trained, split, readable)
            parts.append((np.array(readable) + first, probabilities))
            how.append(f"{split}: predictions of {trained.weights}")
        else:
            chosen = [readable[i] for i in spread(MOST_TRAINING_IMAGES, len(readable))]
            by_features.append((np.array(chosen) + first, _outputs(trained, split, chosen)[0]))
            of = f" ({len(chosen):,} of its {len(readable):,} images)" if len(chosen) < len(readable) else ""
            how.append(f"{split}{of}: {FOLDS}-fold cross-validation of a linear classifier on the features of {trained.weights}")
    if by_features:
        indices, features = (np.concatenate(columns) for columns in zip(*by_features, strict=True))
        labels = np.array([facts[i].labels[0] for i in indices])
        enough = np.bincount(labels, minlength=len(trained.data.classes))[labels] >= FOLDS
        if n_few := int((~enough).sum()):
            how.append(f"not judged: {n_few:,} images of classes with fewer than {FOLDS}")
        if len(np.unique(labels[enough])) > 1:
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
            folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
            found = np.zeros((int(enough.sum()), len(trained.data.classes)))
            found[:, np.unique(labels[enough])] = cross_val_predict(
                classifier, features[enough], labels[enough], cv=folds, method="predict_proba"
            )
            parts.append((indices[enough], found))
    judged, probabilities = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    labels = np.array([facts[i].labels[0] for i in judged])
    return Judged(judged, *confident_learning(probabilities, labels), tuple(how))


def confident_learning(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each image its suspicion, whether it is a suspect, and the most probable other class.

    The threshold of a class is the mean probability of that class among the images that are labeled so. A suspect is an image
    that passes the threshold of another class, and that of no class by a higher probability. Its suspicion is the normalized
    margin between that class and its label.
    """
    rows, n_classes = np.arange(len(labels)), probabilities.shape[1]
    given = probabilities[rows, labels]
    sums = np.bincount(labels, given, n_classes)
    thresholds = np.divide(sums, np.bincount(labels, minlength=n_classes), out=np.full(n_classes, np.inf), where=sums > 0)
    passing = np.where(probabilities >= thresholds, probabilities, -1.0)
    is_suspect = (passing.max(1) >= 0) & (passing.argmax(1) != labels)
    others = probabilities.copy()
    others[rows, labels] = -1.0
    suggested = np.where(is_suspect, passing.argmax(1), others.argmax(1))
    return (1 + others.max(1) - given) / 2, is_suspect, suggested


@torch.no_grad()
def _outputs(trained: Trained, split: str, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the classifier layer and the predicted probabilities."""
    features_of, features, probabilities = penultimate(trained.model), [], []
    for batch in tqdm(read_batches(trained, split, indices, BATCH), split, -(-len(indices) // BATCH), unit="batch", leave=False):
        features.append(features_of(batch[0]))
        probabilities.append(trained.task.predict(trained.model, batch).float().cpu())
    return torch.cat(features).numpy(), torch.cat(probabilities).numpy()

"""What a model answers to each image of a split, in plain words of torch."""

import numpy as np
import torch

from engine.inference.trained import Trained


@torch.no_grad()
def answers(trained: Trained, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities."""
    labels, probabilities = [], []
    for images, targets in trained.data.loader(split).batches():
        labels.append(targets)
        probabilities.append(torch.softmax(trained.model(images).double(), dim=1))
    return torch.cat(labels).numpy(), torch.cat(probabilities).numpy()

"""What every training imports, imported once: by the process that the others are forked from. It runs nothing in parallel."""

import matplotlib.pyplot
import sklearn.datasets
import timm.optim
import torch.utils.tensorboard
import torchvision.utils

import engine.plots.curves
import engine.run.macs
import engine.train
import main

__all__ = ["engine", "main", "matplotlib", "sklearn", "timm", "torch", "torchvision"]

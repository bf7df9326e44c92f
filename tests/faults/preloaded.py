"""Imports of every training, loaded once in the fork server. None of them may start a thread."""

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

"""Imports that every training of a framework needs, for a server that forks them."""

import importlib
import os

import torch

importlib.import_module(os.environ["EXAM_PRELOAD"])
importlib.import_module("tests.exam.work")
torch.set_num_threads(1)

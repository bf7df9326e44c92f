"""The pictures of tools/visualize.py: one module each, whose `run(args, overrides)` draws and saves it.

They share options, subject (which model, which images) and output. Computations are in activations, attention and layers.
"""

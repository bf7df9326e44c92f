"""The pictures of tools/visualize.py: one module each, whose `run(args, overrides)` draws and saves it."""

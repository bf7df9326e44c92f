"""The pictures of tools/visualize.py, one file each: `add_command(commands)` says what it takes, `run(args, overrides)` draws it.

The files that those share: output, subject, columns, activations, attention, cam.
"""

"""The parts of tools/compare.py: read runs, group them into rows, write text, a figure and a page, and train variants."""

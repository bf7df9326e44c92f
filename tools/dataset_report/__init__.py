"""The parts of tools/verify_dataset.py: facts about each image, duplicates, likely wrong labels, and the page."""

"""Data sets, one file per family, and the loaders that make batches of them.

A family file holds a table `DATASETS`, name -> DatasetSpec, and is found by being here. Images are uint8 until the device that
trains has them; a split is either `Images`, all in memory, or `Files`, decoded by workers.
"""

from datasets.catalog import find_dataset, list_datasets
from datasets.splits import DatasetSpec, Files, Images, Loaded, Source, Split

__all__ = ["DatasetSpec", "Files", "Images", "Loaded", "Source", "Split", "find_dataset", "list_datasets"]

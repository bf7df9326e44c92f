"""Data sets, one file per family, and the loaders that make batches of them.

A family file holds a table `DATASETS`, name -> DatasetSpec, and is found by being here. Images are uint8 until the device that
trains has them; a split is either `Images`, all in memory, or `Files`, decoded by workers.
"""

import sys

from datasets.pipeline import splits
from datasets.pipeline.catalog import find_dataset, list_datasets
from datasets.pipeline.splits import DatasetSpec, Files, Images, Loaded, Source, Split

# `from datasets.splits import ...` is what plugins written for earlier versions say
sys.modules[f"{__name__}.splits"] = splits

__all__ = ["DatasetSpec", "Files", "Images", "Loaded", "Source", "Split", "find_dataset", "list_datasets"]

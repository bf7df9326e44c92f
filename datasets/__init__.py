"""Datasets, one module per family, and the pipeline that makes batches of them.

Each module directly in this folder holds a table `DATASETS`, a list of DatasetSpec. Images stay uint8 until they are on the
training device. A split is either `Images`, held in memory, or `Files`, decoded by workers.
"""

import sys

from datasets.pipeline import splits
from datasets.pipeline.catalog import find_dataset, list_datasets
from datasets.pipeline.splits import DatasetSpec, Files, Images, Loaded, Source, Split

# plugins import from datasets.splits
sys.modules[f"{__name__}.splits"] = splits

__all__ = ["DatasetSpec", "Files", "Images", "Loaded", "Source", "Split", "find_dataset", "list_datasets"]

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import on_disk
from tests.running import stop_ignoring_signals


def pytest_configure() -> None:
    """Use one thread: tests run in parallel, and the order of summation depends on the number of threads."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
    stop_ignoring_signals()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A folder with a small dataset in every format, each in a subfolder with the name of the dataset."""
    return on_disk.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plugins_of_this_module() -> Iterator[None]:
    """Unregister the plugins that the tests of a module have loaded, before the next module runs in this process."""
    from datasets.pipeline import catalog
    from engine import plugins, tasks
    from models.loading import factory

    tables = (plugins._loaded, catalog.DATASETS.entries, tasks.TASKS.entries, factory.MODELS.entries)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)

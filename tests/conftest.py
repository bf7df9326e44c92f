from pathlib import Path

import pytest
import torch

from tests import on_disk


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tests run side by side, and the order of a sum depends on the number of threads


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A folder with a small set in every format; each in a folder of the data set's name."""
    return on_disk.write_all(tmp_path_factory.mktemp("data"))

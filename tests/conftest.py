from pathlib import Path

import pytest
import torch

from tests import on_disk


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A folder with a small set in every format; each in a folder of the data set's name."""
    return on_disk.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side, and sums over threads would depend on their number."""
    torch.set_num_threads(1)

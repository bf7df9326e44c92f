import errno
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from engine.run.checkpoint import save_tensors

resource = pytest.importorskip("resource")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_file_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = tmp_path / "new"
        folder.mkdir()
        save_tensors({"a": torch.arange(3)}, folder / "tensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "tensors").stat().st_mode) == 0o666 & ~mask
    assert torch.equal(load_file(folder / "tensors")["a"], torch.arange(3))


def test_full_disk_is_an_os_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save_tensors({"a": torch.zeros(1000)}, tmp_path / "tensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG

import errno
import os
import stat

import pytest


@pytest.fixture
def plain_disk(monkeypatch):
    """Behave like exFAT: no symlinks, and fsync of a folder is an error."""
    fsync = os.fsync

    def fsync_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fsync_files)
    monkeypatch.setattr(os, "symlink", no_links)

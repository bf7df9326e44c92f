"""Read files that may come from a stranger, and replace files so that a crash leaves the old or the new content.

Only regular files are read: a pipe or device would block or never end. Small files are read up to a limit.
"""

import errno
import json
import logging
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

MAX_BYTES = 10_000_000  # of a small file
NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR)  # exFAT, some network disks, Windows


class MalformedFile(OSError):
    """A file whose content or kind is not what it should be. The message names the file."""

    def __init__(self, path: Path | str, problem: str) -> None:
        self.problem = first_line(problem, 1000)
        super().__init__(f"{one_line(path)}: {self.problem}")


def open_regular(path: Path | str, *, follow_link: bool = True) -> BinaryIO:
    """Open a regular file. A pipe, device or folder, or a symlink that is not to be followed, raises MalformedFile."""
    if not follow_link and os.path.islink(path):
        raise MalformedFile(path, "it is a symlink")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise MalformedFile(path, "it is not a regular file")
    return os.fdopen(handle, "rb")


def read_limited(path: Path | str, limit: int = MAX_BYTES, *, follow_link: bool = True) -> bytes:
    """Return the content of a regular file of at most `limit` bytes."""
    with open_regular(path, follow_link=follow_link) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""
        if size < len(content) <= limit:  # it grows, or has no size, as in /proc
            content += file.read(limit + 1 - len(content))
    if max(size, len(content)) > limit:
        raise MalformedFile(path, f"it has more than {limit:,} bytes, too many for such a file")
    return content


def read_json(path: Path | str, limit: int = MAX_BYTES, *, follow_link: bool = True) -> Any:
    """Return the value in a JSON file. Content that isn't JSON raises MalformedFile."""
    content = read_limited(path, limit, follow_link=follow_link)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        problem = "it is empty" if not content.strip(b"\0 \n") else f"it is not JSON ({error or type(error).__name__})"
        raise MalformedFile(path, problem) from error


def linked_folder(link: Path) -> Path | None:
    """Return the checkpoint that `latest` or `best` refers to; None if that folder doesn't exist.

    It is a symlink or, where there are none, a text file with the name of a step folder; after a copy, it may be a folder itself.
    """
    if link.is_symlink():
        name = os.readlink(link)
    elif link.is_file() and link.stat().st_size < 100:
        name = read_limited(link).decode(errors="replace").strip()
    else:
        return link if link.is_dir() else None
    folder = link.with_name(name) if name.startswith("step-") and not set(name) & {"/", "\\", "\0"} else None
    return folder if folder is not None and folder.is_dir() and not folder.is_symlink() else None


def replace_file(path: Path, write: bytes | Callable[[Path], Any]) -> None:
    """Replace a file: write a temporary one beside it, fsync it, rename it, and fsync the folder.

    `write` is the content, or a function that writes it to the path that it gets. A symlink at `path` is replaced, not followed.
    """
    part = temporary(path)
    part.unlink(missing_ok=True)
    try:
        if isinstance(write, bytes):
            with part.open("xb") as file:
                file.write(write)
        else:
            write(part)
        fsync_file(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def temporary(path: Path) -> Path:
    """Return this process's name for a file or folder that is being written."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def fsync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Fsync a folder, so that the names in it survive a power cut. A file system that can't do it costs one warning."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC:
            raise
        if os.name != "nt":
            warn_once(f"this file system can't flush folders ({error.strerror}); a power cut may lose files")


@cache
def warn_once(message: str) -> None:
    log.warning("%s", message)


def first_line(text: str, limit: int = 200) -> str:
    """Return the first line of a stranger's text, shortened, without characters that would control a terminal."""
    return one_line(text.partition("\n")[0])[:limit]


def one_line(path: Path | str) -> str:
    """Return a path without characters that would control a terminal or break a line."""
    return "".join(c if c.isprintable() else "?" for c in str(path))


def stays_inside(name: str) -> bool:
    """Return whether a name from a file is that of something in its folder. Only the name counts: a link may lead elsewhere."""
    path = PurePath(name)
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts

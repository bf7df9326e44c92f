"""Download published files and verify their checksums."""

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from datasets.pipeline.splits import Source
from models.loading.files import MalformedFile, open_regular, replace_file

TIMEOUT = 5.0  # seconds without a response


def missing_files(files: Sequence[tuple[Path, str]], *, verify: bool) -> list[Path]:
    """Return the paths of (path, md5) that are missing or, if `verify`, differ from the published file.

    A pipe or device raises MalformedFile: a download would not replace it, but write into it.
    """
    for path, _ in files:
        if path.exists() and not path.is_file():
            raise MalformedFile(path, "it is not a regular file")
    return [path for path, md5 in files if not path.is_file() or (verify and md5_of(path) != md5)]


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(files: Sequence[tuple[str, str, str]], source: Source, *, wanted: Path, what: str, into: Path | None = None) -> None:
    """Download (url, name, md5) into the data folder, and unpack archives. The error of a failure says where to put them."""
    into = into or source.root
    advice = f"put the files into {wanted}, or name their folder with data.dataroot"
    if not source.download:
        raise OSError(f"{what} is not in {source.root}; data.download is false: {advice}")
    for url, name, md5 in files:
        target = into / name
        try:
            if not target.is_file():
                _download(url, target)
            if md5_of(target) != md5:
                raise MalformedFile(target, f"not the published file (checksum {md5}); remove it and try again")
            if name.endswith((".tar.gz", ".tgz")):
                unpack_tar(target, into)
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise OSError(f"{what} is not in {source.root} and {url} can't be reached ({reason}): {advice}") from error


def _download(url: str, target: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        target.parent.mkdir(parents=True, exist_ok=True)

        def write(part: Path) -> None:
            with part.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)

        replace_file(target, write)


def unpack_tar(archive: Path, folder: Path) -> None:
    """Unpack into `folder`. Nothing is written if a member would land outside of it."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                tarfile.data_filter(member, str(folder))
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise MalformedFile(archive, f"it can't be unpacked ({error})") from error

"""Where an image is: a file, or a part of a larger one, such as a shard.

A place is text or bytes, so that a million of them are one array: a path, or path, offset, length and name, separated by NULs.
"""

import os

from models.loading.files import MalformedFile, one_line, open_regular, read_limited

SEPARATOR = "\0"  # the one character that no path has


def part_of(path: str, offset: int, length: int, name: str) -> bytes:
    """Return the place of a part of a file. `name` is what messages call it."""
    return os.fsencode(SEPARATOR.join((path, str(offset), str(length), name)))


def file_of(place: str) -> str:
    return place.partition(SEPARATOR)[0]


def shown(place: str) -> str:
    """Return what a message calls a place."""
    path, separator, rest = place.partition(SEPARATOR)
    return one_line(f"{path}: {rest.split(SEPARATOR, 2)[2]}" if separator else path)


def read_place(place: str, limit: int) -> bytes:
    """Return the content of a place, of at most `limit` bytes."""
    if SEPARATOR not in place:
        return read_limited(place, limit)
    path, offset, length, _ = place.split(SEPARATOR, 3)
    if int(length) > limit:
        raise MalformedFile(shown(place), f"it has more than {limit:,} bytes, too many for such a file")
    with open_regular(path) as file:
        file.seek(int(offset))
        content = file.read(int(length))
    if len(content) < int(length):
        raise MalformedFile(shown(place), "the file ends before it does")
    return content

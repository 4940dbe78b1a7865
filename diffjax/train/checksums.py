"""Checksums of a directory's files, so that no damaged byte is taken for a number.

The manifest is one JSON file in the directory: for each file below its folders the size and a
128-bit BLAKE2b digest, and a digest of this list itself. Reading compares all of them: a flipped
bit, a shortened file and a missing one are each found and named, in the manifest too.

Reference: Saarinen and Aumasson, "The BLAKE2 cryptographic hash and message authentication code",
RFC 7693, 2015, https://www.rfc-editor.org/rfc/rfc7693.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from diffjax.core.files import write_atomic

NAME = "manifest.json"

_THREADS = 8  # hashing runs outside Python's lock, and files on a network wait for each other less


class Damaged(ValueError):
    """A file that is not what was written; the message names it and says how."""


def write(directory: Path) -> None:
    """Writes the manifest of all files in the folders of `directory`, at once or not at all.

    Files beside the folders are not in it. Raises OSError where reading or writing fails.
    """
    names = sorted(
        file.relative_to(directory).as_posix()
        for folder in directory.iterdir()
        if folder.is_dir()
        for file in folder.rglob("*")
        if file.is_file()
    )
    digests = _digests([directory / name for name in names])
    files = {
        name: [(directory / name).stat().st_size, digest]
        for name, digest in zip(names, digests, strict=True)
    }
    write_atomic(directory / NAME, _render(files))


def verify(directory: Path, folders: Collection[str], *, part: int = 0, parts: int = 1) -> None:
    """Raises Damaged unless the files of `folders` are what the manifest says.

    part, parts: of several processes each reads its share of the files. The manifest itself is
    checked in each.
    """
    files = _read(directory)
    empty = sorted(set(folders) - {name.partition("/")[0] for name in files})
    if empty:
        raise Damaged(f"{NAME} knows no file of {empty[0]}")
    names = [n for n in sorted(files) if n.partition("/")[0] in folders][part::parts]
    for name in names:
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        if size != files[name][0]:
            raise Damaged(f"{name} has {size} bytes of {files[name][0]}")
    digests = _digests([directory / name for name in names])
    for name, digest in zip(names, digests, strict=True):
        if digest != files[name][1]:
            raise Damaged(f"{name} is not what was written: its checksum differs")


def _read(directory: Path) -> dict[str, tuple[int, str]]:
    """The manifest's list. Raises Damaged where it is missing or not as `write` leaves it."""
    try:
        text = (directory / NAME).read_bytes().decode()
        files = json.loads(text)["files"]
        whole = _render(files) == text
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{NAME} cannot be read ({error})") from error
    if not whole:
        raise Damaged(f"{NAME} is not what was written: its own checksum differs")
    return files


def _render(files: dict[str, list]) -> str:
    body = json.dumps(files, sort_keys=True)
    own = hashlib.blake2b(body.encode(), digest_size=16).hexdigest()
    return json.dumps({"blake2b": own, "files": files}, sort_keys=True, indent=1) + "\n"


def _digests(paths: Sequence[Path]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        # The stub wants a function without arguments of its own.
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

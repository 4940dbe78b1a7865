"""Checksums of a directory's files, so that no damaged byte is taken for a number.

The manifest is one JSON file in the directory: for each file below its folders the size and a
digest, and under the name of the digest that of this list itself. Reading compares all of them: a
flipped bit, a shortened file and a missing one are each found and named, in the manifest too.

The digest is SHA-256, for which processors have instructions: a core of those that do takes twice
the bytes a second of BLAKE2b, of 128 bits here, which manifests had at first and still may have.

References:
"Secure Hash Standard", FIPS 180-4, 2015, https://doi.org/10.6028/NIST.FIPS.180-4.
Saarinen and Aumasson, "The BLAKE2 cryptographic hash and message authentication code", RFC 7693,
2015, https://www.rfc-editor.org/rfc/rfc7693.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffjax.core.files import sync_directory, write_atomic

T = TypeVar("T")

NAME = "manifest.json"
KIND = "sha256"  # of what is written

_KINDS: dict[str, Callable[[], Any]] = {
    KIND: lambda: hashlib.sha256(usedforsecurity=False),
    "blake2b": lambda: hashlib.blake2b(digest_size=16, usedforsecurity=False),
}
_THREADS = 8  # hashing runs outside Python's lock, and files on a network wait for each other less


class Damaged(ValueError):
    """A file that is not what was written; the message names it and says how."""


def write(directory: Path) -> None:
    """Writes the manifest of all files in the folders of `directory`, at once or not at all.

    Files beside the folders are not in it. All that it names is on the disk, through a power cut,
    before the manifest is. Raises OSError where reading or writing fails.
    """
    found = [path for folder in directory.iterdir() for path in folder.rglob("*")]
    names = sorted(path.relative_to(directory).as_posix() for path in found if path.is_file())
    paths = [directory / name for name in names]
    _all(_sync, paths)
    for folder in {path.parent for path in found}:
        sync_directory(folder)
    digests = _all(functools.partial(_digest, KIND), paths)
    files = {
        name: [(directory / name).stat().st_size, digest]
        for name, digest in zip(names, digests, strict=True)
    }
    write_atomic(directory / NAME, _render(KIND, files))


def verify(directory: Path, folders: Collection[str], *, part: int = 0, parts: int = 1) -> None:
    """Raises Damaged unless the files of `folders` are what the manifest says.

    part, parts: of several processes each reads its share of the files. The manifest itself is
    checked in each.
    """
    kind, files = _read(directory)
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
    digests = _all(functools.partial(_digest, kind), [directory / name for name in names])
    for name, digest in zip(names, digests, strict=True):
        if digest != files[name][1]:
            raise Damaged(f"{name} is not what was written: its checksum differs")


def _read(directory: Path) -> tuple[str, dict[str, tuple[int, str]]]:
    """The name of the digest, and the manifest's list.

    Raises Damaged where it is missing or not as `write` leaves it.
    """
    try:
        text = (directory / NAME).read_bytes().decode()
        found = json.loads(text)
        files = found.pop("files")
        [kind] = found
        whole = _render(kind, files) == text
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{NAME} cannot be read ({error})") from error
    if not whole:
        raise Damaged(f"{NAME} is not what was written: its own checksum differs")
    return kind, files


def _render(kind: str, files: dict[str, list]) -> str:
    own = _KINDS[kind]()
    own.update(json.dumps(files, sort_keys=True).encode())
    return json.dumps({kind: own.hexdigest(), "files": files}, sort_keys=True, indent=1) + "\n"


def _all(work: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, paths))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digest(kind: str, path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _KINDS[kind]).hexdigest()

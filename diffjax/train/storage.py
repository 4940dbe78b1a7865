"""What checkpoints need of the file system, and of the other processes of a run."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")

# What a full or broken disk says: no space, quota, a limit on a file's size, read-only, broken.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class SaveError(OSError):
    """Something could not be written: no space, a quota, a broken disk. Names the place."""


class OtherProcess(RuntimeError):
    """Another process of the run failed in what all do together."""


def check_writable(directory: Path) -> None:
    """Makes the directory and a file in it. Raises OSError naming it, with the way out."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write checkpoints ({error.strerror}); choose another workdir",
            str(directory),
        ) from error


def error_number(error: BaseException) -> int | None:
    """The system's number behind an error, or None where the system has nothing to do with it."""
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        # Storage that is not Python's passes the system's words on, without the number.
        for code in FULL_OR_BROKEN:
            if os.strerror(code) in str(seen):
                return code
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, the one it came from, and so on. One that was raised twice may be its own cause."""
    seen: BaseException | None = error
    known: set[int] = set()
    while seen is not None and id(seen) not in known:
        yield seen
        known.add(id(seen))
        seen = seen.__cause__ or seen.__context__


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def same(numbers: Sequence[int]) -> bool:
    """Whether the numbers are the same in every process of the run, which all call this alike."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    text = json.dumps(list(numbers)).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    found: Any = multihost_utils.process_allgather(digest)
    return bool((np.asarray(found) == digest).all())


def agreed(work: Callable[[], T]) -> T:
    """`work()`, which raises in every process of the run where it raises in one.

    Called by all processes alike. Raises OtherProcess where `work` went well here only.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        well = np.asarray(multihost_utils.process_allgather(np.asarray(failure is None))).ravel()
        if failure is None and not well.all():
            failure = OtherProcess(f"process {int(np.argmin(well))} cannot read it")
    if failure is not None:
        raise failure
    return result

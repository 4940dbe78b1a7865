"""Disks that fill up: a small mounted one, a limit on the size of files, an injected error."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import tempfile
from pathlib import Path


@contextlib.contextmanager
def mounted(path, size):
    """A disk of `size` bytes at `path`. Raises PermissionError where mounting is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError("there is no command mount") from error
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def can_mount():
    """Whether a small disk can be had here."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            with mounted(Path(directory), 2**16):
                return True
        except PermissionError:
            return False


def fill(path, leaving=0):
    """Fills the disk below `path` but for so many bytes with one file, which it returns."""
    balloon = path / "balloon"
    with balloon.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    os.truncate(balloon, max(0, balloon.stat().st_size - leaving))
    return balloon


@contextlib.contextmanager
def limited_files(size):
    """No file of this process grows beyond `size` bytes while this is open."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def no_space(*args, **kwargs):
    """What a full disk answers."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

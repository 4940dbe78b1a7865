"""Files that are either old or new, never half written."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) to `path` so that a crash leaves the old file or the new.

    The bytes go to a temporary file in the same directory, reach the disk, and take the name in one
    step. The parent directories are made. Raises OSError where the system refuses, with `path`
    untouched and no temporary file left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def _mode(path: Path) -> int:
    """The permissions of the file being replaced, or those that `open` gives a new one."""
    # mkstemp makes files for their owner only, whatever the umask.
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync_directory(directory: Path) -> None:
    """Makes names given and taken in a directory last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

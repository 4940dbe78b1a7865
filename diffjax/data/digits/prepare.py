"""Writes the digits' files once, whole or not at all, whoever else is doing the same."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

from diffjax.data.digits.digits_dataset_builder import Builder
from diffjax.data.extras import require


def prepare(data_dir: str | os.PathLike | None = None) -> Path:
    """The directory of the prepared digits below data_dir; writes them if they are not there.

    data_dir: None is tfds's own default, $TFDS_DATA_DIR or ~/tensorflow_datasets. Files are
    written to a hidden directory beside and then renamed, so that a reader finds all or nothing
    after a kill; of several processes that prepare at once the first to rename wins and the others
    use its files. Raises ValueError where data_dir cannot be written.
    """
    if data_dir is not None:
        data_dir = Path(data_dir).expanduser()
    target = Path(Builder(data_dir=data_dir, file_format="array_record").data_dir)
    if _complete(target):
        return target
    require("sklearn")
    root = target.parents[1]  # <root>/digits/<version>
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".digits-", dir=root) as scratch:
            _write(Path(scratch), target)
    except OSError as error:
        raise ValueError(
            f"The digits' files cannot be written to {root} ({error}). Pass a data_dir that can "
            "be written, or set TFDS_DATA_DIR."
        ) from error
    return target


def _write(scratch: Path, target: Path) -> None:
    """Builds in scratch and moves the result to target, unless another process was first."""
    builder = Builder(data_dir=scratch, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()  # tfds prints progress bars, here for a tenth of a second
    try:
        os.rename(builder.data_dir, target)
    except OSError:
        if not _complete(target):
            raise


def _complete(target: Path) -> bool:
    """Whether the files are there; the rename makes one of them as good as all."""
    return (target / "dataset_info.json").is_file()

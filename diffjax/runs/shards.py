"""A directory of many images that a killed job goes on with: shards, each whole or not there.

Symbols: n images in shards of m, a whole number of batches; shard k holds images k m ... of them.

    manifest.json               what was asked for; another request is refused
    done/00003.json             shard 3 is whole: its images and their digest
    shard-00003.npz             format npz: `images`, uint8 levels, and `labels` if there are any
    shard-00003.array_record    format arrayrecord: a record an image, the bytes of an .npz with
                                `image` and, if there are any, `label`
    000123.png                  format png: image 123, its levels stretched to 0 .. 255

The files of a shard come first and its entry in done/ last. A shard without an entry is drawn again
as a whole; its images depend on their keys alone, so the files are those of a job that was never
stopped, bit for bit. Which process draws a shard does not show in it either: the number of
processes may change on the way. They share the directory. The number of devices in a process may
change too; what is drawn after that may round otherwise (`runs.spread`), a level at few pixels.

No more than one shard is held in memory, here or where the images are read again (`Stored`).
"""

import dataclasses
import io
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core.files import write_atomic
from diffjax.runs import digests, pictures
from diffjax.runs.workdir import RunError, differences

SCHEMA = 1  # of manifest.json; a change that old readers cannot read adds one
FORMATS = ("npz", "png", "arrayrecord")
_MANIFEST = "manifest.json"
_SUFFIXES = {"npz": ".npz", "arrayrecord": ".array_record"}


@dataclasses.dataclass(frozen=True)
class Shards:
    """Where images go and come from.

    format: one of `FORMATS`. num: n. size: m. shape: of an image, (H, W, C). levels: of a pixel.
    """

    folder: Path
    format: str
    num: int
    size: int
    shape: tuple[int, int, int]
    levels: int

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-self.num // self.size)

    @property
    def grid(self) -> Path:
        """A picture of the first images, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.png")

    def rows(self, k: int) -> range:
        """The images of shard k."""
        return range(k * self.size, min((k + 1) * self.size, self.num))

    def files(self, k: int) -> list[Path]:
        """The files of shard k, but for its entry in done/."""
        if self.format == "png":
            return [self.folder / f"{i:06d}.png" for i in self.rows(k)]
        return [self.folder / f"shard-{k:05d}{_SUFFIXES[self.format]}"]

    def entry(self, k: int) -> dict[str, Any] | None:
        """What done/ says of shard k; None where it must be drawn, as its files are not all there.

        Raises RunError for an entry that cannot be read.
        """
        path = self._entry(k)
        if not path.is_file() or not all(file.is_file() for file in self.files(k)):
            return None
        found = _read_json(path)
        size = sum(file.stat().st_size for file in self.files(k))
        return found if found.get("bytes") == size else None

    def write(self, k: int, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Writes shard k. images: uint8 levels (rows, H, W, C). labels: (rows,), or None."""
        files = self.files(k)
        if self.format == "png":
            shown = pictures.to_bytes(images, self.levels)
            for file, image in zip(files, shown, strict=True):
                pictures.write_png(file, image, least=1)
        elif self.format == "npz":
            write_atomic(files[0], npz_bytes(images, labels))
        else:
            _write_records(files[0], images, labels)
        places = np.asarray(self.rows(k))
        entry = {
            "images": len(images),
            "digest": f"{digests.of_images(places, images):064x}",
            "bytes": sum(file.stat().st_size for file in files),
        }
        write_atomic(self._entry(k), json.dumps(entry) + "\n")

    def read(self, k: int) -> np.ndarray:
        """The images of shard k, uint8 levels. Raises RunError where they are not those drawn."""
        entry, files = self.entry(k), self.files(k)
        where = f"shard {k} of {self.folder} ({files[0].name}{' ...' * (len(files) > 1)})"
        try:
            images = None if entry is None else self._read(files)
        except Exception as error:  # a damaged file raises what its reader likes
            raise RunError(f"Damaged: {where}: {error}. {_again(self._entry(k))}") from error
        if entry is None or images is None:
            raise RunError(f"Missing: {where}. {_again(self._entry(k))}")
        found = digests.of_images(np.asarray(self.rows(k)), images)
        if f"{found:064x}" != entry["digest"]:
            raise RunError(
                f"Damaged: {where} does not hold the images drawn. {_again(self._entry(k))}"
            )
        return images

    def sweep(self, mine: Iterable[int]) -> None:
        """Removes what a killed process left half written of these shards and of what is one."""
        names = {path.name for k in mine for path in (*self.files(k), self._entry(k))}
        names |= {_MANIFEST, self.grid.name}
        for folder in (self.folder, self.folder / "done", self.folder.parent):
            for path in folder.glob(".*"):
                # As `write_atomic` names them: .<file>.<random letters>
                if path.name[1:].rpartition(".")[0] not in names:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def digest(self) -> str:
        """The digest of all images, see `digests`. Raises RunError while shards are missing."""
        entries = [self.entry(k) for k in range(self.count)]
        missing = [k for k, entry in enumerate(entries) if entry is None]
        if missing:
            raise RunError(
                f"{len(missing)} of {self.count} shards of {self.folder} are missing, the first "
                f"{missing[0]}: run the same diffjax sample again, which draws these."
            )
        total = sum(int(entry["digest"], 16) for entry in entries if entry is not None)
        return f"{total % digests.MODULUS:064x}"

    def _entry(self, k: int) -> Path:
        return self.folder / "done" / f"{k:05d}.json"

    def _read(self, files: list[Path]) -> np.ndarray:
        if self.format == "npz":
            with np.load(files[0], allow_pickle=False) as archive:
                return archive["images"]
        if self.format == "arrayrecord":
            return _read_records(files[0])
        from diffjax.data.images import read_image

        shown = np.stack([read_image(file, self.shape[-1]) for file in files])
        return pictures.to_levels(shown, self.levels)


def claim(shards: Shards, request: dict[str, Any]) -> None:
    """Makes the folder this request's: writes the manifest, or checks that it is the same.

    request: plain values, all that the images depend on. Raises RunError, naming what differs.
    """
    path = shards.folder / _MANIFEST
    layout = {k: v for k, v in dataclasses.asdict(shards).items() if k != "folder"}
    wanted = json.loads(json.dumps(layout | request))
    if not path.exists():
        write_atomic(path, json.dumps({"schema": SCHEMA, "request": wanted}, indent=2) + "\n")
        return
    changed = differences(_manifest(shards.folder), wanted)
    if changed:
        shown = "; ".join(text if len(text) <= 120 else f"{text[:117]}..." for text in changed[:5])
        raise RunError(
            f"{shards.folder} holds images of another request ({shown}"
            f"{'; ...' if len(changed) > 5 else ''}). Choose another --out or --name, delete it, "
            "or ask for the same to go on."
        )


def is_claimed(folder: Path) -> bool:
    """Whether images in shards lie there."""
    return (folder / _MANIFEST).exists()


class Stored:
    """All images of a finished job, read a shard at a time: len, [places] and digest."""

    def __init__(self, folder: str | Path):
        """Raises RunError where the folder holds no shards, or not all."""
        request = _manifest(Path(folder))
        rest = ("format", "num", "size", "levels")
        fields: dict[str, Any] = {name: request[name] for name in rest}
        self.shards = Shards(Path(folder), shape=tuple(request["shape"]), **fields)
        self.digest = self.shards.digest()
        self._held: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.shards.num

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The images at these places, (B,) -> uint8 levels (B, H, W, C)."""
        places = np.asarray(places)
        found = np.empty((len(places), *self.shards.shape), np.uint8)
        of = places // self.shards.size
        for k in np.unique(of):
            found[of == k] = self._shard(int(k))[places[of == k] - k * self.shards.size]
        return found

    def _shard(self, k: int) -> np.ndarray:
        if self._held is None or self._held[0] != k:
            self._held = (k, self.shards.read(k))
        return self._held[1]


def npz_bytes(images: np.ndarray, labels: np.ndarray | None) -> bytes:
    """The bytes of an .npz with `images` and, if there are any, `labels`."""
    arrays: dict[str, Any] = {"images": images}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, np.int32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def require_format(format: str) -> None:
    """Raises ModuleNotFoundError, naming the pip command, where its package is missing."""
    if format == "arrayrecord":
        _array_record()


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ModuleNotFoundError(
            f"The format arrayrecord needs array_record, which failed to import ({error}); "
            "pip install 'diffjax[data]', or choose npz or png.",
            name="array_record",
        ) from error
    return array_record_module


def _write_records(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    # The writer takes a path, so it gets one of its own; the file takes its name whole.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        writer = _array_record().ArrayRecordWriter(str(temporary), "group_size:1")
        for i, image in enumerate(images):
            arrays = {"image": image}
            if labels is not None:
                arrays["label"] = np.asarray(labels[i], np.int32)
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            writer.write(buffer.getvalue())
        writer.close()
        write_atomic(path, temporary.read_bytes())


def _read_records(path: Path) -> np.ndarray:
    reader = _array_record().ArrayRecordReader(str(path))
    try:
        images = []
        for record in reader.read_all():
            with np.load(io.BytesIO(record), allow_pickle=False) as archive:
                images.append(archive["image"])
        return np.stack(images)
    finally:
        reader.close()


def _manifest(folder: Path) -> dict[str, Any]:
    """The request of a folder. Raises RunError where there is none that can be read."""
    path = folder / _MANIFEST
    if not path.is_file():
        below = sorted(p.parent.name for p in folder.glob(f"*/{_MANIFEST}"))
        hint = f" There are some in {folder / below[0]}." if below else ""
        raise RunError(f"{folder} holds no shards of images: it has no {_MANIFEST}.{hint}")
    stored = _read_json(path)
    if stored.get("schema") != SCHEMA:
        raise RunError(
            f"{path} has schema {stored.get('schema')}; this diffjax reads {SCHEMA}. Use its "
            "version, or draw into another folder."
        )
    return stored["request"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"Damaged: {path} ({error}). Delete it and start again.") from error


def _again(entry: Path) -> str:
    return f"Delete {entry} and run the same diffjax sample again, which draws this shard anew."

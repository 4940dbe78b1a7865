"""Features of many images, batch by batch: sums and, where asked, the features; never the images.

    gathered = gather(extractor, batches, folder=eval/partial/samples, fingerprint={...})

Every `every` batches the state is saved below `folder`, whole or not at all, and a later call goes
on from there. The sums are saved with their rounding errors and a batch depends on its number
alone, so the figures are those of an uninterrupted run, bit for bit. A state of other images,
another network or other settings (`fingerprint`) is thrown away.

Where there are several processes (`jax.distributed.initialize`), each does its share of the batches
(`runs.hosts`), keeps its own state, and all merge their sums in the order of the processes: every
process returns the same. The sums keep their rounding errors, so their number hardly shows.

The digest of the images (`runs.digests`) is summed along.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, PyTree
from diffjax.metrics import classifier_score, moments
from diffjax.runs import digests, hosts, spread
from diffjax.runs.extractors import Extractor, write_npz
from diffjax.train.mesh import replicated


class Batches(Protocol):
    """A sequence of (images (B, H, W, C), mask (B,)), each a function of its number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class Gathered(NamedTuple):
    """What is known of `num` images.

    moments, scores: sums on the device. digest: of the images. features: (num, F), or None.
    """

    num: int
    moments: moments.Moments
    scores: classifier_score.ScoreSums
    digest: str
    features: np.ndarray | None


@jax.jit
def _add(
    sums: PyTree, call: PyTree, images: Array, mask: Array, split: Array, rows: Array
) -> tuple[PyTree, Array]:
    """The sums with the first `rows` of one more batch in them, and its features."""
    mask = mask & (jnp.arange(mask.shape[0]) < rows)
    outputs = call(images)
    return (
        moments.update(sums[0], outputs.features, mask),
        classifier_score.update(sums[1], outputs.logits, split, mask),
    ), outputs.features


@jax.jit
def _merge(a: PyTree, b: PyTree) -> PyTree:
    """The sums over two shares of the batches."""
    return moments.merge(a[0], b[0]), classifier_score.merge(a[1], b[1])


def gather(
    extractor: Extractor,
    batches: Batches,
    *,
    total: int,
    splits: int = 1,
    keep: bool = False,
    folder: Path | None = None,
    fingerprint: dict[str, Any] | None = None,
    every: int = 10,
    progress: Callable[[int], None] = lambda done: None,
) -> Gathered:
    """Sums over all batches, going on where a call before was stopped.

    All batches have as many rows; `mask` is a prefix of them, all of them but in the last batch.
    total: images in all; splits: of the classifier score, equal runs of them. keep: also the
    features. folder: where the state is kept; None keeps none. progress: called with images done,
    by this process.
    """
    width, logits = extractor.sizes
    sums: PyTree = moments.zeros(width), classifier_score.zeros(logits, splits)
    place = [hosts.index(), hosts.count()]
    known = (fingerprint or {}) | {"splits": splits, "keep": keep, "process": place}
    known = json.loads(json.dumps(known))
    if folder is not None and place[1] > 1:
        folder = folder / f"process_{place[0]}_of_{place[1]}"
    start, count, digest = 0, 0, 0
    kept: list[np.ndarray] = []
    saved = None if folder is None else _restore(folder, known, sums)
    if saved is not None:
        start, count, digest, sums, kept = saved
    elif folder is not None and folder.exists():
        shutil.rmtree(folder)
    mesh = spread.local_mesh()
    call = jax.device_put(extractor.call, replicated(mesh))
    unsaved: list[np.ndarray] = []
    mine = hosts.share(len(batches))
    for done, index in enumerate(mine[start:], start + 1):
        images, mask = batches[index]
        places = index * len(images) + np.arange(len(images))
        split = classifier_score.contiguous(jnp.asarray(places), total, splits)
        # Laid out alike in every call, so that going on computes what going through does.
        sums = jax.device_put(sums, replicated(mesh))
        batch = spread.placed(mesh, spread.filled(mesh, (images, mask, split)))
        sums, features = _add(sums, call, *batch, jnp.asarray(len(images)))
        digest = (digest + digests.of_images(places[mask], images[mask])) % digests.MODULUS
        count += int(mask.sum())
        if keep:
            unsaved.append(np.asarray(features)[: len(mask)][mask])
        if folder is not None and (done % every == 0 or done == len(mine)):
            _save(folder, known, done, count, digest, sums, unsaved)
            kept += unsaved
            unsaved = []
        progress(count)
    rows = hosts.in_order([*kept, *unsaved], len(batches)) if keep else None
    return _merged(sums, count, digest, rows)


def _merged(sums: PyTree, count: int, digest: int, rows: np.ndarray | None) -> Gathered:
    """The result of all processes, each with its part."""
    part = (sums, np.asarray(count, np.int32), np.frombuffer(digest.to_bytes(32), np.uint8))
    parts = hosts.exchange(part)
    merged = jax.tree.map(jnp.asarray, parts[0][0])
    for others, _, _ in parts[1:]:
        merged = _merge(merged, others)
    num = sum(int(n) for _, n, _ in parts)
    digest = sum(int.from_bytes(d.tobytes()) for _, _, d in parts) % digests.MODULUS
    return Gathered(num, merged[0], merged[1], digest.to_bytes(32).hex(), rows)


def _save(
    folder: Path,
    known: dict[str, Any],
    done: int,
    count: int,
    digest: int,
    sums: PyTree,
    unsaved: list[np.ndarray],
) -> None:
    """Writes the features of each new batch, then the state that counts them."""
    if unsaved:
        arrays = {f"batch_{i:04d}": array for i, array in enumerate(unsaved)}
        write_npz(folder / f"features-{done:08d}.npz", arrays)
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(sums))}
    state = {"known": known, "done": done, "count": count, "digest": f"{digest:064x}"}
    write_npz(folder / "state.npz", leaves | {"state": json.dumps(state)})


def _restore(folder: Path, known: dict[str, Any], sums: PyTree):
    """(batches done, images, digest, sums, features by batch) of a saved state, None without."""
    path = folder / "state.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as archive:
        state = json.loads(str(archive["state"]))
        if state["known"] != known:
            return None
        leaves, treedef = jax.tree.flatten(sums)
        found = [jnp.asarray(archive[f"leaf{i}"]) for i in range(len(leaves))]
    kept = []
    if known["keep"]:
        files = sorted(folder.glob("features-*.npz"))
        for file in files:
            # A file written after the state, by a process that stopped in between, comes again.
            if int(file.stem.rpartition("-")[2]) <= state["done"]:
                with np.load(file, allow_pickle=False) as archive:
                    kept += [archive[name] for name in sorted(archive.files)]
    digest = int(state["digest"], 16)
    return state["done"], state["count"], digest, jax.tree.unflatten(treedef, found), kept

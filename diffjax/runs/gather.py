"""Features of many images, batch by batch: sums and, where asked, the features; never the images.

    gathered = gather(extractor, batches, folder=eval/partial/samples, fingerprint={...})

Every `every` batches the state is saved below `folder`, whole or not at all, and a later call goes
on from there. The sums are saved with their rounding errors and a batch depends on its number
alone, so the figures are those of an uninterrupted run, bit for bit. A state of other images,
another network or other settings (`fingerprint`) is thrown away.

The digest of images is a chain over their bytes, h_i = SHA-256(h_{i-1}, image i), h_0 = 32 zeros:
it can be saved, and does not depend on the batches.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax.core.types import PyTree
from diffjax.metrics import classifier_score, moments
from diffjax.runs.extractors import Extractor, write_npz
from diffjax.train.mesh import batch_sharding, make_mesh, replicated


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
def _add(sums: PyTree, call: PyTree, images: jax.Array, mask: jax.Array, split: jax.Array):
    """The sums with one more batch in them, and its features."""
    outputs = call(images)
    return (
        moments.update(sums[0], outputs.features, mask),
        classifier_score.update(sums[1], outputs.logits, split, mask),
    ), outputs.features


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

    total: images in all; splits: of the classifier score, equal runs of them. keep: also the
    features. folder: where the state is kept; None keeps none. progress: called with images done.
    """
    width, logits = extractor.sizes
    sums: PyTree = moments.zeros(width), classifier_score.zeros(logits, splits)
    known = json.loads(json.dumps((fingerprint or {}) | {"splits": splits, "keep": keep}))
    start, count, digest = 0, 0, bytes(32)
    kept: list[np.ndarray] = []
    saved = None if folder is None else _restore(folder, known, sums)
    if saved is not None:
        start, count, digest, sums, kept = saved
    elif folder is not None and folder.exists():
        shutil.rmtree(folder)
    mesh = make_mesh(jax.local_devices())
    call = jax.device_put(extractor.call, replicated(mesh))
    unsaved: list[np.ndarray] = []
    for index in range(start, len(batches)):
        images, mask = batches[index]
        split = classifier_score.contiguous(
            jnp.asarray(count + np.cumsum(mask) - mask), total, splits
        )
        # Laid out alike in every call, so that going on computes what going through does.
        sums = jax.device_put(sums, replicated(mesh))
        sums, features = _add(sums, call, *(_placed(mesh, x) for x in (images, mask, split)))
        digest = _chain(digest, images[mask])
        count += int(mask.sum())
        if keep:
            unsaved.append(np.asarray(features)[mask])
        if folder is not None and ((index + 1) % every == 0 or index + 1 == len(batches)):
            kept += _save(folder, known, index + 1, count, digest, sums, unsaved)
            unsaved = []
        progress(count)
    rows = np.concatenate([*kept, *unsaved]) if keep else None
    return Gathered(count, sums[0], sums[1], digest.hex(), rows)


def _placed(mesh: Mesh, leaf: Any) -> jax.Array:
    """A batch over the devices of this process, where it splits evenly; else a copy on each."""
    even = leaf.shape[0] % mesh.size == 0
    return jax.device_put(leaf, batch_sharding(mesh) if even else replicated(mesh))


def _chain(digest: bytes, images: np.ndarray) -> bytes:
    for image in np.ascontiguousarray(images):
        digest = hashlib.sha256(digest + image.tobytes()).digest()
    return digest


def _save(
    folder: Path,
    known: dict[str, Any],
    done: int,
    count: int,
    digest: bytes,
    sums: PyTree,
    unsaved: list[np.ndarray],
) -> list[np.ndarray]:
    """Writes the new features, then the state that counts them. Returns the new features."""
    rows = [np.concatenate(unsaved)] if unsaved else []
    for array in rows:
        write_npz(folder / f"features-{done:08d}.npz", {"features": array})
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(sums))}
    state = {"known": known, "done": done, "count": count, "digest": digest.hex()}
    write_npz(folder / "state.npz", leaves | {"state": json.dumps(state)})
    return rows


def _restore(folder: Path, known: dict[str, Any], sums: PyTree):
    """(batches done, images, digest, sums, features) of a saved state; None where none fits."""
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
                    kept.append(archive["features"])
    digest = bytes.fromhex(state["digest"])
    return state["done"], state["count"], digest, jax.tree.unflatten(treedef, found), kept

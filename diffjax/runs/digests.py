"""SHA-256 of what images are and of what they are drawn from.

The digest of images is the sum modulo 2^256 of SHA-256(i, image i), i as 8 bytes, the least first:
it can be saved, merged, and depends neither on the batches nor on the processes.
"""

import hashlib
import re

import jax
import numpy as np

from diffjax.core.types import PyTree

MODULUS = 2**256


def of_images(places: np.ndarray, images: np.ndarray) -> int:
    """The sum of the images' hashes, each with its place. places: (B,). images: (B, ...)."""
    images = np.ascontiguousarray(images)
    parts = zip(places, images, strict=True)
    hashes = (hashlib.sha256(int(i).to_bytes(8, "little") + image.tobytes()) for i, image in parts)
    return sum(int.from_bytes(found.digest()) for found in hashes) % MODULUS


def of_tree(tree: PyTree) -> str:
    """The hash of a tree: its structure and each leaf's type, shape and bytes, as 64 digits."""
    leaves, treedef = jax.tree.flatten(tree)
    digest = hashlib.sha256(without_addresses(str(treedef)).encode())
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def without_addresses(text: str) -> str:
    """The text without places in memory, which another process has elsewhere."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)

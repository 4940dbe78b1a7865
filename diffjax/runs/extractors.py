"""Networks that turn stored images into features: FID's Inception, or one trained here.

An `Extractor` carries its provenance, so that a figure says what it was measured with, and so that
statistics of another network are refused.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from diffjax.core.files import write_atomic
from diffjax.core.types import Array
from diffjax.metrics import feature_net, inception
from diffjax.metrics.inception import Outputs
from diffjax.runs.workdir import RunError

VARIABLE = "DIFFJAX_INCEPTION"


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network as a callable tree: integer images (B, H, W, C) to `Outputs`.

    provenance: what it is, as plain values; equal for equal networks.
    """

    call: Callable[[Array], Outputs]
    provenance: dict[str, Any]

    @property
    def name(self) -> str:
        return self.provenance["features"]

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """(number of features, number of logits), found without computing."""
        shape = jax.ShapeDtypeStruct((1, *self.provenance["image_shape"]), np.uint8)
        outputs = jax.eval_shape(_extract, self.call, shape)
        return outputs.features.shape[1], outputs.logits.shape[1]

    def __call__(self, images: Array) -> Outputs:
        return _extract(self.call, images)


@jax.jit
def _extract(call: Callable[[Array], Outputs], images: Array) -> Outputs:
    return call(images)


def load_inception(
    path: str | Path | None,
    image_shape: tuple[int, int, int],
    levels: int = 256,
    *,
    input: str = "pytorch_fid",
) -> Extractor:
    """FID's network for images of this shape and number of levels.

    path: the published weights, or the same tensors as `.npz`; None for the environment variable
    DIFFJAX_INCEPTION. Raises RunError where there is none, with the way to get them.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise RunError(inception.HOW_TO_GET)
    path = Path(path)
    if not path.is_file():
        raise RunError(f"There is no file {path}. {inception.HOW_TO_GET}")
    digest = _file_digest(path)
    tensors = _read_tensors(path)
    try:
        variables = inception.from_torch(tensors)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    provenance = {
        "features": "inception-2015-12-05",
        "weights_sha256": digest,
        # Whoever repacks the published file has other bytes, and is told so.
        "published_file": digest.startswith(inception.SHA256_START),
        "input": input,
        "resize": "bilinear to 299 x 299, no antialiasing",
        "image_shape": list(image_shape),
        "levels": levels,
    }
    return Extractor(inception.Inception(variables, levels, input), provenance)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(f"{path} cannot be read as an .npz file ({error}).") from error
    from diffjax.core import tensorfile

    return tensorfile.read(path)


def save_feature_net(path: str | Path, net: feature_net.FeatureNet, about: dict[str, Any]) -> None:
    """Writes the weights as one `.npz` with its provenance. about: plain values to keep."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(net.params)
    arrays: dict[str, Any] = {
        "params/" + "/".join(str(part.key) for part in where): np.asarray(leaf)
        for where, leaf in leaves
    }
    fields = ("num_classes", "width", "stages", "dim")
    about = about | {
        "levels": net.levels,
        "architecture": {name: getattr(net.net, name) for name in fields},
    }
    arrays["about"] = json.dumps(about)
    write_npz(path, arrays)


def load_feature_net(
    path: str | Path, image_shape: tuple[int, int, int], levels: int = 256
) -> Extractor:
    """A network of `scripts/train_feature_net`. Raises RunError where the file or the data differ.

    A network knows the shape and the number of levels that it was trained on, and takes no others.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"There is no file {path}. scripts/train_feature_net writes one.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            about = json.loads(str(archive["about"]))
            flat = {k: archive[k] for k in archive.files if k.startswith("params/")}
        net = feature_net.ResNet(**about["architecture"])
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path} is no network of scripts/train_feature_net ({error}); train one."
        ) from error
    expected = {"image_shape": list(image_shape), "levels": levels}
    found = {key: about[key] for key in expected}
    if found != expected:
        raise RunError(f"{path} was trained for {found}; these images are {expected}.")
    params = unflatten_dict({name.partition("/")[2]: leaf for name, leaf in flat.items()}, sep="/")
    provenance = about | {
        "features": f"feature net {path.stem}, trained on {about['dataset']}; not a FID",
        "weights_sha256": _file_digest(path),
    }
    return Extractor(feature_net.FeatureNet(params, net, levels), provenance)


def write_npz(path: str | Path, arrays: dict[str, Any]) -> None:
    """An `.npz` that is either whole or absent."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

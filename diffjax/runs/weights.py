"""Weights of other codes as a workdir: `import_weights(source, path, config, workdir)`.

    source      file                                     network of the config
    score_sde   a checkpoint of its JAX version or port  any (JAX), NCSNpp or DDPM (port)
    edm         a pickled network, .pkl                  SongUNet or ADM
    diffusers   .safetensors or .bin, config.json beside DDPM or NCSNpp
    adm         guided-diffusion's .pt                   ADM
    dit         DiT's .pt                                DiT
    sit         SiT's .pt                                DiT, as `DiT.sit` builds it
    diffjax     `diffjax.interop.native`, .safetensors   any

The config says how the network is built and asked; what the file says of itself must agree. Then
the weights are asked to denoise (`diffjax.interop.check`).

A network of adm or dit with twice the channels of its images has learned the variance of its steps
between two bounds, the only way in which these codes train one. The workdir's config then says so
(`precondition.learned_variance`), and its ancestral sampling uses it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax import builders
from diffjax.core import checks, tensorfile
from diffjax.core.types import Array, PyTree
from diffjax.interop import check as self_check
from diffjax.interop import diffusers, dit, edm, guided_diffusion, native, score_sde
from diffjax.runs.workdir import RunError, claim, plain, versioned

Says = Mapping[str, Mapping[str, Any]]


class Read(NamedTuple):
    """What a file holds: the averaged weights, the updates behind them, what it says of itself."""

    params: PyTree
    step: int = 0
    says: Says = {}


class Imported(NamedTuple):
    """step: of the checkpoint written. report: of the self-check; None where it was left out."""

    step: int
    report: self_check.Report | None


def _score_sde(parts: builders.Parts, like: PyTree, path: Path, **_: Any) -> Read:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":  # zip and pickle; a msgpack state is neither
        tree = tensorfile.read_pickled(path)
        tensors = tensorfile.flatten(tree)
        params = score_sde.from_torch(parts.net, like, parts.image_shape[0], tensors)
        step = tree.get("step", 0) if isinstance(tree, dict) else 0
        return Read(params, int(step))
    state = score_sde.read_jax(path)
    step = int(np.max(state.get("step", 0)))  # a replicated state has one a device
    return Read(score_sde.from_jax(like, state["params_ema"]), step)


def _edm(parts: builders.Parts, like: PyTree, path: Path, **_: Any) -> Read:
    record = edm.network(tensorfile.read_pickled(path))
    params = edm.from_torch(parts.net, like, parts.image_shape[0], edm.tensors(record))
    return Read(params, says=edm.says(record))


def _diffusers(parts: builders.Parts, like: PyTree, path: Path, **_: Any) -> Read:
    tensors = tensorfile.read(path)
    params = diffusers.from_torch(parts.net, like, parts.image_shape[0], tensors)
    return Read(params, says=diffusers.settings(path.parent))


def _adm(
    parts: builders.Parts, like: PyTree, path: Path, *, attention_order: str | None, **_: Any
) -> Read:
    height = parts.image_shape[0]
    order: Any = attention_order or ("new" if height == 64 else "legacy")
    tensors = tensorfile.read(path)
    return Read(guided_diffusion.from_torch(parts.net, like, height, tensors, order=order))


def _dit(parts: builders.Parts, like: PyTree, path: Path, **_: Any) -> Read:
    return Read(dit.from_torch(parts.net, like, tensorfile.read(path)))


def _sit(parts: builders.Parts, like: PyTree, path: Path, **_: Any) -> Read:
    # The names are DiT's: only whoever brings the file knows its clock.
    params = dit.from_torch(parts.net, like, tensorfile.read(path))
    return Read(params, says={"precondition": {"name": "sit"}})


def _native(parts: builders.Parts, like: PyTree, path: Path, **_: Any) -> Read:
    return Read(native.read(path, like))


SOURCES: dict[str, Callable[..., Read]] = {
    "score_sde": _score_sde,
    "edm": _edm,
    "diffusers": _diffusers,
    "adm": _adm,
    "dit": _dit,
    "sit": _sit,
    "diffjax": _native,
}
_LEARN_VARIANCES = ("adm", "dit")


def import_weights(
    source: str,
    path: str | Path,
    config: Any,
    workdir: str | Path,
    *,
    check: bool = True,
    attention_order: str | None = None,
) -> Imported:
    """Writes a workdir with these weights, which `load` opens.

    source: the code that wrote the file, one of `SOURCES`. config: of the network and of how it is
    asked. check: asks the weights to denoise first, on the config's held-out data where they are at
    hand, else on noise. attention_order: "legacy" or "new" of source "adm"; None goes by the size.

    The optimizer starts anew. Raises TensorFileError for the file, WeightsError where it does not
    fit the network, RunError where the file or the check disagrees with the config, or where the
    workdir holds checkpoints.
    """
    checks.one_of("source", source, tuple(SOURCES))
    workdir = Path(workdir)
    if (workdir / "checkpoints").exists():
        raise RunError(f"{workdir} holds checkpoints already; import into a new workdir.")
    parts = builders.build_parts(config)
    like = jax.eval_shape(parts.init_params, jax.random.key(0))
    if source in _LEARN_VARIANCES and parts.learned_variance is None and _doubled(parts, like):
        config = _with_learned_variance(config)
        parts = builders.build_parts(config)
    read = SOURCES[source](parts, like, Path(path), attention_order=attention_order)
    _agree(read.says, config, parts)
    params = jax.tree.map(jnp.asarray, read.params)
    report = _checked(config, parts, params) if check else None
    if report is not None and not report.passed:
        raise RunError(f"{report.summary()} Nothing was written; --nocheck imports all the same.")
    write(config, workdir, params, read.step)
    return Imported(read.step, report)


def _doubled(parts: builders.Parts, like: PyTree) -> bool:
    """Whether the network returns twice the channels of its images."""
    cond = () if parts.num_classes is None else (jnp.zeros((1,), jnp.int32),)
    x = jnp.zeros((1, *parts.image_shape), jnp.float32)
    out = jax.eval_shape(parts.net.apply, {"params": like}, x, jnp.ones((1,)), *cond)
    return out.shape == (*x.shape[:-1], 2 * x.shape[-1])


def _with_learned_variance(config: Any) -> Any:
    """A copy of the config that reads a learned range, and uses it in ancestral sampling."""
    config = ConfigDict(plain(config))
    config.precondition.learned_variance = "range"
    solver = config.sampling.get("solver", {})
    if solver.get("name") == "ancestral" and "variance" not in solver:
        solver.variance = "learned"
    return config.lock()


def _agree(says: Says, config: Any, parts: builders.Parts) -> None:
    """Raises RunError where the config differs from what the file says of itself."""
    sections: dict[str, Any] = {
        "model": {f.name: getattr(parts.net, f.name) for f in dataclasses.fields(parts.net)},
        "precondition": dict(config.precondition),
        "data": dict(config.data),
    }
    wrong = [
        f"{section}.{field} is {sections[section][field]!r}, the file says {value!r}"
        for section, fields in says.items()
        for field, value in fields.items()
        if field in sections[section] and sections[section][field] != value
    ]
    if wrong:
        raise RunError(f"The config is not the file's: {'; '.join(wrong)}.")


def _checked(config: Any, parts: builders.Parts, params: PyTree) -> self_check.Report:
    """The self-check on 16 held-out images, or on noise where the config's data are not here."""
    size, channels = 16, parts.image_shape[-1]
    x0, cond = _data(config, parts, size)
    if cond is None and parts.num_classes is not None:
        cond = jnp.arange(size, dtype=jnp.int32) % parts.num_classes
    conditions = () if cond is None else (cond,)

    def apply(x: Array, label: Array) -> Array:
        # A learned variance is no part of the estimate.
        return parts.net.apply({"params": params}, x, label, *conditions)[..., :channels]

    return self_check.check(
        apply,
        parts.process,
        parts.precondition,
        key=jax.random.key(0),
        shape=(size, *parts.image_shape),
        x0=x0,
    )


def _data(config: Any, parts: builders.Parts, size: int) -> tuple[Array | None, Array | None]:
    """Held-out images in the model's range and their classes, or (None, None)."""
    from diffjax.data import TrainBatches

    try:
        source = builders.build_source(config, "eval")
        batch = TrainBatches(source, batch_size=size, seed=0)[0]
    except (ImportError, OSError, ValueError, LookupError):
        # Data that are not on this machine: the check then goes by noise.
        return None, None
    x0 = parts.quantisation.to_model(jnp.asarray(batch["image"]))
    labels = batch.get("label") if parts.num_classes is not None else None
    return x0, None if labels is None else jnp.asarray(labels, jnp.int32)


def write(config: Any, workdir: Path, params: PyTree, step: int) -> None:
    """Writes config.json and one checkpoint, whose weights and averages all are `params`."""
    from diffjax.train import checkpoint, state

    optimizer, _ = builders.build_optimizer(config)
    claim(workdir, config)
    tracks = builders.build_ema(config)
    fresh = state.create_state(jax.random.key(config.seed), params, optimizer, tracks=tracks)
    fresh = state.TrainState(
        jnp.asarray(step, jnp.int32), fresh.params, fresh.opt_state, fresh.ema, fresh.key
    )
    with checkpoint.Checkpointer(workdir) as checkpointer:
        checkpointer.save(step, fresh, position={}, config=versioned(config))
        checkpointer.wait()

"""Loss, optimizer and averaging of a config."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax import losses, prediction
from diffjax.builders.make import BuildError, Section, make
from diffjax.builders.model import Parts
from diffjax.core.random import sample_keys, step_keys, tag
from diffjax.core.types import Array, Key, PyTree
from diffjax.guidance import make_classifier
from diffjax.losses import classification, denoising_score_matching
from diffjax.nets.frame import KEYS
from diffjax.processes import log_snr

TIMES: dict[str, Callable[..., losses.TimeDistribution]] = {
    "uniform": losses.UniformTimes,
    "log_normal": losses.LogNormalTimes,
    "importance": losses.ImportanceTimes,
    "discrete": losses.DiscreteTimes,
}

# Every kind of output is a weighting too; see `diffjax.losses.weights`.
WEIGHTS: dict[str, Callable[..., losses.Weight]] = {
    "simple": prediction.Eps,
    "x0": prediction.X0,
    "v": prediction.V,
    "velocity": prediction.Velocity,
    "edm": prediction.EDMF,
    "likelihood": losses.Likelihood,
    "min_snr": losses.MinSNR,
    "sigmoid": losses.Sigmoid,
}

_STRATA = "strata"  # in a prepared batch, the fractions that stratified times are taken at
_STREAMS = ("dropout", "label_dropout")  # of randomness in a network, beside the loss's own

REDUCES: dict[str, Callable[..., Any]] = {
    "mean": losses.mean,
    "half_sum": losses.half_sum,
    "sum": losses.total,
}


def build_times(section: Section) -> losses.TimeSampler:
    """The sampler of training times; `stratified` spreads any of them over the batch."""
    section = dict(section)
    stratified = section.pop("stratified", False)
    times = make(TIMES, section, "loss.times")
    return losses.StratifiedTimes(times) if stratified else times


def build_prepare(config: Any) -> Callable[[Key, Any], Any]:
    """(key, batch) -> the batch with what its parts must know of the whole; see `accumulate`.

    That is each image's place among stratified times, and otherwise nothing.
    """
    from diffjax.train import accumulate

    if not dict(config.loss.times).get("stratified", False):
        return accumulate.as_it_is

    def prepare(key: Key, batch: Mapping[str, Array]) -> dict[str, Array]:
        keys = sample_keys(key, batch["image"].shape[0])
        return {**batch, _STRATA: losses.strata(keys)}

    return prepare


def _placed(times: losses.TimeSampler, batch: Mapping[str, Array]) -> losses.TimeSampler:
    """The sampler for a batch that may be a part of one."""
    if isinstance(times, losses.StratifiedTimes) and _STRATA in batch:
        return dataclasses.replace(times, u=batch[_STRATA])
    return times


def build_augment(config: Any, parts: Parts) -> Any:
    """The augmentation under config.data.augment, its probability; None for 0 or no such field.

    Raises BuildError for a network without augmentation labels, or beside unlabelled flips.
    """
    p = dict(config.data).get("augment", 0.0)
    if not p:
        return None
    from diffjax.data import Augment, augment

    if getattr(parts.net, "augment_dim", 0) != augment.LABELS:
        raise BuildError(
            f"config.data.augment = {p} needs a network that takes the {augment.LABELS} labels of "
            f"a change: set config.model.augment_dim = {augment.LABELS} (songunet, adm)."
        )
    if config.data.random_flip:
        raise BuildError(
            "config.data.augment mirrors images and tells the network; config.data.random_flip "
            "mirrors them untold. Set random_flip = False."
        )
    return make({"augment": Augment}, {"name": "augment", "p": p}, "data.augment")


def build_loss(config: Any, parts: Parts, *, train: bool) -> Callable[..., Any]:
    """loss_fn(params, key, batch) -> (per-image losses (B,), aux) of one batch of levels.

    key: one key, or (B,), one an image, of which alone its draws depend (but for stratified times).
    batch: {"image": uint8 (B, H, W, C), "label": (B,) for a conditional network}; a part of a batch
    with stratified times as `build_prepare` leaves it. train: with dropout, flips and augmentation.
    """
    if is_classifier(config):
        return _build_classification(config, parts, train=train)
    times = build_times(config.loss.times)
    weight = make(WEIGHTS, config.loss.weight, "loss.weight")
    if config.loss.reduce not in REDUCES:
        raise BuildError(
            f"config.loss.reduce must be one of {', '.join(REDUCES)}; got {config.loss.reduce!r}."
        )
    reduce = REDUCES[config.loss.reduce]
    objective = functools.partial(_objective(config, parts), weight=weight, reduce=reduce)
    if train:
        objective = functools.partial(objective, watch=functools.partial(watch_output, parts))
    augment = build_augment(config, parts) if train else None

    def loss_fn(params: PyTree, key: Key, batch: Mapping[str, Array]):
        keys = sample_keys(key, batch["image"].shape[0])
        x0 = _clean(config, parts, keys, batch["image"], train=train)
        streams = {name: step_keys(keys, tag(name)) for name in _STREAMS} if train else {}
        # One key a stream for networks of others, which know no keys of samples.
        rngs = {name: stream[0] for name, stream in streams.items()}
        apply = functools.partial(parts.net.apply, train=train, rngs=rngs)
        if augment is not None:
            x0, labels = augment(keys, x0)
            apply = functools.partial(apply, augment=labels)
        denoise = prediction.make_denoiser(
            apply,
            parts.process,
            variables={"params": params, KEYS: streams},
            cond=None if parts.num_classes is None else batch["label"],
            learned_variance=parts.learned_variance,
            **parts.precondition._asdict(),
        )
        return objective(keys, denoise, parts.process, x0, times=_placed(times, batch))

    return loss_fn


def _objective(config: Any, parts: Parts) -> Callable[..., Any]:
    """The loss that config.loss.name names: "denoising", the default, or "hybrid".

    "hybrid" trains a learned variance too, and takes the field bound_weight. Raises BuildError
    where the config has no learned variance, or times other than DDPM's levels.
    """
    section = dict(config.loss)
    if section.get("name", "denoising") == "denoising":
        if "bound_weight" in section:
            raise BuildError("config.loss.bound_weight belongs to config.loss.name = 'hybrid'.")
        return denoising_score_matching
    if parts.learned_variance is None:
        raise BuildError(
            "config.loss.name = 'hybrid' trains a learned variance: set "
            "config.precondition.learned_variance = 'range', and a network with twice the channels."
        )
    times = dict(section["times"])
    if times["name"] != "discrete" or times.get("placement", "right") != "right":
        raise BuildError(
            "config.loss.name = 'hybrid' is defined on discrete levels: set config.loss.times.name "
            f"= 'discrete', its placement 'right'; got {times}."
        )
    return functools.partial(
        losses.hybrid,
        levels=times["levels"],
        bound_weight=section.get("bound_weight", 1.0),
        quantisation=parts.quantisation,
    )


def _clean(config: Any, parts: Parts, keys: Key, images: Array, *, train: bool) -> Array:
    """A batch of levels as clean data x0."""
    from diffjax.data import model_input

    return model_input(
        keys,
        images,
        parts.quantisation,
        flip=train and config.data.random_flip,
        dequantise=config.data.uniform_dequantization,
    )


def watch_output(parts: Parts, asked: losses.Asked) -> dict[str, Array]:
    """What `train.probes` sort by noise: "log_snr", and "output_rms", of the network's output.

    The log-SNR is held to +-40, so that its mean is finite where an end of the process is not.
    """
    out = prediction.target(
        parts.precondition.kind,
        parts.process,
        asked.prediction.x0,
        asked.prediction.eps,
        asked.t,
    )
    return {
        "log_snr": _finite_log_snr(parts, asked.t),
        "output_rms": jnp.sqrt(losses.mean(jax.tree.map(jnp.square, out))),
    }


def _finite_log_snr(parts: Parts, t: Array) -> Array:
    return jnp.clip(log_snr(parts.process, t), -40, 40)


def is_classifier(config: Any) -> bool:
    """Whether a config trains a classifier of noisy images, not a denoiser. Raises BuildError."""
    name = dict(config.loss).get("name", "denoising")
    if name not in ("denoising", "hybrid", "classification"):
        raise BuildError(
            "config.loss.name must be 'denoising', the default, 'hybrid' (with a learned variance) "
            f"or 'classification'; got {name!r}."
        )
    return name == "classification"


def _build_classification(config: Any, parts: Parts, *, train: bool) -> Callable[..., Any]:
    """The loss of a classifier: cross-entropy at random times; its section has `times` only."""
    others = [field for field in config.loss if field not in ("name", "times")]
    if others:
        raise BuildError(f"config.loss.{others[0]} does not apply to classification: remove it.")
    times = build_times(config.loss.times)

    def loss_fn(params: PyTree, key: Key, batch: Mapping[str, Array]):
        if "label" not in batch:
            raise BuildError("A classifier needs labelled images, and config.data has no labels.")
        keys = sample_keys(key, batch["image"].shape[0])
        x0 = _clean(config, parts, keys, batch["image"], train=train)
        classify = make_classifier(
            functools.partial(parts.net.apply, train=train),
            parts.process,
            variables={"params": params},
            scaling=parts.precondition.scaling,
            label=parts.precondition.label,
        )
        at = _placed(times, batch)
        found, seen = classification(keys, classify, parts.process, x0, batch["label"], times=at)
        return found, seen | {"log_snr": _finite_log_snr(parts, seen["t"])}

    return loss_fn


def build_optimizer(config: Any) -> tuple[Any, Any]:
    """(optax transformation, learning-rate schedule) of the optim section. Raises BuildError.

    A network in float16 (config.model.dtype) has its loss scaled; config.optim.loss_scale may say
    how.
    """
    from diffjax.train import optim, scaling

    section = dict(config.optim)
    scale = section.pop("loss_scale", None)
    half = _dtype(dict(config.model).get("dtype", "float32"), "model.dtype") == jnp.float16
    if scale is not None and not half:
        raise BuildError(
            "config.optim.loss_scale scales the loss of networks in float16: set "
            "config.model.dtype = 'float16', or remove it."
        )
    moment = _dtype(section.pop("moment_dtype", "float32"), "optim.moment_dtype")
    if moment not in (jnp.float32, jnp.bfloat16):
        raise BuildError(
            f"config.optim.moment_dtype must be 'float32' or 'bfloat16'; got {moment.name!r}."
        )
    decay = section.pop("decay")
    schedule = make(
        {"constant": optim.learning_rate, "cosine": optim.learning_rate},
        {"name": decay, "peak": section.pop("lr"), "warmup": section.pop("warmup")}
        | {k: section.pop(k) for k in ("final_fraction",) if k in section},
        "optim",
        **({"decay_steps": config.training.n_iters} if decay == "cosine" else {}),
    )
    given: dict[str, Any] = {"schedule": schedule}
    if moment == jnp.bfloat16:  # else the weights' own, which is wider in 64-bit mode
        given["moment_dtype"] = moment
    section["name"] = section.pop("optimizer").lower()
    optimizer = make({"adam": optim.adam}, section, "optim", **given)
    if half:
        dynamic = functools.partial(scaling.dynamic_scaling, optimizer)
        fields = {"name": "dynamic", **dict(scale or {})}
        optimizer = make({"dynamic": dynamic}, fields, "optim.loss_scale")
    return optimizer, schedule


def _dtype(name: Any, where: str) -> jnp.dtype:
    """The type of numbers that a config names. Raises BuildError."""
    try:
        return jnp.dtype(name)
    except TypeError as error:
        raise BuildError(
            f"config.{where} must name a floating type, 'float32', 'bfloat16' or 'float16'; got "
            f"{name!r}."
        ) from error


def build_accumulate(config: Any, slices: int = 1) -> int:
    """The number of micro-batches of an update, config.training.accumulate. Raises BuildError.

    slices: devices that each of them is split over.
    """
    n, size = dict(config.training).get("accumulate", 1), config.training.batch_size
    if not isinstance(n, int) or n < 1 or size % n:
        raise BuildError(
            f"config.training.accumulate cuts a batch into equal parts, and must divide batch_size "
            f"= {size}; got {n!r}."
        )
    if n > 1 and size // n % slices:
        raise BuildError(
            f"config.training.accumulate = {n} leaves micro-batches of {size // n} images, and "
            f"they must split over {slices} devices: take fewer, or a batch_size that is a "
            f"multiple of {n * slices}."
        )
    return n


def build_ema(config: Any) -> dict[str, Any]:
    """The rules of the averaged weights by name: "main", and config.ema.others. Raises BuildError.

    "main" is what is sampled and measured; it is the section itself, without `others`. `offload` is
    `build_offload`'s.
    """
    section = {name: value for name, value in dict(config.ema).items() if name != "offload"}
    others = dict(section.pop("others", {}))
    if "main" in others:
        raise BuildError("config.ema.others.main: config.ema itself describes 'main'; rename it.")
    rules = {"main": _rule(section, "ema", config)}
    for name, other in others.items():
        if not name.isidentifier():
            raise BuildError(f"config.ema.others: {name!r} is no name of a track; use a word.")
        rules[name] = _rule(dict(other), f"ema.others.{name}", config)
    return rules


def build_offload(config: Any, layout: Any) -> Any:
    """The layout of a state, its averages on the host if config.ema.offload. Raises BuildError."""
    from diffjax.train import offload

    if not dict(config.ema).get("offload", False):
        return layout
    try:
        return offload.averages_on_host(layout)
    except ValueError as error:
        raise BuildError(f"config.ema.offload: {error} Set it to False.") from error


def _rule(section: Section, where: str, config: Any) -> Any:
    from diffjax.train import ema

    families = {
        "constant": ema.ConstantEMA,
        "warmup": ema.WarmupEMA,
        "half_life": ema.HalfLifeEMA,
        "power": ema.PowerEMA,
    }
    half_life = section.get("name") == "half_life"
    given = {"batch_size": config.training.batch_size} if half_life else {}
    return make(families, section, where, **given)

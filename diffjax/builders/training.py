"""Loss, optimizer and averaging of a config."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffjax import losses, prediction
from diffjax.builders.make import BuildError, Section, make
from diffjax.builders.model import Parts
from diffjax.core.random import sample_keys, tag
from diffjax.core.types import Array, Key, PyTree
from diffjax.guidance import make_classifier
from diffjax.losses import classification, denoising_score_matching

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

    batch: {"image": uint8 (B, H, W, C), "label": (B,) for a conditional network}. train: with
    dropout, flips and augmentation.
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
    objective = functools.partial(
        _objective(config, parts), times=times, weight=weight, reduce=reduce
    )
    augment = build_augment(config, parts) if train else None

    def loss_fn(params: PyTree, key: Key, batch: Mapping[str, Array]):
        keys = sample_keys(key, batch["image"].shape[0])
        x0 = _clean(config, parts, keys, batch["image"], train=train)
        streams = ("dropout", "label_dropout") if train else ()
        rngs = {name: jax.random.fold_in(key, tag(name)) for name in streams}
        apply = functools.partial(parts.net.apply, train=train, rngs=rngs)
        if augment is not None:
            x0, labels = augment(keys, x0)
            apply = functools.partial(apply, augment=labels)
        denoise = prediction.make_denoiser(
            apply,
            parts.process,
            variables={"params": params},
            cond=None if parts.num_classes is None else batch["label"],
            learned_variance=parts.learned_variance,
            **parts.precondition._asdict(),
        )
        return objective(keys, denoise, parts.process, x0)

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
        return classification(keys, classify, parts.process, x0, batch["label"], times=times)

    return loss_fn


def build_optimizer(config: Any) -> tuple[Any, Any]:
    """(optax transformation, learning-rate schedule) of the optim section. Raises BuildError."""
    from diffjax.train import optim

    section = dict(config.optim)
    decay = section.pop("decay")
    schedule = make(
        {"constant": optim.learning_rate, "cosine": optim.learning_rate},
        {"name": decay, "peak": section.pop("lr"), "warmup": section.pop("warmup")}
        | {k: section.pop(k) for k in ("final_fraction",) if k in section},
        "optim",
        **({"decay_steps": config.training.n_iters} if decay == "cosine" else {}),
    )
    name = section.pop("optimizer").lower()
    return make(
        {"adam": optim.adam}, {"name": name, **section}, "optim", schedule=schedule
    ), schedule


def build_ema(config: Any) -> Any:
    """The rule of the averaged weights. Raises BuildError."""
    from diffjax.train import ema

    families = {"constant": ema.ConstantEMA, "warmup": ema.WarmupEMA, "half_life": ema.HalfLifeEMA}
    section = dict(config.ema)
    given = {"batch_size": config.training.batch_size} if section["name"] == "half_life" else {}
    return make(families, section, "ema", **given)

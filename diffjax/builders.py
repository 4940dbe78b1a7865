"""From a config to objects: the only room that reads configs.

A config is an `ml_collections.ConfigDict` of sections. A section names a member of a family and
gives its arguments:

    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}

Each family is one explicit dict below. `name` may also be "package.module:callable": it is called
with the section's other fields, so your own nets, processes and data need no change here. An
argument that the callable does not take raises, with the nearest name it does take.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from diffjax import losses, prediction, processes, solvers
from diffjax.core.quantise import Quantisation
from diffjax.core.random import sample_keys, tag
from diffjax.core.types import Array, Key, PyTree
from diffjax.guidance import NoisyClassifier, make_classifier
from diffjax.losses import classification, denoising_score_matching
from diffjax.nets.adm import ADM
from diffjax.nets.classifier import WideResNet
from diffjax.nets.ddpm import DDPM
from diffjax.nets.dit import DiT
from diffjax.nets.mlp import MLP
from diffjax.nets.ncsn import NCSN
from diffjax.nets.ncsnpp import NCSNpp
from diffjax.nets.ncsnv2 import NCSNv2
from diffjax.nets.songunet import SongUNet
from diffjax.prediction import precondition
from diffjax.solvers import grids

Section = Mapping[str, Any]

PROCESSES: dict[str, Callable[..., processes.Process]] = {
    "vp": processes.VP,
    "subvp": processes.SubVP,
    "ve": processes.VE,
    "edm": processes.EDM,
    "cosine": processes.Cosine,
    "ddpm": processes.Tabulated.ddpm,
    "rectified_flow": processes.RectifiedFlow,
}

NETS: dict[str, Callable[..., Any]] = {
    "ncsnpp": NCSNpp,
    "ddpm": DDPM,
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
    "songunet": SongUNet,
    "adm": ADM,
    "dit": DiT.named,
    "sit": DiT.sit,
    "mlp": MLP,
    "wideresnet": WideResNet,
}


def _plain(kind: prediction.KindName) -> precondition.Precondition:
    """A kind of output with the unscaled input and t itself as label."""
    return precondition.Precondition(
        prediction.as_kind(kind), precondition.Unscaled(), precondition.Time()
    )


def _edm(sigma_data: float = 0.5, label: str = "log_noise_level") -> precondition.Precondition:
    """EDM's convention; label "noise_level" for networks with a Fourier embedding."""
    labels = {"log_noise_level": precondition.LogNoiseLevel, "noise_level": precondition.NoiseLevel}
    return precondition.edm(sigma_data, make(labels, {"name": label}, "precondition.label"))


PRECONDITIONS: dict[str, Callable[..., precondition.Precondition]] = {
    "plain": _plain,
    "score_sde_vp": precondition.score_sde_vp,
    "ddpm": precondition.ddpm,
    "score_sde_ve": precondition.score_sde_ve,
    "edm": _edm,
    "edm_vp": precondition.vp,
    "edm_ve": precondition.ve,
    "iddpm": precondition.iddpm,
}

GRIDS: dict[str, Callable[..., Array]] = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
}

PREDICTORS: dict[str, Callable[..., solvers.Solver]] = {
    "euler": solvers.Euler,
    "heun": solvers.Heun,
    "ddim": solvers.DDIM,
    "ancestral": solvers.Ancestral,
    "euler_maruyama": solvers.EulerMaruyama,
    "reverse_diffusion": solvers.ReverseDiffusion,
}


def _no_corrector(snr: float = 0.0, n_steps: int = 1) -> solvers.Corrector:
    """Takes, and leaves, what the reference code's configs say of a corrector all the same."""
    return solvers.NoCorrector()


CORRECTORS: dict[str, Callable[..., solvers.Corrector]] = {
    "langevin": solvers.Langevin,
    "ald": solvers.AnnealedLangevin,
    "none": _no_corrector,
}


def _pc(
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    snr: float = 0.16,
    n_steps_each: int = 1,
    probability_flow: bool = False,
    order: Literal["corrector_first", "predictor_first"] = "corrector_first",
    coupling: str | None = None,
    noise_norm: str | None = None,
    variance: str | None = None,
) -> solvers.Solver:
    """Predictor-corrector under the reference code's names; the last three as their classes say."""
    section: dict[str, Any] = {
        "name": predictor,
        "probability_flow": probability_flow or None,
        "variance": variance,
    }
    family = {**PREDICTORS, "none": solvers.NoPredictor}
    step = make(family, _given(section), "sampling.solver.predictor")
    section = {
        "name": corrector,
        "snr": snr,
        "n_steps": n_steps_each,
        "coupling": coupling,
        "noise_norm": noise_norm,
    }
    correct = make(CORRECTORS, _given(section), "sampling.solver.corrector")
    return solvers.PredictorCorrector(step, correct, order)


def _given(section: Section) -> Section:
    """The fields that are not None."""
    return {name: value for name, value in section.items() if value is not None}


def _ode(rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 4096) -> solvers.AdaptiveFlow:
    """The black-box ODE sampler under the reference code's name."""
    return solvers.AdaptiveFlow(solvers.PIController(rtol=rtol, atol=atol, max_steps=max_steps))


def _edm_stochastic(n_steps: int, s_churn: float = 40.0, **bounds: float) -> solvers.Solver:
    """EDM's algorithm 2: Heun with churn."""
    return solvers.EDMChurn(solvers.Heun(), s_churn=s_churn, n_steps=n_steps, **bounds)


FINALS: dict[str, Callable[..., solvers.Final]] = {
    "to_end": solvers.ToEnd,
    "tweedie": solvers.Tweedie,
    "noiseless_predictor": solvers.NoiselessPredictor,
    "keep": solvers.Keep,
}


class BuildError(ValueError):
    """A config that cannot be built; the message names the field, the value and the way out."""


def make(family: Mapping[str, Callable[..., Any]], section: Section, where: str, **given: Any):
    """Calls the member that `section["name"]` names with the section's other fields and `given`.

    where: the section's place in the config, for messages. Raises BuildError for an unknown name,
    a field that the member does not take, or values that it refuses.
    """
    fields = {key: _frozen(value) for key, value in dict(section).items()}
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise BuildError(f"config.{where}.name must name one of {', '.join(family)}; got {name!r}.")
    member = _imported(name, where) if ":" in name else family.get(name)
    if member is None:
        near = difflib.get_close_matches(name, family, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BuildError(
            f"config.{where}.name = {name!r} is unknown; choose one of {', '.join(family)}, or "
            f"give your own as 'package.module:callable'.{hint}"
        )
    _check_fields(member, fields, where)
    try:
        return member(**fields, **{k: v for k, v in given.items() if k not in fields})
    except (TypeError, ValueError) as error:
        raise BuildError(f"config.{where} ({name}): {error}") from error


def _imported(name: str, where: str) -> Callable[..., Any]:
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
        return found
    except (ImportError, AttributeError) as error:
        raise BuildError(f"config.{where}.name = {name!r} cannot be imported: {error}.") from error


def _check_fields(member: Callable[..., Any], fields: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(member).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [n for n in parameters if n not in ("parent", "name")]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" It takes {', '.join(known)}."
            raise BuildError(f"config.{where}.{field} is not a field of this {where}.{hint}")


def _frozen(value: Any) -> Any:
    """Lists become tuples: networks must be hashable, and JSON knows no tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return value


@dataclasses.dataclass(frozen=True)
class _Apply:
    """`net.apply`, equal for equal networks: a bound method is equal for the same object only."""

    net: Any

    def __call__(self, *arguments: Any) -> Any:
        return self.net.apply(*arguments)


class Parts(NamedTuple):
    """What a config says of the model: everything that training and sampling share."""

    process: processes.Process
    net: Any  # a linen module
    precondition: precondition.Precondition
    quantisation: Quantisation
    image_shape: tuple[int, int, int]
    num_classes: int | None  # of the conditions that the network takes; None: unconditional

    def denoiser(self, params: PyTree, cond: Array | None = None) -> prediction.Denoiser:
        """The network with these weights as a denoiser, without dropout. cond: labels, (B,)."""
        return prediction.make_denoiser(
            _Apply(self.net),
            self.process,
            variables={"params": params},
            cond=cond,
            **self.precondition._asdict(),
        )

    def classifier(self, params: PyTree) -> NoisyClassifier:
        """The network with these weights as a classifier of noisy images."""
        return make_classifier(
            _Apply(self.net),
            self.process,
            variables={"params": params},
            scaling=self.precondition.scaling,
            label=self.precondition.label,
        )

    def init_params(self, key: Key) -> PyTree:
        """New weights. A label of one: the logarithm of a noise level 0 would be infinite."""
        x = jnp.zeros((1, *self.image_shape), jnp.float32)
        cond = () if self.num_classes is None else (jnp.zeros((1,), jnp.int32),)
        return self.net.init(key, x, jnp.ones((1,), jnp.float32), *cond)["params"]


def build_parts(config: Any) -> Parts:
    """The model's parts of a config. Raises BuildError."""
    net = make(NETS, config.model, "model")
    return Parts(
        process=make(PROCESSES, config.process, "process"),
        net=net,
        precondition=make(PRECONDITIONS, config.precondition, "precondition"),
        quantisation=build_quantisation(config),
        image_shape=(*_image_size(config.data.image_size), config.data.num_channels),
        num_classes=getattr(net, "num_classes", None),
    )


def _image_size(size: Any) -> tuple[int, int]:
    """One number for square images, or (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def build_quantisation(config: Any) -> Quantisation:
    """The map between stored levels and the model's range: [-1, 1] if centered, else [0, 1]."""
    data = config.data
    return Quantisation(
        levels=data.levels,
        low=-1.0 if data.centered else 0.0,
        placement="centres" if data.uniform_dequantization else "ends",
    )


# Fields of the data section that say what is done with a batch; the others choose the source.
_PREPROCESSING = (
    "image_size",
    "num_channels",
    "levels",
    "centered",
    "random_flip",
    "augment",
    "uniform_dequantization",
    "train_split",
    "eval_split",
)


def build_source(config: Any, split: str) -> Any:
    """The source of a split, "train" or "eval", held in memory where that saves decoding.

    Raises BuildError where the data are not what the config says.
    """
    from diffjax import data

    levels = config.data.levels

    def tfds(dataset: str, split: str, **options: Any) -> Any:
        return data.tfds_source(dataset, split, levels=levels, **options)

    def npz(train_path: str, eval_path: str, split: str) -> Any:
        path = train_path if split == config.data.train_split else eval_path
        return data.array_source(path, levels=levels)

    def folder(train_path: str, eval_path: str, split: str, **options: Any) -> Any:
        path = train_path if split == config.data.train_split else eval_path
        return data.folder_source(path, **options)

    families: dict[str, Callable[..., Any]] = {
        "digits": data.digits_source,
        "tfds": tfds,
        "npz": npz,
        "folder": folder,
    }
    chosen = {"train": config.data.train_split, "eval": config.data.eval_split}[split]
    section = {k: v for k, v in dict(config.data).items() if k not in _PREPROCESSING}
    source = make(families, section, "data", split=chosen)
    expected = (*_image_size(config.data.image_size), config.data.num_channels)
    info = source.info
    if tuple(info.shape) != expected or info.levels != config.data.levels:
        raise BuildError(
            f"config.data says images of shape {expected} with {config.data.levels} levels; "
            f"{info.name} has {tuple(info.shape)} with {info.levels}. Set image_size, "
            "num_channels and levels to the data's."
        )
    return source


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
            **parts.precondition._asdict(),
        )
        return denoising_score_matching(
            keys, denoise, parts.process, x0, times=times, weight=weight, reduce=reduce
        )

    return loss_fn


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
    if name not in ("denoising", "classification"):
        raise BuildError(
            f"config.loss.name must be 'denoising', the default, or 'classification'; got {name!r}."
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


class Sampling(NamedTuple):
    """How to sample: what `solvers.sample`, or `solvers.solve_adaptive`, takes beside the model.

    times: the grid, (n+1,); of an adaptive solve its two ends.
    """

    times: Array
    solver: solvers.Solver | solvers.AdaptiveFlow
    final: solvers.Final

    @property
    def adaptive(self) -> bool:
        """Whether the steps are the solver's own."""
        return isinstance(self.solver, solvers.AdaptiveFlow)


SOLVERS: dict[str, Callable[..., solvers.Solver | solvers.AdaptiveFlow]] = {
    **PREDICTORS,
    "pc": _pc,
    "edm_stochastic": _edm_stochastic,
    "ode": _ode,
}


def build_sampling(
    config: Any,
    process: processes.Process,
    *,
    solver: str | solvers.Solver | solvers.AdaptiveFlow | None = None,
    steps: int | None = None,
) -> Sampling:
    """The config's way of sampling, or another solver or number of steps.

    solver: a name among `SOLVERS`, a solver, or None for the config's. The grid and the end are the
    config's. An adaptive solver takes of the grid its ends, but goes no lower than the process's
    t_min, and denoises there unless the config keeps the noise. Raises BuildError.
    """
    section = config.sampling
    count = section.steps if steps is None else steps
    times = make(GRIDS, section.grid, "sampling.grid", process=process, n=count)
    final = make(FINALS, {"name": section.final}, "sampling.final")
    if solver is None or isinstance(solver, str):
        own = dict(section.solver)
        # The config's options belong to its own solver; another one comes with its defaults.
        chosen = own if solver in (None, own["name"]) else {"name": solver}
        given = {"n_steps": count} if chosen["name"] == "edm_stochastic" else {}
        made = make(SOLVERS, chosen, "sampling.solver", **given)
    else:
        made = solver
    plan = Sampling(times, made, final)
    if not plan.adaptive:
        return plan
    if steps is not None:
        raise BuildError(
            f"steps={steps} does not apply to an adaptive solver, which chooses its own: leave it "
            "out, and set rtol and atol (config.sampling.solver)."
        )
    ends = jnp.stack([times[0], jnp.maximum(times[-1], process.t_min)])
    return Sampling(ends, made, solvers.Keep() if section.final == "keep" else solvers.Tweedie())


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

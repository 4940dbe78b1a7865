"""The model of a config: process, network, conventions, levels."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffjax import prediction, processes
from diffjax.builders.make import make
from diffjax.core.quantise import Quantisation
from diffjax.core.types import Array, Key, PyTree
from diffjax.guidance import NoisyClassifier, make_classifier
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

PROCESSES: dict[str, Callable[..., processes.Process]] = {
    "vp": processes.VP,
    "subvp": processes.SubVP,
    "ve": processes.VE,
    "edm": processes.EDM,
    "cosine": processes.Cosine,
    "ddpm": processes.Tabulated.ddpm,
    "rectified_flow": processes.RectifiedFlow,
    "mean_reverting": processes.MeanReverting,
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
    "sit": precondition.sit,
}

# What the second half of a network's channels means; see `diffjax.prediction.learned`.
LEARNED_VARIANCES: dict[str, Callable[..., prediction.LearnedVariance]] = {
    "range": prediction.LearnedRange,
    "log": prediction.LearnedLog,
}


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
    learned_variance: prediction.LearnedVariance | None = None

    def denoiser(self, params: PyTree, cond: Array | None = None) -> prediction.Denoiser:
        """The network with these weights as a denoiser, without dropout. cond: labels, (B,)."""
        return prediction.make_denoiser(
            _Apply(self.net),
            self.process,
            variables={"params": params},
            cond=cond,
            learned_variance=self.learned_variance,
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
    convention = dict(config.precondition)
    rule = convention.pop("learned_variance", None)
    return Parts(
        process=make(PROCESSES, config.process, "process"),
        net=net,
        precondition=make(PRECONDITIONS, convention, "precondition"),
        quantisation=build_quantisation(config),
        image_shape=(*image_size(config.data.image_size), config.data.num_channels),
        num_classes=getattr(net, "num_classes", None),
        learned_variance=None if rule is None else _learned_variance(rule),
    )


def _learned_variance(name: Any) -> prediction.LearnedVariance:
    return make(LEARNED_VARIANCES, {"name": name}, "precondition.learned_variance")


def image_size(size: Any) -> tuple[int, int]:
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

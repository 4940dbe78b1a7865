"""Networks in flax linen: `net.apply(variables, x, label, cond, train)`.

They know no process and no config: the label is whatever number the caller conditions on, and the
result is raw, to be read by `prediction` as noise, score, velocity or data.
"""

from diffjax.nets.adm import ADM
from diffjax.nets.classifier import WideResNet
from diffjax.nets.ddpm import DDPM
from diffjax.nets.dit import DiT
from diffjax.nets.mlp import MLP
from diffjax.nets.ncsn import NCSN
from diffjax.nets.ncsnpp import NCSNpp
from diffjax.nets.ncsnv2 import NCSNv2
from diffjax.nets.songunet import SongUNet

__all__ = ["ADM", "DDPM", "DiT", "MLP", "NCSN", "NCSNpp", "NCSNv2", "SongUNet", "WideResNet"]

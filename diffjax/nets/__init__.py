"""Networks in flax linen: `net.apply(variables, x, label, cond, train)`.

They know no process and no config: the label is whatever number the caller conditions on, and the
result is raw, to be read by `prediction` as noise, score, velocity or data.
"""

from diffjax.nets.mlp import MLP
from diffjax.nets.ncsnpp import NCSNpp

__all__ = ["MLP", "NCSNpp"]

"""NCSN++ under the sub-VP SDE on CIFAR-10, continuous times.

    diffjax train --config=subvp/cifar10_ncsnpp_continuous --workdir=W

No score was published. 62.7 M parameters, 21.8 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous("subvp", networks.ncsnpp(embedding_type="positional"))
    return common.shaped(config, mode)

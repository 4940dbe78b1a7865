"""The DDPM network under the sub-VP SDE on CIFAR-10, continuous times.

    diffjax train --config=subvp/cifar10_ddpm_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3): FID 3.56 by the ODE sampler, 3.05 bits/dim, both at
the last checkpoint. 35.2 M parameters, 12.0 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous("subvp", networks.ddpm())
    return common.shaped(config, mode)

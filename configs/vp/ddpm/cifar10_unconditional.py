"""DDPM on CIFAR-10 without the label of time.

    diffjax train --config=vp/ddpm/cifar10_unconditional --workdir=W

No score was published. 32.3 M parameters, 12.0 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.discrete_vp(networks.ddpm(conditional=False))
    return common.shaped(config, mode)

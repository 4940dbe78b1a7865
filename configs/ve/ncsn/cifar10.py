"""NCSN on CIFAR-10 with none of the improved techniques of Song and Ermon 2020.

    diffjax train --config=ve/ncsn/cifar10 --workdir=W

Expected (Song and Ermon 2019): FID 25.32, IS 8.87. 34.4 M parameters.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.ncsn(
        networks.ncsn(num_scales=10),
        num_scales=10,
        sigma_max=1.0,
        snr=0.316,
        n_steps_each=100,
        ema=0.0,
    )
    return common.shaped(config, mode)

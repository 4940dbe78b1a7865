"""NCSN on CIFAR-10 with techniques 1, 2, 4 and 5 of the improved techniques of Song and Ermon 2020.

    diffjax train --config=ve/ncsn/cifar10_1245 --workdir=W

An ablation of Song and Ermon 2020. 44.8 M parameters.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.ncsn(
        networks.ncsn(num_scales=232),
        num_scales=232,
        sigma_max=50.0,
        snr=0.176,
        n_steps_each=5,
        ema=0.999,
    )
    return common.shaped(config, mode)

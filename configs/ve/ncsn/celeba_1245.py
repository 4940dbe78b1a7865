"""NCSN on CelebA with techniques 1, 2, 4 and 5 of the improved techniques of Song and Ermon 2020.

    diffjax train --config=ve/ncsn/celeba_1245 --workdir=W

An ablation of Song and Ermon 2020. 57.4 M parameters.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.ncsn(
        networks.ncsn(num_scales=500),
        num_scales=500,
        sigma_max=90.0,
        snr=0.128,
        n_steps_each=5,
        ema=0.999,
        data=datasets.celeba(),
    )
    return common.shaped(config, mode)

"""NCSN on CelebA with none of the improved techniques of Song and Ermon 2020.

    diffjax train --config=ve/ncsn/celeba --workdir=W

NCSN's FID was 26.89 in the original code, 25.30 with a last denoising. 34.4 M parameters. The
reference's file lacks training.sde and does not run.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.ncsn(
        networks.ncsn(num_scales=10),
        num_scales=10,
        sigma_max=1.0,
        snr=0.316,
        n_steps_each=100,
        ema=0.0,
        data=datasets.celeba(),
    )
    return common.shaped(config, mode)

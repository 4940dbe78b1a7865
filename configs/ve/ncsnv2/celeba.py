"""NCSNv2 on CelebA at 64 x 64 pixels.

    diffjax train --config=ve/ncsnv2/celeba --workdir=W

Expected (Song and Ermon 2020): FID 10.23 (28.86 without the last denoising). 34.0 M parameters.
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    net = networks.ncsnv2(resolution=64)
    config = score_sde.ncsn(
        net,
        num_scales=500,
        sigma_max=90.0,
        snr=0.128,
        n_steps_each=5,
        ema=0.999,
        data=datasets.celeba(),
    )
    config.optim.lr = 1e-4
    return common.shaped(config, mode)

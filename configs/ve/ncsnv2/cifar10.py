"""NCSNv2 on CIFAR-10.

    diffjax train --config=ve/ncsnv2/cifar10 --workdir=W

Expected (Song and Ermon 2020): FID 10.87, IS 8.40 (31.75 and 8.73 without the last denoising).
34.0 M parameters.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    net = networks.ncsnv2(resolution=64)
    config = score_sde.ncsn(
        net, num_scales=232, sigma_max=50.0, snr=0.176, n_steps_each=5, ema=0.999
    )
    config.optim.lr = 1e-4
    return common.shaped(config, mode)

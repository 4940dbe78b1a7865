"""NCSNv2 on LSUN bedrooms at 128 x 128 pixels.

    diffjax train --config=ve/ncsnv2/bedroom --workdir=W

No score was published. 83.4 M parameters. The reference's file misspells training.continuous and
does not run; the averaging rate is the file's (the paper's is 0.999).
"""

from configs import common, datasets, networks, score_sde


def get_config(mode: str = "full"):
    net = networks.ncsnv2(resolution=128)
    config = score_sde.ncsn(
        net, num_scales=1086, sigma_max=190.0, snr=0.095, n_steps_each=3, ema=0.9999
    )
    score_sde.large(config, datasets.lsun("bedroom", 128))
    config.training.batch_size = 128
    config.optim.lr = 1e-4
    config.sampling.solver.snr = 0.095
    return common.shaped(config, mode)

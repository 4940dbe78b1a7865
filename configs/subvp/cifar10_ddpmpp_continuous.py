"""DDPM++ under the sub-VP SDE on CIFAR-10, continuous times: the best likelihood of the three.

    diffjax train --config=subvp/cifar10_ddpmpp_continuous --workdir=W

Expected (Song et al. 2021, tables 2 and 3, 1.3 M steps): FID 2.61, IS 9.56 with the sampler below
at the best checkpoint; FID 3.16 and 3.02 bits/dim with the probability flow at the last.
61.8 M parameters, 21.7 GFLOP a forward image. `get_config("quick")` shrinks it to seconds.
"""

from configs.vp import cifar10_ddpmpp_continuous as vp


def get_config(mode: str = "full"):
    config = vp.get_config(mode)
    config.process.name = "subvp"
    return config

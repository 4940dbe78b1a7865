"""SiT-XL/2 on latents of ImageNet at 256 x 256 pixels: DiT's network as a flow.

    diffjax train --config=sit/imagenet256_xl2 --workdir=W

Published (Ma et al. 2024): FID 2.06 with guidance 1.5 and their SDE sampler. 675.1 M parameters.
Time runs as everywhere here, noise at t = 1; SiT's own runs the other way, and its network is asked
and read accordingly (`prediction.precondition.sit`). As yet the shapes only: latents and guidance
come later.
"""

from configs import common, latent_recipe


def get_config(mode: str = "full"):
    config = latent_recipe.sit(32)
    return common.shaped(config, mode)

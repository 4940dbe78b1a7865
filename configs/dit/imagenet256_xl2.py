"""DiT-XL/2 on latents of ImageNet at 256 x 256 pixels.

    diffjax train --config=dit/imagenet256_xl2 --workdir=W

Published (Peebles and Xie 2022): FID 2.27 with guidance 1.5. 675.1 M parameters, 237 GFLOP a
forward image at 256 pixels. --config.model.size=B/4 for another size. Trained by
iDDPM's hybrid loss, sampled with the variance that it learns. As yet the shapes only: latents and
guidance come later.
"""

from configs import common, latent_recipe


def get_config(mode: str = "full"):
    config = latent_recipe.dit(32)
    return common.shaped(config, mode)

"""EDM on AFHQv2 at 64 x 64 pixels with the DDPM++ network.

    diffjax train --config=edm/afhqv2_uncond_vp --workdir=W

Expected (Karras et al. 2022, table 2): FID 1.96 with 79 calls, the least of three evaluations.
61.8 M parameters; about four days on eight V100 (EDM's README).
"""

from configs import common, datasets, edm_recipe


def get_config(mode: str = "full"):
    net = edm_recipe.ddpmpp(ch_mult=(1, 2, 2, 2), dropout=0.25)
    config = edm_recipe.faces(net, datasets.folder("afhqv2", 64))
    return common.shaped(config, mode)

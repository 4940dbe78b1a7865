"""EDM on ImageNet at 64 x 64 pixels with classes and the ADM network.

    diffjax train --config=edm/imagenet64_cond_adm --workdir=W

Expected (Karras et al. 2022, table 3): FID 1.36 with 511 calls of the sampler below. 295.9 M
parameters; about 13 days on 32 A100 (EDM's README).
"""

from configs import common, datasets, edm_recipe


def get_config(mode: str = "full"):
    config = edm_recipe.train(
        edm_recipe.adm(),
        datasets.imagenet(64),
        images=2_500_000_000,
        batch_size=4096,
        lr=1e-4,
        steps=256,
        half_life_images=50_000_000,
    )
    config.sampling.solver = {
        "name": "edm_stochastic",
        "s_churn": 40.0,
        "s_min": 0.05,
        "s_max": 50.0,
        "s_noise": 1.003,
    }
    return common.shaped(config, mode)

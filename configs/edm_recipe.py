"""The family of configs of EDM: sigma(t) = t, its preconditioning, loss and augmentation.

Differences from the reference code: gradients that are not finite are not replaced, and ImageNet's
network runs in bfloat16 where the reference uses float16 with a loss scale.
"""

from ml_collections import ConfigDict

from configs import common


def train(
    model: ConfigDict,
    data: ConfigDict,
    *,
    images: int,
    batch_size: int,
    lr: float,
    steps: int,
    augment: float = 0.0,
    half_life_images: int = 500_000,
) -> ConfigDict:
    """images: of the whole training. steps: of the sampler. augment: its probability."""
    config = common.base()
    config.seed = 0
    config.process = {"name": "edm", "t_min": 0.002, "t_max": 80.0}
    config.precondition = {"name": "edm", "sigma_data": 0.5, "label": "log_noise_level"}
    config.loss = {
        "times": {"name": "log_normal", "mean": -1.2, "std": 1.2, "stratified": False},
        "weight": {"name": "edm", "sigma_data": 0.5},
        "reduce": "sum",
    }
    config.model = model
    config.optim.update({"lr": lr, "warmup": 10_000_000 // batch_size, "grad_clip": -1.0})
    config.ema = {"name": "half_life", "half_life_images": half_life_images, "ramp_up": 0.05}
    config.training.update(
        {"batch_size": batch_size, "n_iters": -(-images // batch_size), "n_jitted_steps": 1}
    )
    config.sampling = {
        "steps": steps,
        "grid": {"name": "karras", "rho": 7.0},
        "solver": {"name": "heun"},
        "final": "to_end",
    }
    config.eval.update({"batch_size": 512})
    config.data = data
    config.data.random_flip = False  # mirroring is part of the augmentation
    if augment:
        config.data.augment = augment
        config.model.augment_dim = 9
    return config


def ddpmpp(**options) -> ConfigDict:
    """EDM's DDPM++ ("vp"): 55.7 M parameters."""
    return ConfigDict(
        {
            "name": "songunet",
            "nf": 128,
            "ch_mult": (2, 2, 2),
            "num_res_blocks": 4,
            "attn_resolutions": (16,),
            "dropout": 0.13,
            "embedding_type": "positional",
            "progressive_input": "none",
            "fir_kernel": (1, 1),
            **options,
        }
    )


def ncsnpp(**options) -> ConfigDict:
    """EDM's NCSN++ ("ve"): 56.4 M parameters."""
    return ddpmpp(
        embedding_type="fourier",
        embedding_mult=2,
        fourier_scale=16.0,
        progressive_input="residual",
        fir_kernel=(1, 3, 3, 1),
        **options,
    )


def cifar10(model: ConfigDict, data: ConfigDict) -> ConfigDict:
    """200 M images in batches of 512."""
    return train(model, data, images=200_000_000, batch_size=512, lr=1e-3, steps=18, augment=0.12)


def faces(model: ConfigDict, data: ConfigDict) -> ConfigDict:
    """FFHQ and AFHQv2 at 64 x 64 pixels: 200 M images in batches of 256."""
    return train(model, data, images=200_000_000, batch_size=256, lr=2e-4, steps=40, augment=0.15)


def adm(**options) -> ConfigDict:
    """ADM for ImageNet at 64 x 64 pixels: 295.9 M parameters."""
    return ConfigDict(
        {
            "name": "adm",
            "nf": 192,
            "ch_mult": (1, 2, 3, 4),
            "num_res_blocks": 3,
            "attn_resolutions": (32, 16, 8),
            "channels_per_head": 64,
            "dropout": 0.1,
            "num_classes": 1000,
            "dtype": "bfloat16",
            **options,
        }
    )

"""The families of configs of DiT and SiT, on latents: 4 channels, an eighth of the image's size."""

from ml_collections import ConfigDict

from configs import common, datasets


def dit(image_size: int) -> ConfigDict:
    """DiT-XL/2 on DDPM's 1,000 levels with a learned variance; image_size: that of the latents."""
    config = _transformer(image_size)
    config.process = {"name": "ddpm", "n": 1000, "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "ddpm", "levels": 1000, "learned_variance": "range"}
    config.loss.times = {"name": "discrete", "levels": 1000, "stratified": False}
    config.loss.update({"name": "hybrid", "bound_weight": 1.0})
    config.model = {"name": "dit", "size": "XL/2", "scan": False}
    config.sampling = {
        "steps": 249,
        "grid": {"name": "uniform", "end": 1e-3},
        "solver": {"name": "ancestral", "variance": "learned"},
        "final": "tweedie",
    }
    return config


def sit(image_size: int) -> ConfigDict:
    """SiT-XL/2 on the rectified flow; image_size: that of the latents."""
    config = _transformer(image_size)
    config.process = {"name": "rectified_flow"}
    config.precondition = {"name": "sit"}
    config.loss.weight = {"name": "velocity"}
    config.model = {"name": "sit", "size": "XL/2", "scan": False}
    config.sampling = {
        "steps": 1,  # of no effect: the solver chooses its own
        "grid": {"name": "uniform"},
        "solver": {"name": "ode", "rtol": 1e-3, "atol": 1e-6},
        "final": "tweedie",
    }
    return config


def _transformer(image_size: int) -> ConfigDict:
    config = common.base()
    config.seed = 0
    config.optim.update({"lr": 1e-4, "warmup": 0, "grad_clip": -1.0})
    config.training.update({"batch_size": 256, "n_iters": 7_000_000, "n_jitted_steps": 1})
    config.data = datasets.latents(image_size)
    return config

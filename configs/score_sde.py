"""The families of configs of the Score-SDE reference repository.

Its sampler asks the network at N = num_scales points, the last of them for the denoised image. That
is a grid of N - 1 intervals that ends at the last point, and one Tweedie step there.
"""

from ml_collections import ConfigDict

from configs import common, datasets


def continuous(process: str, model: ConfigDict) -> ConfigDict:
    """VP and sub-VP ("vp", "subvp") on CIFAR-10 in continuous time."""
    config = _linear(model)
    config.process = {"name": process, "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "score_sde_vp"}
    config.sampling.grid.end = 1e-3
    config.sampling.solver = {"name": "euler_maruyama"}
    return config


def discrete_vp(model: ConfigDict) -> ConfigDict:
    """DDPM's 1,000 levels on CIFAR-10, and ancestral sampling with its larger variance."""
    config = _linear(model)
    config.process = {"name": "ddpm", "n": 1000, "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "ddpm", "levels": 1000}
    config.loss.times = {"name": "discrete", "levels": 1000, "stratified": False}
    config.sampling.grid.end = 1e-3
    config.sampling.solver = {"name": "ancestral", "variance": "large"}
    return config


def continuous_ve(model: ConfigDict, *, sigma_max: float, num_scales: int = 1000) -> ConfigDict:
    """VE on CIFAR-10 in continuous time, and predictor-corrector sampling."""
    config = _exploding(model, sigma_max, num_scales)
    config.model.scale_by_sigma = True
    config.precondition = {"name": "score_sde_ve"}
    return config


def discrete_ve(
    model: ConfigDict,
    *,
    sigma_max: float,
    num_scales: int = 1000,
    data: ConfigDict | None = None,
) -> ConfigDict:
    """VE trained on num_scales levels, and predictor-corrector sampling."""
    config = _exploding(model, sigma_max, num_scales, data)
    config.precondition = {"name": "score_sde_ve", "levels": num_scales}
    config.loss.times = {
        "name": "discrete",
        "levels": num_scales,
        "placement": "ends",
        "stratified": False,
    }
    if model.name != "ncsn":  # which knows its level, and learns the scale of its output
        scales = {"sigma_min": 0.01, "sigma_max": sigma_max, "num_scales": num_scales}
        config.model.update({"scale_by_sigma": True, **scales})
    return config


def ncsn(
    model: ConfigDict,
    *,
    num_scales: int,
    sigma_max: float,
    snr: float,
    n_steps_each: int,
    ema: float,
    data: ConfigDict | None = None,
) -> ConfigDict:
    """NCSN and NCSNv2: annealed Langevin steps at each level, no predictor."""
    config = discrete_ve(model, sigma_max=sigma_max, num_scales=num_scales, data=data)
    config.optim.update({"lr": 1e-3, "warmup": 0, "grad_clip": -1.0})
    config.ema.rate = ema
    config.sampling.solver = _pc("none", "ald", snr, n_steps_each)
    return config


def large(config: ConfigDict, data: ConfigDict) -> None:
    """What the sets of 128 and 256 pixels change of a CIFAR-10 config."""
    data.centered = config.data.centered
    config.data = data
    config.training.update(
        {"batch_size": 64, "n_iters": 2_400_001, "snapshot_freq_for_preemption": 5_000}
    )
    config.eval.batch_size = 512
    if config.sampling.solver.name == "pc":
        config.sampling.solver.snr = 0.075


def huge(config: ConfigDict, data: ConfigDict) -> None:
    """What the sets of 1024 pixels change of a CIFAR-10 config."""
    large(config, data)
    config.training.update({"batch_size": 8, "n_jitted_steps": 1})
    config.ema.rate = 0.9999
    config.eval.batch_size = 1024
    config.sampling.solver.snr = 0.15


def _linear(model: ConfigDict) -> ConfigDict:
    """VP and sub-VP: data in [-1, 1], 1,000 points, no corrector."""
    config = common.base()
    config.model = model
    config.sampling = _sampling(1000)
    config.data = datasets.cifar10()
    return config


def _exploding(
    model: ConfigDict, sigma_max: float, num_scales: int, data: ConfigDict | None = None
) -> ConfigDict:
    """VE: data in [0, 1], half a sum as loss, a shorter average."""
    config = common.base()
    config.process = {"name": "ve", "sigma_min": 0.01, "sigma_max": sigma_max}
    config.model = model
    config.model.centered = False
    config.loss.reduce = "half_sum"
    config.ema.rate = 0.999
    config.sampling = _sampling(num_scales)
    config.sampling.grid.end = 1e-5
    config.sampling.solver = _pc("reverse_diffusion", "langevin", 0.16, 1)
    config.data = datasets.cifar10() if data is None else data
    config.data.centered = False
    return config


def _sampling(num_scales: int) -> dict:
    return {"steps": num_scales - 1, "grid": {"name": "uniform"}, "final": "tweedie", "solver": {}}


def _pc(predictor: str, corrector: str, snr: float, n_steps_each: int) -> dict:
    return {
        "name": "pc",
        "predictor": predictor,
        "corrector": corrector,
        "snr": snr,
        "n_steps_each": n_steps_each,
    }

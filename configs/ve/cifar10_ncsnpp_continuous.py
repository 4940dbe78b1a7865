"""NCSN++ under the VE SDE on CIFAR-10, continuous times.

    diffjax train --config=ve/cifar10_ncsnpp_continuous --workdir=W

Expected (Song et al. 2021, table 3, 1.3 M steps): FID 2.38, IS 9.83 with the sampler below at the
best checkpoint (1.2 M). 62.8 M parameters, 21.8 GFLOP a forward image. Images are in [0, 1] here:
sigma_max = 50 is the largest distance between two of them. `get_config("quick")` shrinks it to
seconds.
"""

from configs import common


def get_config(mode: str = "full"):
    config = common.base()
    config.process = {"name": "ve", "sigma_min": 0.01, "sigma_max": 50.0}
    config.precondition = {"name": "score_sde_ve"}
    config.loss.reduce = "half_sum"
    config.model = common.ncsnpp_cifar10()
    config.model.update(
        {
            "fir": True,
            "fir_kernel": (1, 3, 3, 1),
            "progressive_input": "residual",
            "embedding_type": "fourier",
            "fourier_scale": 16.0,
            "centered": False,
            "scale_by_sigma": True,
        }
    )
    config.ema.rate = 0.999
    config.sampling = {
        "steps": 1000,
        "grid": {"name": "uniform", "end": 1e-5},
        "solver": {
            "name": "pc",
            "predictor": "reverse_diffusion",
            "corrector": "langevin",
            "snr": 0.16,
            "n_steps_each": 1,
        },
        "final": "tweedie",
    }
    config.data = common.cifar10()
    config.data.centered = False
    return common.shaped(config, mode)

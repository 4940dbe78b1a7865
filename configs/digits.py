"""A small DDPM++ under the VP SDE on the handwritten digits of scikit-learn.

    diffjax train --config=digits --workdir=runs/digits

Real data that ship with a package: 1,437 training and 360 held-out images of 8 x 8 pixels with 17
grey levels. Five minutes on two CPU cores. `get_config("quick")` shrinks it to seconds.
"""

from configs import common


def get_config(mode: str = "full"):
    config = common.base()
    config.seed = 0
    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "edm", "sigma_data": 0.7}
    config.loss.weight = {"name": "edm", "sigma_data": 0.7}
    config.loss.times.stratified = True
    config.model = common.ddpmpp_cifar10()
    config.model.update(
        {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}
    )
    config.optim.update({"lr": 2e-3, "warmup": 200, "decay": "cosine"})
    config.ema = {"name": "warmup", "rate": 0.999}
    config.training.update(
        {
            "batch_size": 128,
            "n_iters": 2000,
            "n_jitted_steps": 10,
            "log_freq": 50,
            "eval_freq": 500,
            "snapshot_freq": 1000,
            "snapshot_freq_for_preemption": 500,
        }
    )
    config.sampling = {
        "steps": 30,
        "grid": {"name": "log_snr"},
        "solver": {"name": "heun"},
        "final": "to_end",
    }
    config.eval.update({"batch_size": 500, "num_samples": 500})
    config.data = {
        "name": "digits",
        "train_split": "train",
        "eval_split": "test",
        "image_size": 8,
        "num_channels": 1,
        "levels": 17,
        "centered": True,
        "random_flip": False,
        "uniform_dequantization": True,
    }
    return common.shaped(config, mode)

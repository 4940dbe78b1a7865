"""A small DDPM++ under the VP SDE on the handwritten digits of scikit-learn.

    diffjax train --config=digits --workdir=runs/digits

Real data that ship with a package: 1,437 training and 360 held-out images of 8 x 8 pixels with 17
grey levels. 0.75 M parameters, minutes on two CPU cores. The network is EDM-preconditioned and sees
noise levels spread widely around ln(sigma) = -0.6, where the shapes are decided; the low ones make
the bits/dim. `get_config("quick")` shrinks it to seconds.
"""

from configs import common, networks


def get_config(mode: str = "full"):
    config = common.base()
    config.seed = 0
    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "edm", "sigma_data": 0.75, "label": "noise_level"}
    config.loss = {
        "times": {"name": "log_normal", "mean": -0.6, "std": 1.3, "stratified": True},
        "weight": {"name": "edm", "sigma_data": 0.75},
        "reduce": "mean",
    }
    config.model = networks.ddpmpp()
    config.model.update(
        {
            "nf": 32,
            "ch_mult": (1, 2),
            "num_res_blocks": 1,
            "attn_resolutions": (4,),
            "dropout": 0.0,
            "embedding_type": "fourier",
            # Frequencies for ln(sigma) itself: the paper's 16 is for many more images.
            "fourier_scale": 0.3,
        }
    )
    config.optim.update(
        {"lr": 2e-3, "beta2": 0.99, "warmup": 100, "decay": "cosine", "final_fraction": 0.01}
    )
    config.ema = {"name": "warmup", "rate": 0.997}
    config.training.update(
        {
            "batch_size": 64,
            "n_iters": 2600,
            "n_jitted_steps": 1,  # on a CPU; see diffjax.train.step.multi_step
            "log_freq": 20,
            "eval_freq": 200,
            "snapshot_freq": 2600,
            "snapshot_freq_for_preemption": 500,
        }
    )
    config.sampling = {
        "steps": 100,
        "grid": {"name": "karras", "t_min": 2.5e-4},
        "solver": {"name": "ancestral"},
        "final": "to_end",
    }
    config.eval.update({"batch_size": 512, "num_samples": 500, "tolerance": 1e-3})
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

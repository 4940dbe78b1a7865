r"""A small DDPM++ under the VP SDE on a folder of CIFAR-10 images, for an hour on two CPU cores.

    diffjax train --config=cifar10_small --workdir=W \
        --config.data.train_path=cifar10/train --config.data.eval_path=cifar10/test

A folder for each class. Preconditioned as the digits are. No score of a whole run is known; half of
one, 2,000 updates, is in docs/results.md. `get_config("quick")` shrinks it to seconds.
"""

from configs import common, datasets, networks


def get_config(mode: str = "full"):
    config = common.base()
    config.seed = 0
    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "edm", "sigma_data": 0.5, "label": "noise_level"}
    config.loss = {
        "times": {"name": "log_normal", "mean": -0.8, "std": 1.4, "stratified": True},
        "weight": {"name": "edm", "sigma_data": 0.5},
        "reduce": "mean",
    }
    config.model = networks.ddpmpp(
        nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, dropout=0.0, attn_resolutions=(8,)
    )
    # Frequencies for ln(sigma) itself: the paper's 16 is for much longer training.
    config.model.update({"embedding_type": "fourier", "fourier_scale": 0.3})
    config.optim.update(
        {"lr": 1e-3, "beta2": 0.99, "warmup": 100, "decay": "cosine", "final_fraction": 0.01}
    )
    config.ema = {"name": "warmup", "rate": 0.998}
    config.training.update(
        {
            "batch_size": 32,
            "n_iters": 4000,
            "n_jitted_steps": 1,  # on a CPU; see diffjax.train.step.multi_step
            "log_freq": 50,
            "eval_freq": 500,
            "snapshot_freq": 1000,
            "snapshot_freq_for_preemption": 500,
        }
    )
    config.sampling = {
        "steps": 50,
        "grid": {"name": "karras", "t_min": 1e-3},
        "solver": {"name": "heun"},
        "final": "to_end",
    }
    config.eval.update({"batch_size": 250, "num_samples": 2000, "tolerance": 1e-3})
    config.data = datasets.folder("cifar10", 32)
    config.data.update({"train_path": "cifar10/train", "eval_path": "cifar10/test", "labels": True})
    return common.shaped(config, mode)

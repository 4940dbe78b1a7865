"""The digits with a transformer of one narrow block: a run of several processes in seconds.

--config=tests/runs/tiny_config.py, `:endless` for one that is stopped from outside.
"""

from configs import common, digits


def get_config(mode: str = "short"):
    config = common.base()
    config.seed = 0
    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}
    config.precondition = {"name": "edm", "sigma_data": 0.75}
    config.loss.weight = {"name": "edm", "sigma_data": 0.75}
    config.model = {
        "name": "dit", "size": "S/4", "depth": 1, "width": 16, "num_heads": 2,
        "num_classes": None, "label_dropout": 0.0, "learn_sigma": False,
    }  # fmt: skip
    config.mesh.min_size = 64  # so that "fsdp" splits something
    # The keys of attention have biases without a gradient: Adam with a small eps would take their
    # rounding, which differs from mesh to mesh, for a direction.
    config.optim.update({"lr": 1e-2, "warmup": 2, "eps": 1e-4})
    config.ema = {"name": "constant", "rate": 0.5}
    config.training.update(
        {
            "batch_size": 16,
            "n_iters": 12,
            "n_jitted_steps": 2,
            "log_freq": 2,
            "eval_freq": 4,
            "snapshot_freq": 4,
            "snapshot_freq_for_preemption": 4,
        }
    )
    if mode == "endless":
        config.training.update({"n_iters": 10**6, "eval_freq": 10**6, "log_freq": 10})
        config.training.snapshot_freq = 10**6
        config.training.snapshot_freq_for_preemption = 100
    config.sampling = {
        "steps": 2,
        "grid": {"name": "log_snr", "t_min": 1e-3},
        "solver": {"name": "heun"},
        "final": "to_end",
    }
    config.eval.update({"batch_size": 4, "num_samples": 10})
    config.data = digits.get_config().data
    return config

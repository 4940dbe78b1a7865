"""What all configs have in common, and how one is shrunk.

Sections and who reads them stand in `diffjax.builders`; the names of fields are the reference
code's where they mean the same thing. Beside this file: `datasets`, `networks`, and the families of
configs: `score_sde`, `edm_recipe`, `latent_recipe`.
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Every section, with what all configs have in common."""
    return ConfigDict(
        {
            "seed": 42,
            "process": {},
            "model": {},
            "precondition": {},
            "loss": {
                "times": {"name": "uniform", "stratified": False},
                "weight": {"name": "simple"},
                "reduce": "mean",
            },
            "optim": {
                "optimizer": "Adam",
                "lr": 2e-4,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "warmup": 5000,
                "grad_clip": 1.0,
                "decay": "constant",
                "moment_dtype": "float32",
            },
            "ema": {"name": "constant", "rate": 0.9999},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "training": {
                "batch_size": 128,
                "accumulate": 1,
                "n_iters": 1_300_001,
                "n_jitted_steps": 5,
                "log_freq": 50,
                "eval_freq": 100,
                "snapshot_freq": 50_000,
                "snapshot_freq_for_preemption": 10_000,
                "snapshot_sampling": True,
                "on_divergence": "stop",
                "divergence_limit": 10,
                "keep": {"newest": 2, "best": 0, "metric": "eval_loss"},
                "init_from": "",
            },
            "sampling": {},
            "eval": {"batch_size": 1024, "num_samples": 50_000, "tolerance": 1e-5},
            "data": {},
        }
    )


def shaped(config: ConfigDict, mode: str) -> ConfigDict:
    """The config as it is ("full") or shrunk to seconds ("quick")."""
    if mode not in ("full", "quick"):
        raise ValueError(f"A config comes as 'full' or 'quick'; got {mode!r}.")
    config.data = {**_READING, **config.data}
    config.model = {**_COST, **config.model}
    config.ema = {"offload": False, **config.ema}
    return _quick(config) if mode == "quick" else config


# How the data of any config are read ahead, see `diffjax.builders.data.Reading`.
_READING = {"workers": 0, "ahead": 2, "placed": 1}

# What any shipped network computes in, and whether its blocks are recomputed in the backward pass.
_COST = {"dtype": "float32", "remat": False}


_QUICK_TRANSFORMER = {"depth": 2, "width": 32, "num_heads": 2}
# The least of each network that still has all its parts.
_QUICK_UNET = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
_QUICK_MODELS = {
    "ncsnpp": {"nf": 8, **_QUICK_UNET},
    "ddpm": {"nf": 32, **_QUICK_UNET},
    "ncsn": {"nf": 8},
    "ncsnv2": {"nf": 8},
    "songunet": {"nf": 8, **_QUICK_UNET},
    "adm": {"nf": 32, **_QUICK_UNET, "channels_per_head": 32},
    "dit": _QUICK_TRANSFORMER,
    "sit": _QUICK_TRANSFORMER,
    "wideresnet": {"blocks_per_group": 1, "channel_multiplier": 1},
}


def _quick(config: ConfigDict) -> ConfigDict:
    """Shrinks a config to seconds on a CPU: the same families, tiny sizes."""
    config.model.update(_QUICK_MODELS[config.model.name])
    config.data.image_size = 8
    config.training.update(
        {
            "batch_size": 8,
            "n_iters": 10,
            "n_jitted_steps": 5,
            "log_freq": 5,
            "eval_freq": 5,
            "snapshot_freq": 10,
            "snapshot_freq_for_preemption": 5,
        }
    )
    config.optim.warmup = min(config.optim.warmup, 2)
    if config.sampling:  # a classifier draws nothing
        config.sampling.steps = min(config.sampling.steps, 4)
        if "n_steps_each" in config.sampling.solver:
            config.sampling.solver.n_steps_each = 1
    config.eval.update({"batch_size": 8, "num_samples": 8})
    return config

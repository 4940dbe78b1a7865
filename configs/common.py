"""What configs share, written once.

Sections and who reads them stand in `diffjax.builders`; the names of fields are the reference
code's where they mean the same thing.
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
            },
            "ema": {"name": "constant", "rate": 0.9999},
            "training": {
                "batch_size": 128,
                "n_iters": 1_300_001,
                "n_jitted_steps": 5,
                "log_freq": 50,
                "eval_freq": 100,
                "snapshot_freq": 50_000,
                "snapshot_freq_for_preemption": 10_000,
                "snapshot_sampling": True,
            },
            "sampling": {},
            "eval": {"batch_size": 1024, "num_samples": 50_000, "tolerance": 1e-5},
            "data": {},
        }
    )


def cifar10() -> ConfigDict:
    """The data section of CIFAR-10 through tfds, in [-1, 1]."""
    return ConfigDict(
        {
            "name": "tfds",
            "dataset": "cifar10",
            "train_split": "train",
            "eval_split": "test",
            "image_size": 32,
            "num_channels": 3,
            "levels": 256,
            "centered": True,
            "random_flip": True,
            "uniform_dequantization": False,
        }
    )


def ncsnpp_cifar10() -> ConfigDict:
    """What DDPM++ and NCSN++ have in common on CIFAR-10."""
    return ConfigDict(
        {
            "name": "ncsnpp",
            "nf": 128,
            "ch_mult": (1, 2, 2, 2),
            "num_res_blocks": 4,
            "attn_resolutions": (16,),
            "dropout": 0.1,
            "resamp_with_conv": True,
            "conditional": True,
            "skip_rescale": True,
            "resblock_type": "biggan",
            "progressive": "none",
            "progressive_combine": "sum",
            "init_scale": 0.0,
        }
    )


def ddpmpp_cifar10() -> ConfigDict:
    """DDPM++: no FIR, no pyramids, positional embedding. 61,804,419 parameters."""
    model = ncsnpp_cifar10()
    model.update({"fir": False, "progressive_input": "none", "embedding_type": "positional"})
    return model


def shaped(config: ConfigDict, mode: str) -> ConfigDict:
    """The config as it is ("full") or shrunk to seconds ("quick")."""
    if mode not in ("full", "quick"):
        raise ValueError(f"A config comes as 'full' or 'quick'; got {mode!r}.")
    return _quick(config) if mode == "quick" else config


def _quick(config: ConfigDict) -> ConfigDict:
    """Shrinks a config to seconds on a CPU: the same families, tiny sizes."""
    config.model.update({"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)})
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
    config.optim.warmup = 2
    config.sampling.steps = 4
    config.eval.update({"batch_size": 8, "num_samples": 8})
    return config

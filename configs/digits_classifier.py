"""A small classifier of noisy digits, to guide the model of the config `digits` to a class.

    diffjax train --config=digits_classifier --workdir=runs/classifier
    diffjax evaluate --workdir=runs/classifier --metrics=loss,accuracy

The reference code's noise-conditional wide residual network, narrow: 0.1 M parameters, minutes on
two CPU cores. It is trained under the model's own VP process, at uniform times.
`get_config("quick")` shrinks it to seconds.
"""

from configs import common, digits, networks


def get_config(mode: str = "full"):
    config = digits.get_config()
    config.precondition = {"name": "edm", "sigma_data": 0.75, "label": "noise_level"}
    config.loss = {
        "name": "classification",
        "times": {"name": "uniform", "stratified": True},
    }
    config.model = networks.wideresnet(blocks_per_group=1, channel_multiplier=2, fourier_scale=0.3)
    config.training.update({"n_iters": 1500, "snapshot_freq": 1500, "snapshot_sampling": False})
    config.sampling = {}
    return common.shaped(config, mode)

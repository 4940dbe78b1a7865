"""The reference's classifier of noisy CIFAR-10 images, for class-conditional sampling.

    diffjax train --config=ve/cifar10_classifier --workdir=W

WRN-28-10 told the noise level, 38.9 M parameters, cross-entropy at random times of the VE SDE
(Song et al. 2021, appendix I.1). The reference repository has its weights but no training code, so
the optimizer and the number of updates are this library's choice. It guides models of any process:
see `diffjax.guidance.classifier`.
"""

from configs import common, datasets, networks


def get_config(mode: str = "full"):
    config = common.base()
    config.process = {"name": "ve", "sigma_min": 0.01, "sigma_max": 50.0}
    config.precondition = {"name": "score_sde_ve"}
    config.loss = {"name": "classification", "times": {"name": "uniform", "stratified": False}}
    config.model = networks.wideresnet(
        channel_mean=(0.49139968, 0.48215841, 0.44653091),
        channel_std=(0.24703223, 0.24348513, 0.26158784),
    )
    config.optim.update({"warmup": 1000, "decay": "cosine"})
    config.ema.rate = 0.999
    config.training.update({"n_iters": 200_000, "snapshot_sampling": False})
    config.data = datasets.cifar10()
    config.data.centered = False
    return common.shaped(config, mode)

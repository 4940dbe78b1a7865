"""NCSN++, twice as deep, under the sub-VP SDE on CIFAR-10, continuous times.

    diffjax train --config=subvp/cifar10_ncsnpp_deep_continuous --workdir=W

No score was published. 107.5 M parameters, 37.2 GFLOP a forward image.
"""

from configs import common, networks, score_sde


def get_config(mode: str = "full"):
    config = score_sde.continuous(
        "subvp", networks.ncsnpp(embedding_type="positional", num_res_blocks=8)
    )
    config.training.n_iters = 950_001
    return common.shaped(config, mode)

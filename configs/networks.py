"""The model sections of the published configs; options replace fields.

The parameters counted are those of 3 channels.
"""

from typing import Any

from ml_collections import ConfigDict


def ncsnpp(**options: Any) -> ConfigDict:
    """NCSN++ for CIFAR-10, under a continuous VE SDE: 62,758,915 parameters."""
    model = ConfigDict(
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
            "progressive_input": "residual",
            "progressive_combine": "sum",
            "init_scale": 0.0,
            "fir": True,
            "fir_kernel": (1, 3, 3, 1),
            "embedding_type": "fourier",
            "fourier_scale": 16.0,
            **options,
        }
    )
    if not model.fir:
        del model.fir_kernel
    if model.embedding_type != "fourier":
        del model.fourier_scale
    return model


def ddpmpp(**options: Any) -> ConfigDict:
    """DDPM++ for CIFAR-10: no FIR, no pyramids, positional embedding; 61,804,419 parameters."""
    plain = {"fir": False, "progressive_input": "none", "embedding_type": "positional"}
    return ncsnpp(**plain, **options)


def ncsnpp_256(**options: Any) -> ConfigDict:
    """NCSN++ for 256 x 256 pixels: 65,574,549 parameters."""
    sizes = {"ch_mult": (1, 1, 2, 2, 2, 2, 2), "num_res_blocks": 2, "dropout": 0.0}
    pyramids = {"progressive": "output_skip", "progressive_input": "input_skip"}
    return ncsnpp(**sizes, **pyramids, **options)


def ncsnpp_1024(**options: Any) -> ConfigDict:
    """NCSN++ for 1024 x 1024 pixels: 105,785,896 parameters."""
    sizes = {"nf": 16, "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32), "num_res_blocks": 1, "dropout": 0.0}
    pyramids = {"progressive": "output_skip", "progressive_input": "input_skip"}
    return ncsnpp(**sizes, **pyramids, **options)


def ddpm(**options: Any) -> ConfigDict:
    """The U-Net of DDPM for CIFAR-10 as the reference code has it: 35,218,947 parameters."""
    return ConfigDict(
        {
            "name": "ddpm",
            "nf": 128,
            "ch_mult": (1, 2, 2, 2),
            "num_res_blocks": 2,
            "attn_resolutions": (16,),
            "dropout": 0.1,
            "resamp_with_conv": True,
            "conditional": True,
            **options,
        }
    )


def ddpm_256(**options: Any) -> ConfigDict:
    """The U-Net of DDPM for 256 x 256 pixels: 111,569,923 parameters."""
    return ddpm(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0, **options)


def ncsn(num_scales: int) -> ConfigDict:
    """NCSN: a RefineNet whose normalisations know the noise level."""
    return ConfigDict({"name": "ncsn", "nf": 128, "num_scales": num_scales})


def ncsnv2(resolution: int) -> ConfigDict:
    """NCSNv2 for images of 64, 128 or 256 pixels: knows the noise level by division only."""
    return ConfigDict({"name": "ncsnv2", "nf": 128, "resolution": resolution})


def wideresnet(**options: Any) -> ConfigDict:
    """The classifier of noisy images, WRN-28-10 for 10 classes: 38,913,242 parameters."""
    return ConfigDict(
        {
            "name": "wideresnet",
            "num_outputs": 10,
            "blocks_per_group": 4,
            "channel_multiplier": 10,
            "fourier_scale": 16.0,
            **options,
        }
    )

"""Images on the host: decoding a file and fitting it to one size. Pixels are uint8, (H, W, C).

Fitting takes at most two steps, both on the bytes as stored:
1. a centred crop: to `crop` by `crop` pixels if that is given (140 for the published CelebA runs),
   else, where a size is asked for, to the largest centred window with the size's proportions;
2. a resize to `size` by Pillow's bicubic filter, whose support grows when it shrinks an image
   (antialiased), rounded to uint8 and clipped.
An image that has the right size already passes untouched, bit for bit.
"""

from pathlib import Path

import numpy as np

from diffjax.core.checks import at_least
from diffjax.data.extras import require

Size = tuple[int, int]  # (height, width)

# Pillow's modes of 8 bits a channel, with the mode that they are read as.
_READ_AS = {
    "1": "L", "L": "L", "RGB": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "RGBA": "RGBA",
}  # fmt: skip
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_MODES = {channels: mode for mode, channels in _CHANNELS.items()}


def read_image(path: Path, channels: int | None = None) -> np.ndarray:
    """Decodes one PNG, JPEG or other file that Pillow knows: uint8, (H, W, C).

    channels: 1 (grey), 3 (RGB) or 4 (RGBA) converts; None keeps the file's own (a palette and CMYK
    become RGB). Raises ValueError for an unreadable file or one without 8-bit channels.
    """
    pillow = require("PIL.Image")
    if channels is not None and channels not in _MODES:
        raise ValueError(f"channels must be 1, 3, 4 or None (the file's own); got {channels}.")
    try:
        with pillow.open(path) as image:
            if image.mode not in _READ_AS:
                raise ValueError(
                    f"Images must have 8 bits a channel (grey, RGB or RGBA); {path} has Pillow's "
                    f"mode {image.mode!r}. Convert the file first."
                )
            mode = _READ_AS[image.mode] if channels is None else _MODES[channels]
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError) as error:  # Pillow reports broken PNGs as SyntaxError
        raise ValueError(
            f"{path} cannot be read as an image ({error}). Repair or remove the file."
        ) from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def fit(image: np.ndarray, size: Size | None, crop: int | None) -> np.ndarray:
    """Crops and resizes as the module says. image: uint8, (H, W, C); returns uint8 of size.

    Raises ValueError where the image is smaller than `crop`.
    """
    height, width = image.shape[:2]
    if crop is not None:
        if min(height, width) < crop:
            raise ValueError(
                f"crop must not exceed the image; got crop {crop} for {height} x {width} pixels. "
                "Leave such images out or choose a smaller crop."
            )
        image = _centre(image, (crop, crop))
    elif size is not None and (height, width) != size:
        scale = min(height / size[0], width / size[1])
        image = _centre(image, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
    if size is None or image.shape[:2] == size:
        return image
    pillow = require("PIL.Image")
    grey = image.shape[2] == 1
    resized = np.asarray(
        pillow.fromarray(image[..., 0] if grey else image).resize(
            (size[1], size[0]), pillow.Resampling.BICUBIC
        )
    )
    return resized[..., None] if grey else resized


def as_size(size: int | Size | None) -> Size | None:
    """(height, width) from one number, a pair or None. Raises for anything else."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"size must be one number or (height, width); got {size!r}.")
    for edge in pair:
        at_least("size", edge, 1)
    return pair


def _centre(image: np.ndarray, window: Size) -> np.ndarray:
    """The centred window of that (height, width)."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape[:2], window, strict=True))
    return image[top : top + window[0], left : left + window[1]]

"""Pictures for people: grids of images, the denoising path, the loss curve. All written whole."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core.files import write_atomic


def to_bytes(images: np.ndarray, levels: int) -> np.ndarray:
    """Levels 0 .. levels-1 stretched to 0 .. 255, uint8."""
    return np.round(np.arange(levels) * 255 / (levels - 1)).astype(np.uint8)[images]


def to_levels(shown: np.ndarray, levels: int) -> np.ndarray:
    """What `to_bytes` made these bytes of."""
    return np.round(np.arange(256) * (levels - 1) / 255).astype(np.uint8)[shown]


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """uint8 images (N, H, W, C) tiled row by row, (H', W', C), white gaps between them."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(path: str | Path, image: np.ndarray, *, least: int = 256) -> None:
    """A uint8 image (H, W, C) as PNG, enlarged by whole pixels until it is about `least` wide."""
    from PIL import Image

    factor = max(1, round(least / image.shape[1]))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    if image.shape[-1] == 1:
        image = image[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def denoising_path(frames: np.ndarray, times: Sequence[float]) -> Any:
    """A figure: one row a sample, one column a time, from noise to image.

    frames: uint8 (T, N, H, W, C). times: (T,).
    """
    figure, axes = _subplots(frames.shape[1], frames.shape[0], (frames.shape[0], frames.shape[1]))
    for row in range(frames.shape[1]):
        for column in range(frames.shape[0]):
            axis = axes[row][column]
            axis.imshow(_shown(frames[column, row]), cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(f"t = {times[column]:.2g}", fontsize=8)
    return figure


def curves(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    """A figure of some columns of metrics.jsonl against the step."""
    figure, axes = _subplots(1, 1, (6, 4))
    axis = axes[0][0]
    for name in names:
        points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_yscale("log")
    axis.legend()
    return figure


def write_figure(path: str | Path, figure: Any) -> None:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # The figure class rather than pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _shown(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[-1] == 1 else image

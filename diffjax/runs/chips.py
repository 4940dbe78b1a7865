"""What the makers say of the chips that `plan` knows: rates, memory, links.

All rates are peaks and dense (no structured sparsity), so a time that follows from them is the
least possible. Bandwidths between chips are what one chip can send, in one direction, over all its
links together: half of a "bidirectional" or NVLink figure. Bytes are counted in powers of ten, as
the makers do, except where they say GiB, and for the memory of TPUs: libtpu 0.0.52 gives programs
30.75 GiB of v4's 32, 15.75 of v5e's 16, 95.73 of v5p's 95 and 31.24 of v6e's 32.

The figures of TPUs were compared with the pages below; those of NVIDIA's chips with copies of its
data sheets that others keep, not with its own pages.

float32: the rate of float32 operands at JAX's default precision, which is one pass of bfloat16 on a
TPU and TF32 on a GPU.

References:
  [v4] "TPU v4", Google Cloud documentation, https://cloud.google.com/tpu/docs/v4.
  [v4 links] Jouppi et al., "TPU v4: An optically reconfigurable supercomputer for machine learning
    with hardware support for embeddings", 2023, https://arxiv.org/abs/2304.01433, table 4: six
    links of 50 GB/s.
  [v5e] "TPU v5e", Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/v5e.
  [v5p] "TPU v5p", Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/v5p.
  [v6e] "TPU v6e", Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/v6e.
  [A100] "NVIDIA A100 Tensor Core GPU" (data sheet), https://www.nvidia.com/en-us/data-center/a100/.
  [DGX A100] "NVIDIA DGX A100" (data sheet), eight 200 Gb/s ports for eight chips,
    https://www.nvidia.com/en-us/data-center/dgx-a100/.
  [H100] "NVIDIA H100 Tensor Core GPU", https://www.nvidia.com/en-us/data-center/h100/; the page has
    1,979 TFLOP/s with sparsity, half of it dense.
  [H200] "NVIDIA H200 Tensor Core GPU", https://www.nvidia.com/en-us/data-center/h200/.
  [DGX H100] "NVIDIA DGX H100" (data sheet), eight 400 Gb/s ports for eight chips,
    https://www.nvidia.com/en-us/data-center/dgx-h100/.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One kind of accelerator.

    bfloat16, float32: FLOP/s. memory: bytes. bandwidth: bytes/s of the memory. link: bytes/s that
    a chip sends to others of its domain, the `domain` chips that the fast links join. network:
    bytes/s that it sends beyond; None where the maker gives no figure. sources: the references
    above.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float | None
    sources: tuple[str, ...]


_V4 = (
    "TPU v4, https://cloud.google.com/tpu/docs/v4",
    "TPU v4: An optically reconfigurable supercomputer, https://arxiv.org/abs/2304.01433",
)
_V5E = ("TPU v5e, https://docs.cloud.google.com/tpu/docs/v5e",)
_V5P = ("TPU v5p, https://docs.cloud.google.com/tpu/docs/v5p",)
_V6E = ("TPU v6e, https://docs.cloud.google.com/tpu/docs/v6e",)
_A100 = (
    "NVIDIA A100 Tensor Core GPU, https://www.nvidia.com/en-us/data-center/a100/",
    "NVIDIA DGX A100, https://www.nvidia.com/en-us/data-center/dgx-a100/",
)
_DGX_H100 = "NVIDIA DGX H100, https://www.nvidia.com/en-us/data-center/dgx-h100/"
_H100 = (
    "NVIDIA H100 Tensor Core GPU, https://www.nvidia.com/en-us/data-center/h100/",
    _DGX_H100,
)
_H200 = (
    "NVIDIA H200 Tensor Core GPU, https://www.nvidia.com/en-us/data-center/h200/",
    _DGX_H100,
)

# fmt: off
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        #    name       bfloat16 float32  memory    bandwidth link    domain network  sources
        Chip("tpu-v4",  275e12,  275e12,  32 * GIB, 1.200e12, 300e9,  4096,  None,    _V4),
        Chip("tpu-v5e", 197e12,  197e12,  16 * GIB, 0.819e12, 200e9,  256,   3.125e9, _V5E),
        Chip("tpu-v5p", 459e12,  459e12,  95 * GIB, 2.765e12, 600e9,  6144,  6.25e9,  _V5P),
        Chip("tpu-v6e", 918e12,  918e12,  32 * GIB, 1.600e12, 400e9,  256,   12.5e9,  _V6E),
        Chip("a100",    312e12,  156e12,  80e9,     2.039e12, 300e9,  8,     25e9,    _A100),
        Chip("h100",    989e12,  494e12,  80e9,     3.350e12, 450e9,  8,     50e9,    _H100),
        Chip("h200",    989e12,  494e12,  141e9,    4.800e12, 450e9,  8,     50e9,    _H200),
    )
}
# fmt: on

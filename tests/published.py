"""The 39 configs of the Score-SDE reference repository, transcribed from what its code receives.

RUNS   process; continuous times; the loss a mean (T) or half a sum (F); thousands of updates;
       batch; num_scales; averaging rate; learning rate; warm-up; clipping (-1: none); predictor
       (EM Euler-Maruyama, RD reverse diffusion, AN ancestral); corrector (LG Langevin, ALD
       annealed); snr; corrector steps; data and pixels
NETS   network; nf; ch_mult; num_res_blocks; dropout; resamp_with_conv; conditional; fir;
       skip_rescale; blocks; progressive / progressive_input / progressive_combine; embedding
       (*: the network has but one); sigma_max; scale_by_sigma; parameters

"-" stands where the network has no such option. Two faults of the files are mended here as they
were meant: ve/ncsn/celeba has no process, ve/ncsnv2/bedroom misspells that it is discrete.
"""

RUNS = """
subvp/cifar10_ddpm_continuous        subvp T T 1300k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
subvp/cifar10_ddpmpp_continuous      subvp T T 1300k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
subvp/cifar10_ddpmpp_deep_continuous subvp T T  950k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
subvp/cifar10_ncsnpp_continuous      subvp T T 1300k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
subvp/cifar10_ncsnpp_deep_continuous subvp T T  950k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
ve/bedroom_ncsnpp_continuous         ve    T F 2400k  64 2000  0.999 0.0002 5000  1   RD   LG 0.075   1  lsun/bedroom 256
ve/celeba_ncsnpp                     ve    F F 1300k 128 1000  0.999 0.0002 5000  1   RD   LG  0.17   1  celeb_a 64
ve/celebahq_256_ncsnpp_continuous    ve    T F 2400k  64 2000  0.999 0.0002 5000  1   RD   LG 0.075   1  celebahq 256
ve/celebahq_ncsnpp_continuous        ve    T F 2400k   8 2000 0.9999 0.0002 5000  1   RD   LG  0.15   1  celebahq 1024
ve/church_ncsnpp_continuous          ve    T F 2400k  64 2000  0.999 0.0002 5000  1   RD   LG 0.075   1  lsun/church_outdoor 256
ve/cifar10_ddpm                      ve    F F 1300k 128 1000  0.999 0.0002 5000  1   RD   LG  0.16   1  cifar10 32
ve/cifar10_ncsnpp                    ve    F F 1300k 128 1000  0.999 0.0002 5000  1   RD   LG  0.16   1  cifar10 32
ve/cifar10_ncsnpp_continuous         ve    T F 1300k 128 1000  0.999 0.0002 5000  1   RD   LG  0.16   1  cifar10 32
ve/cifar10_ncsnpp_deep_continuous    ve    T F  950k 128 1000  0.999 0.0002 5000  1   RD   LG  0.16   1  cifar10 32
ve/ffhq_256_ncsnpp_continuous        ve    T F 2400k  64 2000  0.999 0.0002 5000  1   RD   LG 0.075   1  ffhq 256
ve/ffhq_ncsnpp_continuous            ve    T T 2400k   8 2000 0.9999 0.0002 5000  1   RD   LG  0.15   1  ffhq 1024
ve/ncsn/celeba                       ve    F F 1300k 128   10    0.0  0.001    0 -1 none  ALD 0.316 100  celeb_a 64
ve/ncsn/celeba_124                   ve    F F 1300k 128  500    0.0  0.001    0 -1 none  ALD 0.128   5  celeb_a 64
ve/ncsn/celeba_1245                  ve    F F 1300k 128  500  0.999  0.001    0 -1 none  ALD 0.128   5  celeb_a 64
ve/ncsn/celeba_5                     ve    F F 1300k 128   10  0.999  0.001    0 -1 none  ALD 0.316 100  celeb_a 64
ve/ncsn/cifar10                      ve    F F 1300k 128   10    0.0  0.001    0 -1 none  ALD 0.316 100  cifar10 32
ve/ncsn/cifar10_124                  ve    F F 1300k 128  232    0.0  0.001    0 -1 none  ALD 0.176   5  cifar10 32
ve/ncsn/cifar10_1245                 ve    F F 1300k 128  232  0.999  0.001    0 -1 none  ALD 0.176   5  cifar10 32
ve/ncsn/cifar10_5                    ve    F F 1300k 128   10  0.999  0.001    0 -1 none  ALD 0.316 100  cifar10 32
ve/ncsnv2/bedroom                    ve    F F 2400k 128 1086 0.9999 0.0001    0 -1 none  ALD 0.095   3  lsun/bedroom 128
ve/ncsnv2/celeba                     ve    F F 1300k 128  500  0.999 0.0001    0 -1 none  ALD 0.128   5  celeb_a 64
ve/ncsnv2/cifar10                    ve    F F 1300k 128  232  0.999 0.0001    0 -1 none  ALD 0.176   5  cifar10 32
vp/cifar10_ddpmpp                    vp    F T 1300k 128 1000 0.9999 0.0002 5000  1   AN none  0.16   1  cifar10 32
vp/cifar10_ddpmpp_continuous         vp    T T 1300k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
vp/cifar10_ddpmpp_deep_continuous    vp    T T  950k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
vp/cifar10_ncsnpp                    vp    F T 1300k 128 1000 0.9999 0.0002 5000  1   RD none  0.16   1  cifar10 32
vp/cifar10_ncsnpp_continuous         vp    T T 1300k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
vp/cifar10_ncsnpp_deep_continuous    vp    T T  950k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
vp/ddpm/bedroom                      vp    F T 2400k  64 1000 0.9999  2e-05 5000  1   AN none 0.075   1  lsun/bedroom 256
vp/ddpm/celebahq                     vp    F T 2400k  64 1000 0.9999  2e-05 5000  1   AN none 0.075   1  celebahq 256
vp/ddpm/church                       vp    F T 2400k  64 1000 0.9999  2e-05 5000  1   AN none 0.075   1  lsun/church_outdoor 256
vp/ddpm/cifar10                      vp    F T 1300k 128 1000 0.9999 0.0002 5000  1   AN none  0.16   1  cifar10 32
vp/ddpm/cifar10_continuous           vp    T T 1300k 128 1000 0.9999 0.0002 5000  1   EM none  0.16   1  cifar10 32
vp/ddpm/cifar10_unconditional        vp    F T 1300k 128 1000 0.9999 0.0002 5000  1   AN none  0.16   1  cifar10 32
"""

NETS = """
subvp/cifar10_ddpm_continuous        ddpm       128 (1,2,2,2)              2 0.1 T T - - -      -                           positional* 50   F  35,218,947
subvp/cifar10_ddpmpp_continuous      ncsnpp     128 (1,2,2,2)              4 0.1 T T F T biggan none/none/sum               positional  50   F  61,804,419
subvp/cifar10_ddpmpp_deep_continuous ncsnpp     128 (1,2,2,2)              8 0.1 T T F T biggan none/none/sum               positional  50   F  106,632,579
subvp/cifar10_ncsnpp_continuous      ncsnpp     128 (1,2,2,2)              4 0.1 T T T T biggan none/residual/sum           positional  50   F  62,693,251
subvp/cifar10_ncsnpp_deep_continuous ncsnpp     128 (1,2,2,2)              8 0.1 T T T T biggan none/residual/sum           positional  50   F  107,521,411
ve/bedroom_ncsnpp_continuous         ncsnpp     128 (1,1,2,2,2,2,2)        2 0   T T T T biggan output_skip/input_skip/sum  fourier16   378  T  65,574,549
ve/celeba_ncsnpp                     ncsnpp     128 (1,2,2,2)              4 0.1 T T T T biggan none/residual/sum           positional  90   T  62,693,251
ve/celebahq_256_ncsnpp_continuous    ncsnpp     128 (1,1,2,2,2,2,2)        2 0   T T T T biggan output_skip/input_skip/sum  fourier16   348  T  65,574,549
ve/celebahq_ncsnpp_continuous        ncsnpp     16  (1,2,4,8,16,32,32,32)  1 0   T T T T biggan output_skip/input_skip/sum  fourier16   1348 T  105,785,896
ve/church_ncsnpp_continuous          ncsnpp     128 (1,1,2,2,2,2,2)        2 0   T T T T biggan output_skip/input_skip/sum  fourier16   380  T  65,574,549
ve/cifar10_ddpm                      ddpm       128 (1,2,2,2)              2 0.1 T T - - -      -                           positional* 50   T  35,218,947
ve/cifar10_ncsnpp                    ncsnpp     128 (1,2,2,2)              4 0.1 T T T T biggan none/residual/sum           positional  50   T  62,693,251
ve/cifar10_ncsnpp_continuous         ncsnpp     128 (1,2,2,2)              4 0.1 T T T T biggan none/residual/sum           fourier16   50   T  62,758,915
ve/cifar10_ncsnpp_deep_continuous    ncsnpp     128 (1,2,2,2)              8 0.1 T T T T biggan none/residual/sum           fourier16   50   T  107,587,075
ve/ffhq_256_ncsnpp_continuous        ncsnpp     128 (1,1,2,2,2,2,2)        2 0   T T T T biggan output_skip/input_skip/sum  fourier16   348  T  65,574,549
ve/ffhq_ncsnpp_continuous            ncsnpp     16  (1,2,4,8,16,32,32,32)  1 0   T T T T biggan output_skip/input_skip/sum  fourier16   1348 T  105,785,896
ve/ncsn/celeba                       ncsn       128 -                      - 0.1 - - - - -      -                           label*      1    F  34,428,675
ve/ncsn/celeba_124                   ncsn       128 -                      - 0.1 - - - - -      -                           label*      90   F  57,384,195
ve/ncsn/celeba_1245                  ncsn       128 -                      - 0.1 - - - - -      -                           label*      90   F  57,384,195
ve/ncsn/celeba_5                     ncsn       128 -                      - 0.1 - - - - -      -                           label*      1    F  34,428,675
ve/ncsn/cifar10                      ncsn       128 -                      - 0.1 - - - - -      -                           label*      1    F  34,428,675
ve/ncsn/cifar10_124                  ncsn       128 -                      - 0.1 - - - - -      -                           label*      50   F  44,828,931
ve/ncsn/cifar10_1245                 ncsn       128 -                      - 0.1 - - - - -      -                           label*      50   F  44,828,931
ve/ncsn/cifar10_5                    ncsn       128 -                      - 0.1 - - - - -      -                           label*      1    F  34,428,675
ve/ncsnv2/bedroom                    ncsnv2_128 128 -                      - 0   - - - - -      -                           label*      190  T  83,445,379
ve/ncsnv2/celeba                     ncsnv2_64  128 -                      - 0.1 - - - - -      -                           label*      90   T  33,970,563
ve/ncsnv2/cifar10                    ncsnv2_64  128 -                      - 0.1 - - - - -      -                           label*      50   T  33,970,563
vp/cifar10_ddpmpp                    ncsnpp     128 (1,2,2,2)              4 0.1 T T F T biggan none/none/sum               positional  50   F  61,804,419
vp/cifar10_ddpmpp_continuous         ncsnpp     128 (1,2,2,2)              4 0.1 T T F T biggan none/none/sum               positional  50   F  61,804,419
vp/cifar10_ddpmpp_deep_continuous    ncsnpp     128 (1,2,2,2)              8 0.1 T T F T biggan none/none/sum               positional  50   F  106,632,579
vp/cifar10_ncsnpp                    ncsnpp     128 (1,2,2,2)              4 0.1 T T T T biggan none/residual/sum           positional  50   F  62,693,251
vp/cifar10_ncsnpp_continuous         ncsnpp     128 (1,2,2,2)              4 0.1 T T T T biggan none/residual/sum           positional  50   F  62,693,251
vp/cifar10_ncsnpp_deep_continuous    ncsnpp     128 (1,2,2,2)              8 0.1 T T T T biggan none/residual/sum           positional  50   F  107,521,411
vp/ddpm/bedroom                      ddpm       128 (1,1,2,2,4,4)          2 0   T T - - -      -                           positional* 378  F  111,569,923
vp/ddpm/celebahq                     ddpm       128 (1,1,2,2,4,4)          2 0   T T - - -      -                           positional* 378  F  111,569,923
vp/ddpm/church                       ddpm       128 (1,1,2,2,4,4)          2 0   T T - - -      -                           positional* 378  F  111,569,923
vp/ddpm/cifar10                      ddpm       128 (1,2,2,2)              2 0.1 T T - - -      -                           positional* 50   F  35,218,947
vp/ddpm/cifar10_continuous           ddpm       128 (1,2,2,2)              2 0.1 T T - - -      -                           positional* 50   F  35,218,947
vp/ddpm/cifar10_unconditional        ddpm       128 (1,2,2,2)              2 0.1 T F - - -      -                           none*       50   F  32,329,347
"""

# The same in all of them, under our names.
COMMON = {
    "seed": 42,
    "loss.times.stratified": False,
    "loss.weight.name": "simple",  # likelihood_weighting False
    "optim.optimizer": "Adam",
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    "optim.decay": "constant",
    "optim.moment_dtype": "float32",
    "training.accumulate": 1,
    "training.keep.newest": 2,
    "training.keep.best": 0,  # the reference keeps none by a figure
    "training.keep.metric": "eval_loss",
    "training.init_from": "",
    "training.on_divergence": "stop",
    "training.divergence_limit": 10,
    "model.dtype": "float32",
    "model.remat": False,  # costs time, changes no number
    "ema.name": "constant",
    "ema.offload": False,
    "mesh.data": -1,  # all devices, as the reference's
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "data.workers": 0,  # how batches are read ahead changes none
    "data.ahead": 2,
    "data.placed": 1,
    "training.log_freq": 50,
    "training.eval_freq": 100,
    "training.snapshot_freq": 50_000,
    "training.snapshot_sampling": True,
    "sampling.grid.name": "uniform",
    "sampling.final": "tweedie",  # noise_removal True
    "eval.num_samples": 50_000,
    "eval.tolerance": 1e-5,  # rtol and atol of the likelihood's ODE
    "data.num_channels": 3,
    "data.levels": 256,
    "data.random_flip": True,
    "data.uniform_dequantization": False,
    "data.train_split": "train",
}

_PREDICTORS = {"EM": "euler_maruyama", "RD": "reverse_diffusion", "AN": "ancestral", "none": "none"}
_CORRECTORS = {"LG": "langevin", "ALD": "ald", "none": "none"}


def _rows(table: str) -> dict[str, list[str]]:
    lines = (line.split() for line in table.strip().splitlines())
    return {name: rest for name, *rest in lines}


def names() -> list[str]:
    """The configs of the table."""
    return list(_rows(RUNS))


def parameters(name: str) -> int:
    """The size of the network."""
    return int(_rows(NETS)[name][-1].replace(",", ""))


def expected(name: str) -> dict:
    """Every field of a config as it must be, flat."""
    return COMMON | _run(_rows(RUNS)[name], _rows(NETS)[name]) | _net(name)


def _run(row: list[str], net: list[str]) -> dict:
    sde, continuous, mean, k, batch, scales, ema, lr, warmup, clip, *rest = row
    predictor, corrector, snr, n_steps, dataset, pixels = rest
    pixels, scales, discrete = int(pixels), int(scales), continuous == "F"
    huge = pixels == 1024
    found = {
        "loss.reduce": "mean" if mean == "T" else "half_sum",
        "optim.lr": float(lr),
        "optim.warmup": int(warmup),
        "optim.grad_clip": float(clip),
        "ema.rate": float(ema),
        "training.batch_size": int(batch),
        "training.n_iters": int(k.removesuffix("k")) * 1000 + 1,
        "training.n_jitted_steps": 1 if huge else 5,
        "training.snapshot_freq_for_preemption": 10_000 if pixels < 128 else 5_000,
        "eval.batch_size": 512 if pixels in (128, 256) else 1024,
        # N calls: N - 1 intervals, and the denoised image.
        "sampling.steps": scales - 1,
        "sampling.grid.end": 1e-5 if sde == "ve" else 1e-3,
        "data.centered": sde != "ve",
    }
    found |= _data(dataset, pixels)
    found |= _process(sde, discrete, scales, float(net[-3]))
    if corrector == "none":
        found["sampling.solver.name"] = _PREDICTORS[predictor]
        if predictor == "AN":
            found["sampling.solver.variance"] = "large"  # the added noise has variance beta
        return found
    return found | {
        "sampling.solver.name": "pc",
        "sampling.solver.predictor": _PREDICTORS[predictor],
        "sampling.solver.corrector": _CORRECTORS[corrector],
        "sampling.solver.snr": float(snr),
        "sampling.solver.n_steps_each": int(n_steps),
    }


def _process(sde: str, discrete: bool, scales: int, sigma_max: float) -> dict:
    """The forward process, what the network is told of it, and the times of the loss."""
    found: dict = {"loss.times.name": "discrete" if discrete else "uniform"}  # t ~ U(1e-5, 1)
    if discrete:
        found["loss.times.levels"] = scales
    if sde == "ve":
        found |= {"process.name": "ve", "process.sigma_min": 0.01, "process.sigma_max": sigma_max}
        found["precondition.name"] = "score_sde_ve"
        if discrete:  # levels at both ends of [0, 1]
            found |= {"precondition.levels": scales, "loss.times.placement": "ends"}
        return found
    found |= {"process.beta_min": 0.1, "process.beta_max": 20.0}
    if discrete:
        levels = {"process.n": scales, "precondition.levels": scales}
        return found | levels | {"process.name": "ddpm", "precondition.name": "ddpm"}
    return found | {"process.name": sde, "precondition.name": "score_sde_vp"}


def _data(dataset: str, pixels: int) -> dict:
    found = {"data.image_size": pixels}
    if dataset in ("celebahq", "ffhq"):
        paths = {"data.train_path": dataset, "data.eval_path": dataset, "data.eval_split": "eval"}
        return found | paths | {"data.name": "folder", "data.size": pixels, "data.labels": False}
    found |= {"data.name": "tfds", "data.dataset": dataset}
    found["data.eval_split"] = "test" if dataset == "cifar10" else "validation"
    if dataset == "celeb_a":
        found |= {"data.crop": 140, "data.size": pixels}
    if dataset.startswith("lsun"):
        found["data.size"] = pixels
    return found


def _net(name: str) -> dict:
    """The model section: what has an effect in that network."""
    kind, nf, ch_mult, blocks, dropout, conv, conditional, fir, rescale, *rest = _rows(NETS)[name]
    block, pyramids, embedding, sigma_max, by_sigma, _ = rest
    sde, continuous, *_ = _rows(RUNS)[name]
    scales = int(_rows(RUNS)[name][5])
    found: dict = {"name": kind, "nf": int(nf)}
    if kind.startswith("ncsnv2"):
        found |= {"name": "ncsnv2", "resolution": int(kind.removeprefix("ncsnv2_"))}
    if kind == "ncsn":
        found["num_scales"] = scales
    if kind in ("ddpm", "ncsnpp"):
        found |= {
            "ch_mult": [int(m) for m in ch_mult.strip("()").split(",")],
            "num_res_blocks": int(blocks),
            "attn_resolutions": [16],
            "dropout": float(dropout),
            "resamp_with_conv": conv == "T",
            "conditional": conditional == "T",
        }
    if kind == "ncsnpp":
        out, into, combine = pyramids.split("/")
        found |= {
            "skip_rescale": rescale == "T",
            "resblock_type": block,
            "progressive": out,
            "progressive_input": into,
            "progressive_combine": combine,
            "init_scale": 0.0,
            "fir": fir == "T",
            "embedding_type": embedding.rstrip("0123456789"),
        }
        if fir == "T":
            found["fir_kernel"] = [1, 3, 3, 1]
        if embedding.startswith("fourier"):
            found["fourier_scale"] = float(embedding.removeprefix("fourier"))
    if sde == "ve":
        found["centered"] = False  # the network maps [0, 1] to [-1, 1]
    if by_sigma == "T":
        found["scale_by_sigma"] = True
        if continuous == "F":  # the label is a level's number
            levels = {"sigma_min": 0.01, "sigma_max": float(sigma_max), "num_scales": scales}
            found |= levels
    return {f"model.{field}": value for field, value in found.items()}

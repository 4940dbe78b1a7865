"""From a config to objects: the only room that reads configs.

A config is an `ml_collections.ConfigDict` of sections. A section names a member of a family and
gives its arguments:

    config.process = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0}

Each family is one explicit dict in these files. `name` may also be "package.module:callable": it is
called with the section's other fields, so your own nets, processes and data need no change here. An
argument that the callable does not take raises, with the nearest name it does take.

Fields of sections that are no arguments of a member:

    model.dtype         "float32" (default), "bfloat16" or "float16": what the network computes in.
                        Weights, averages, gradients, normalisation, softmax, sums, losses and
                        solvers stay in float32. float16 also scales the loss in training.
    model.remat         True recomputes each block in the backward pass: less memory, more time
    model.scan          of dit and sit: True runs the blocks as one loop over their stacked weights,
                        which with mesh.fsdp are fetched one block at a time
    optim.loss_scale    {"initial": 2.0**15, "period": 2000}, optional, of float16 only
    optim.moment_dtype  "float32" or "bfloat16": Adam's first moment; the second stays float32
    training.accumulate micro-batches of an update; batch_size is that of the update
    training.keep       newest: so many of the newest checkpoints stay; best: so many of the lowest
                        `metric`, "eval_loss" or "loss", too; snapshot_freq says what stays for good
    training.on_divergence
                        "stop", "skip" or "rollback": what is done where the loss or its gradient is
                        not finite; see `diffjax.runs.divergence`
    training.divergence_limit
                        so many skipped in a row, or rollbacks to one checkpoint, are borne
    training.init_from  WORKDIR or WORKDIR:STEP, whose averaged weights a run begins with; or ""
    mesh                devices along "data", "fsdp" and "tensor", -1 for the rest; optional fields
                        rules and min_size: see `builders.mesh`
    ema                 the average "main", which is sampled and measured: "constant", "warmup",
                        "half_life" or "power"; optional fields of it:
    ema.others          {name: section}, further averages, for `--ema=name` and `diffjax ema`
    ema.offload         True keeps all averages in the host's memory between updates
"""

from diffjax.builders.data import build_reading, build_source
from diffjax.builders.keep import build_keep
from diffjax.builders.make import BuildError, make
from diffjax.builders.mesh import build_fetching, build_mesh, build_sharding
from diffjax.builders.model import (
    LEARNED_VARIANCES,
    NETS,
    PRECONDITIONS,
    PROCESSES,
    Parts,
    build_parts,
    build_quantisation,
)
from diffjax.builders.probes import build_probes
from diffjax.builders.sampling import (
    CORRECTORS,
    FINALS,
    GRIDS,
    PREDICTORS,
    SOLVERS,
    Sampling,
    build_sampling,
    with_tolerances,
)
from diffjax.builders.training import (
    REDUCES,
    TIMES,
    WEIGHTS,
    build_accumulate,
    build_augment,
    build_ema,
    build_loss,
    build_offload,
    build_optimizer,
    build_prepare,
    build_times,
    is_classifier,
)

__all__ = [
    "CORRECTORS",
    "FINALS",
    "GRIDS",
    "LEARNED_VARIANCES",
    "NETS",
    "PRECONDITIONS",
    "PREDICTORS",
    "PROCESSES",
    "REDUCES",
    "SOLVERS",
    "TIMES",
    "WEIGHTS",
    "BuildError",
    "Parts",
    "Sampling",
    "build_accumulate",
    "build_augment",
    "build_ema",
    "build_fetching",
    "build_keep",
    "build_loss",
    "build_mesh",
    "build_offload",
    "build_optimizer",
    "build_parts",
    "build_prepare",
    "build_probes",
    "build_quantisation",
    "build_reading",
    "build_sampling",
    "build_sharding",
    "build_source",
    "build_times",
    "is_classifier",
    "make",
    "with_tolerances",
]

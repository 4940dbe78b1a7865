"""Several checkpoints of a run: which ones, and their figures side by side.

eval/checkpoints.json holds {step: {metric: figures}} of `diffjax evaluate --checkpoints=all`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffjax.core.files import write_atomic
from diffjax.runs import hosts
from diffjax.runs.evaluate import evaluate
from diffjax.runs.evaluation import Figures
from diffjax.runs.workdir import RunError, read_config


def chosen(workdir: str | Path, which: str) -> list[int]:
    """The steps of "all" checkpoints, or of the "best": the lowest config.training.keep.metric.

    Raises RunError for another word, and where no checkpoint has that figure.
    """
    from diffjax.train.checkpoint import Checkpointer

    if which not in ("all", "best"):
        raise RunError(
            f"--checkpoints must be all or best; got {which!r}. --step=N is one of them."
        )
    metric = read_config(workdir).training.keep.metric
    with Checkpointer(workdir, writable=False) as checkpointer:
        steps, figures = checkpointer.steps(), checkpointer.figures(metric)
    if which == "all":
        return steps
    if not figures:
        raise RunError(
            f"No checkpoint of {workdir} has the figure {metric}; it holds steps {steps}. One is "
            "saved with it where snapshot_freq_for_preemption is a multiple of eval_freq."
        )
    return [min(figures, key=lambda step: (figures[step], -step))]


def evaluate_each(
    workdir: str | Path, metrics: Sequence[str], which: Sequence[int], **options: Any
) -> dict[int, dict[str, Figures]]:
    """`evaluate` of each step in `which`, the oldest first; all go to eval/checkpoints.json.

    eval/<metric>.json is of the newest of them. options: those of `evaluate`.
    """
    found = {}
    for step in sorted(which):
        found[step] = evaluate(workdir, metrics, step=step, **options)
        if hosts.is_first():
            path = Path(workdir) / "eval" / "checkpoints.json"
            write_atomic(path, json.dumps(found, indent=2) + "\n")
    return found

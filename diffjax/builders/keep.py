"""Which checkpoints a config keeps."""

from typing import Any

from diffjax.builders.make import BuildError


def build_keep(config: Any) -> dict[str, Any]:
    """The rules for `train.checkpoint.Checkpointer`: keep, keep_every, best. Raises BuildError.

    config.training.keep: newest, how many of the newest; best, how many of those with the lowest
    `metric`, "eval_loss" or "loss". Those at multiples of config.training.snapshot_freq stay for
    good.
    """
    from diffjax.train.keep import Best

    training = config.training
    section = dict(training.keep)
    unknown = section.keys() - {"newest", "best", "metric"}
    if unknown:
        raise BuildError(
            f"config.training.keep has newest, best and metric; got {sorted(unknown)[0]!r}."
        )
    newest, best = section.get("newest", 2), section.get("best", 0)
    if newest < 1 or best < 0:
        raise BuildError(
            "config.training.keep.newest must be at least 1, and keep.best at least 0; got "
            f"{newest} and {best}."
        )
    rules = {"keep": newest, "keep_every": training.snapshot_freq, "best": None}
    if not best:
        return rules
    metric = section.get("metric", "eval_loss")
    written = {"eval_loss": "eval_freq", "loss": "log_freq"}
    if metric not in written:
        raise BuildError(
            f"config.training.keep.metric must be one of {', '.join(written)}; got {metric!r}."
        )
    every, field = training.snapshot_freq_for_preemption, written[metric]
    if every % training[field]:
        raise BuildError(
            f"config.training.snapshot_freq_for_preemption = {every} must be a multiple of "
            f"{field} = {training[field]}: a checkpoint without {metric} is none of the best."
        )
    return rules | {"best": Best(metric, best)}

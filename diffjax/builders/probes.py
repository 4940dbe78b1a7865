"""What a config's training step reports beside its loss."""

from typing import Any

from diffjax.builders.training import is_classifier


def build_probes(config: Any) -> Any:
    """The probes of the step: all of `train.probes`; a classifier's has no output of x's shape."""
    from diffjax.train import probes

    images = [probes.ByNoise("loss")]
    if not is_classifier(config):
        images.append(probes.ByNoise("output_rms"))
    updates = (probes.group_norms, probes.update_ratio, probes.ema_gap)
    return probes.Probes(tuple(images), updates)

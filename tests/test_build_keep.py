"""Which checkpoints a config keeps."""

import pytest

from diffjax import builders
from diffjax.runs.workdir import load_config
from diffjax.train.keep import Best


def config(**training):
    found = load_config("digits").copy_and_resolve_references().unlock()
    found.training.update({"snapshot_freq": 700} | training)
    return found


def test_by_default_the_newest_two_and_every_kth():
    assert builders.build_keep(config()) == {"keep": 2, "keep_every": 700, "best": None}


def test_the_best_by_a_figure_that_every_checkpoint_has():
    kept = config(eval_freq=50, snapshot_freq_for_preemption=150, log_freq=75)
    kept.training.keep.update({"best": 3, "newest": 1})
    assert builders.build_keep(kept)["best"] == Best("eval_loss", 3)
    kept.training.keep.metric = "loss"
    assert builders.build_keep(kept) == {"keep": 1, "keep_every": 700, "best": Best("loss", 3)}


@pytest.mark.parametrize(
    ("keep", "training", "message"),
    [
        ({"newest": 0}, {}, "newest must be at least 1.*got 0"),
        ({"best": -1}, {}, "keep.best at least 0; got 2 and -1"),
        ({"best": 1, "metric": "fid"}, {}, "must be one of eval_loss, loss; got 'fid'"),
        ({"best": 1}, {"eval_freq": 40}, "= 100 must be a multiple of eval_freq = 40"),
        ({"oldest": 1}, {}, "has newest, best and metric; got 'oldest'"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, training, message):
    wanted = config(snapshot_freq_for_preemption=100, **training)
    wanted.training.keep.update(keep)
    with pytest.raises(builders.BuildError, match=message):
        builders.build_keep(wanted)

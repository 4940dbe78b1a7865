"""`Model.sample` pads its grids: another number of steps is no new program, and no other sample."""

import jax
import numpy as np

import diffjax as dj
from diffjax.builders import build_sampling
from diffjax.runs import model as model_module
from diffjax.runs.sample import seed_keys
from diffjax.solvers import sample


def test_another_number_of_steps_is_the_same_program(trained):
    model = dj.load(trained)
    draw, keys = model_module._draw, seed_keys(np.arange(4))
    images = {3: model.sample(keys, 4, solver="ancestral", steps=3)}
    programs = draw._cache_size()
    for steps in (2, 5, 64):
        images[steps] = model.sample(keys, 4, solver="ancestral", steps=steps)
        assert draw._cache_size() == programs
    assert len({image.tobytes() for image in images.values()}) == 4

    plan = build_sampling(model.config, model.parts.process, solver="ancestral", steps=5)
    x = jax.jit(sample)(
        keys,
        model.denoiser(),
        model.prior(keys),
        plan.times,
        solver=plan.solver,
        process=model.parts.process,
        final=plan.final,
    ).x
    plain = np.asarray(model.parts.quantisation.from_model(x)).astype(int)
    gap = np.abs(plain - images[5].astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.02  # rounding at a level's edge

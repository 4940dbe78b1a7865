"""Controllable generation through the front door: a classifier's run, guidance, inpainting."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj
from diffjax import builders
from diffjax.cli.main import main
from diffjax.guidance import CarriedClassifier, NoisyClassifier
from diffjax.inverse import Linear
from diffjax.runs.model import Model
from diffjax.runs.workdir import RunError, claim, load_config
from diffjax.train.telemetry import read_jsonl


def bare(**changes):
    """A model without weights."""
    config = load_config("digits:quick").unlock()
    config.data.update(changes)
    return Model(config.lock(), builders.build_parts(config), None, 0)


def untrained(**changes):
    """A model with new weights: what is tested here holds for any."""
    model = bare(**changes)
    params = jax.jit(model.parts.init_params)(jax.random.key(0))
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def model():
    return untrained()


@pytest.fixture(scope="module")
def digits():
    """Levels as of digits, (5, 8, 8, 1)."""
    return np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory, digits_dir, compilation_cache):
    workdir = tmp_path_factory.mktemp("classifier")
    config = load_config("digits_classifier:quick")
    assert dj.train(config, workdir, show_progress=False) == (10, True)
    return workdir


@pytest.fixture(scope="module")
def classifier(classifier_run):
    return dj.load_classifier(classifier_run)


# --- inpainting and colorization --------------------------------------------------------------


def test_inpainting_keeps_every_known_level(model, digits):
    mask = np.arange(8)[None] < 4 * np.ones((8, 1))
    found = model.inpaint(jax.random.key(0), digits, mask)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[:, :, :4], digits[:, :, :4])
    assert np.mean(found[:, :, 4:] != digits[:, :, 4:]) > 0.5  # what is covered is not used


def test_covered_pixels_do_not_matter(model, digits):
    mask = np.eye(8)[..., None]
    other = np.where(mask[None] == 1, digits, 16 - digits).astype(np.uint8)
    one, two = (model.inpaint(jax.random.key(0), images, mask) for images in (digits, other))
    np.testing.assert_array_equal(one, two)


def test_an_inpainted_image_depends_on_its_own_key_image_and_mask(model, digits):
    masks = np.random.default_rng(1).integers(0, 2, (5, 8, 8, 1))
    key = jax.random.split(jax.random.key(0), 5)
    together = model.inpaint(key, digits, masks)
    parted = model.inpaint(key, digits, masks, batch_size=2)
    # Convolutions may round differently at another batch size: at most a pixel at a boundary.
    assert np.mean(together != parted) < 0.01
    np.testing.assert_array_equal(together[masks == 1], digits[masks == 1])


def test_one_image_has_many_completions(model, digits):
    mask = np.zeros((8, 8, 1))
    mask[:4] = 1
    found = model.inpaint(jax.random.key(0), digits[:1], mask, num=3, solver="pc")
    np.testing.assert_array_equal(found[:, :4], np.repeat(digits[:1, :4], 3, axis=0))
    assert np.mean(found[0, 4:] != found[1, 4:]) > 0.5


def test_any_linear_measurement_is_met(model):
    """The mean over pairs of pixels, of images in the model's range."""
    average = np.kron(np.eye(32), np.full((1, 2), 0.5))
    y = jnp.asarray(np.random.default_rng(0).uniform(-0.2, 0.2, (2, 32)), jnp.float32)
    found = model.restore(jax.random.key(0), Linear.of(average, (8, 8, 1)), y)
    restored = np.asarray(model.parts.quantisation.to_model(found)).reshape(2, 64) @ average.T
    # Met but for the rounding to 17 levels, and for the clipping of pixels beyond the range.
    assert np.mean(np.abs(restored - y) < 2 / 17) > 0.5


def test_colours_keep_the_grey(digits):
    coloured = untrained(num_channels=3, levels=256, uniform_dequantization=False)
    grey = 8 * digits + 60
    found = coloured.colorize(jax.random.key(0), grey).astype(float)
    assert found.shape == (5, 8, 8, 3)
    inside = ((found > 0) & (found < 255)).all(-1)  # the others are clipped
    assert inside.mean() > 0.1
    assert np.abs(found.mean(-1) - grey[..., 0])[inside].max() <= 1.0


def test_what_a_model_cannot_restore_raises(model, digits):
    with pytest.raises(RunError, match="no colours to draw"):
        model.colorize(jax.random.key(0), digits)
    with pytest.raises(ValueError, match="AdaptiveFlow chooses its own"):
        model.inpaint(jax.random.key(0), digits, np.ones((8, 8)), solver="ode")
    with pytest.raises(RunError, match="one for all 3; got 5"):
        model.inpaint(jax.random.key(0), digits, np.ones((8, 8)), num=3)
    with pytest.raises(ValueError, match="0 .unknown. and 1"):
        model.inpaint(jax.random.key(0), digits, np.full((8, 8), 0.5))


# --- a classifier's run -----------------------------------------------------------------------


def test_the_classifier_has_the_published_size():
    config = load_config("ve/cifar10_classifier")
    parts = builders.build_parts(config)
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 38_913_242


def test_a_run_of_a_classifier_leaves_its_figures(classifier_run, capsys):
    rows = read_jsonl(classifier_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10]
    assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in rows)
    flags = ["--metrics=loss,accuracy", "--limit=40"]
    assert main(["diffjax", "evaluate", f"--workdir={classifier_run}", *flags]) == 0
    assert "over 10 times" in capsys.readouterr().out
    figures = json.loads((classifier_run / "eval" / "accuracy.json").read_text())
    assert len(figures["times"]) == len(figures["accuracy"]) == 10
    assert figures["images"] == 40


def test_each_run_is_loaded_by_its_own_door(classifier_run, tmp_path):
    claim(tmp_path, load_config("digits:quick"))
    with pytest.raises(RunError, match="load_classifier"):
        dj.load(classifier_run)
    with pytest.raises(RunError, match=r"use diffjax\.load"):
        dj.load_classifier(tmp_path)
    with pytest.raises(RunError, match=r"measured by loss, accuracy; got \['bpd'\]"):
        dj.evaluate(classifier_run, ["loss", "bpd"])


@pytest.mark.slow
def test_guidance_raises_the_chosen_classes_probability(model, classifier):
    """By 40 times the classifier's own gradient: its verdict on the samples follows."""
    labels = np.arange(6) % 10
    key = jax.random.key(2)

    def log_p(images):
        x = model.parts.quantisation.to_model(jnp.asarray(images))
        logits = classifier.classify(x, jnp.asarray(1e-2))
        return np.asarray(jax.nn.log_softmax(logits))[np.arange(6), labels]

    free = model.sample(key, 6, batch_size=4)
    led = model.sample(key, 6, guide=classifier.guide(model, labels, scale=40.0), batch_size=4)
    assert np.mean(log_p(led) - log_p(free)) > 0


def test_a_guide_is_carried_to_a_model_of_another_process_and_range(model, classifier):
    assert isinstance(classifier.guide(model, [0]).classify, NoisyClassifier)
    other = bare(centered=False)
    carried = classifier.guide(other, [0]).classify
    assert isinstance(carried, CarriedClassifier)
    # x in [0, 1] here, 2 x - 1 there.
    assert (carried.gain, carried.offset) == (2.0, -1.0)
    small = bare(image_size=4)
    with pytest.raises(RunError, match=r"\(8, 8, 1\); the model's are \(4, 4, 1\)"):
        classifier.guide(small, [0])


def test_data_without_labels_raise():
    config = load_config("digits_classifier:quick")
    parts = builders.build_parts(config)
    loss_fn = builders.build_loss(config, parts, train=True)
    with pytest.raises(builders.BuildError, match="labelled images"):
        loss_fn(None, jax.random.key(0), {"image": np.zeros((2, 8, 8, 1), np.uint8)})


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        ({"name": "classify"}, "or 'classification'; got 'classify'"),
        ({"name": "classification", "reduce": "mean"}, "loss.reduce does not apply"),
    ],
)
def test_a_wrong_loss_section_raises(loss, match):
    config = load_config("digits_classifier:quick").unlock()
    config.loss = loss
    with pytest.raises(builders.BuildError, match=match):
        builders.build_loss(config, builders.build_parts(config), train=True)


@pytest.mark.slow
def test_a_trained_classifier_knows_the_digits(tmp_path, digits_dir):
    """300 updates: held-out digits are recognised without noise, and not from noise alone."""
    config = load_config("digits_classifier").unlock()
    config.training.update({"n_iters": 300, "snapshot_freq": 300, "eval_freq": 300})
    config.optim.warmup = 20
    dj.train(config.lock(), tmp_path, show_progress=False)
    figures = dj.evaluate(tmp_path, ["accuracy"])["accuracy"]
    assert figures["first"] > 0.9
    assert figures["last"] < 0.2

"""All devices of a process: each image as on one device, nothing exchanged, compiled once.

`Pointwise` computes each pixel from itself, so its images are equal bit for bit however they are
laid out; a transformer of two blocks stands for networks, which may round.
"""

import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

import diffjax as dj
from diffjax import builders
from diffjax.cli import evaluate as evaluate_verb
from diffjax.core.pytree import pytree
from diffjax.guidance import ClassifierGuidance
from diffjax.inverse import Mask
from diffjax.metrics import moments
from diffjax.runs import gather, model, programs, spread
from diffjax.runs.model import Model
from diffjax.runs.sample import sample_to, seed_keys
from diffjax.runs.workdir import RunError, load_config
from diffjax.train.state import TrainState
from tests.runs.test_hosts import EXTRACTOR

NUM = 11  # divides by no number of devices


class Pointwise(nn.Module):
    """A pixel of its own value, the time, the class and a weight of its place."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, label, cond, train=False):
        del train
        weights = self.param("weights", nn.initializers.normal(), (*x.shape[1:-1], 512))
        gains = jnp.take(jnp.asarray([0.5, 1.0, 2.0]), cond)[:, None, None, None]
        return jnp.tanh(x * gains + weights[None, ..., :1]) * jnp.cos(label).reshape(-1, 1, 1, 1)


def config_of(**network):
    config = load_config("tests/runs/tiny_config.py").copy_and_resolve_references().unlock()
    config.model = ConfigDict(network)
    config.eval.batch_size = 6
    return config


def on_meshes(config, *meshes):
    """Models with the same weights, not trained. meshes: None for a device of the user's own."""
    parts = builders.build_parts(config)
    params = jax.jit(parts.init_params)(jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.05 * np.cos(np.arange(w.size)).reshape(w.shape), params)
    state = TrainState(step=(), params=params, opt_state=(), ema=(), key=())

    def placed(mesh):
        if mesh is None:
            return params
        return jax.device_put(params, builders.build_sharding(config, mesh, state).params)

    return [Model(config, parts, placed(mesh), 7) for mesh in meshes]


MESHES = [{}, {"data": 2}, {"data": 1, "fsdp": 4, "tensor": 2}]


@pytest.fixture(scope="module")
def pointwise():
    """On one device, on all, on two, and split."""
    config = config_of(name="tests.runs.test_spread:Pointwise")
    return on_meshes(config, None, *(spread.local_mesh(**axes) for axes in MESHES))


@pytree
class Brightness:
    """Classifies by the mean: a classifier with weights of its own."""

    weights: jax.Array

    def __call__(self, x_t, t):
        return jnp.mean(x_t, axis=(1, 2, 3))[:, None] * self.weights[None]


def guide_of(one):
    labels, scale = np.arange(NUM) % 3, jnp.linspace(0.0, 30.0, NUM)
    return ClassifierGuidance(Brightness(jnp.arange(3.0)), one.parts.process, labels, scale)


LABELS = np.arange(NUM) % 3
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 17, (NUM, 8, 8, 1)).astype(np.uint8)
KNOWN = Mask(jnp.asarray(RNG.integers(0, 2, (NUM, 8, 8, 1)), float), per_sample=True)


def doors(m):
    """What each front door gives for the same keys, by name."""
    keys, given = seed_keys(np.arange(NUM)), {"labels": LABELS}
    latents = np.asarray(m.prior(keys))
    drawn = {"solver": "ancestral", "steps": 2, **given}
    y = m.parts.quantisation.to_model(jnp.asarray(IMAGES)) * KNOWN.mask
    return {
        "sample": lambda: m.sample(keys, NUM, temperature=0.9, **drawn),
        "latents": lambda: m.sample(keys, NUM, latents=latents, **drawn),
        "guide": lambda: m.sample(keys, NUM, guide=guide_of(m), **drawn),
        "restore": lambda: m.restore(keys, KNOWN, y, **drawn),
        "encode": lambda: m.encode(IMAGES, **given),
        "decode": lambda: m.decode(latents, **given),
        "interpolate": lambda: m.interpolate(IMAGES[:2], IMAGES[2:4], 3, labels=LABELS[:2]),
        "bits": lambda: np.asarray(m.bits_per_dim(keys, IMAGES, **given).draws),
    }


def assert_same(models, names=None):
    """To the rounding of an adaptive solve's own sums; the images bit for bit."""
    one, *others = (
        {name: door() for name, door in doors(m).items() if names is None or name in names}
        for m in models
    )
    for other in others:
        for name, expected in one.items():
            if name in ("encode", "bits"):
                np.testing.assert_allclose(other[name], expected, atol=2e-5)
            else:
                np.testing.assert_array_equal(other[name], expected)
    return one


def test_all_devices_give_what_one_device_gives(pointwise):
    one = assert_same(pointwise[:2], ("sample", "latents", "restore"))
    assert one["sample"].std() > 1


@pytest.mark.slow
def test_every_front_door_gives_what_one_device_gives(pointwise):
    """Also with batches of 3, on two devices and with split weights."""
    one = assert_same(pointwise)
    assert np.mean(one["guide"] != one["sample"]) > 0.05
    keys = seed_keys(np.arange(NUM))
    drawn = [m.sample(keys, NUM, labels=LABELS, batch_size=3) for m in pointwise]
    for images in drawn[1:]:
        np.testing.assert_array_equal(images, drawn[0])


@pytest.mark.parametrize(
    "name", ["sample", "restore", "decode", "bits", pytest.param("encode", marks=pytest.mark.slow)]
)
def test_five_calls_compile_once(pointwise, caplog, name):
    door = doors(pointwise[1])[name]
    door()
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        for _ in range(4):
            door()
        before = list(caplog.records)
        jax.jit(lambda x: x + 1)(1)  # to see that we look
    finished = ["Finished XLA" in record.getMessage() for record in caplog.records]
    assert not any(finished[: len(before)]) and any(finished)


def compiled(monkeypatch, name, door):
    """(the program that a front door runs by the jitted function `name`, what the door gives)."""
    found, original = [], getattr(model, name)

    def run(*arguments, **options):
        if not found:
            found.append(original.lower(*arguments, **options).compile())
        given = {k: v for k, v in options.items() if k not in ("save", "method")}  # static
        return found[0](*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(model, name, run)
        result = door()
    return found[0], result


@pytest.mark.parametrize("door", ["sample", "guide", "restore"])
def test_a_sampler_over_a_grid_exchanges_nothing(pointwise, monkeypatch, door):
    """11 images in batches of 6 are 8 rows, one a device: a device returns one image."""
    program, _ = compiled(monkeypatch, "_draw", doors(pointwise[1])[door])
    text = program.as_text()
    assert "while(" in text
    assert programs.collectives(text, 8) == ()
    image = 8 * 8 * 4
    # The image and what a solver keeps beside it.
    assert image <= programs.memory(program).results < 2.5 * image + 8 * 16


@pytest.mark.parametrize(("name", "door", "runs"), [("_flow", "decode", 1), ("_score", "bits", 2)])
def test_an_adaptive_solve_asks_once_a_step_whether_all_are_there(
    pointwise, monkeypatch, name, door, runs
):
    """A truth, which XLA sends as a number; a loop of unknown length counts once.

    The other of bits/dim are its means over the images, after the loop.
    """
    program, _ = compiled(monkeypatch, name, doors(pointwise[1])[door])
    found = programs.collectives(program.as_text(), 8)
    assert [(c.kind, c.runs) for c in found] == [("all-reduce", runs)]
    assert found[0].bytes < 50


def transformer(scan):
    return config_of(
        name="dit", scan=scan, size="S/4", depth=2, width=32, num_heads=2, num_classes=None,
        label_dropout=0.0, learn_sigma=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def network():
    """On one device, on all, and split over "fsdp" and over "tensor" too."""
    meshes = (spread.local_mesh(**axes) for axes in ({}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}))
    return on_meshes(transformer(scan=False), None, *meshes)


def exchanged(monkeypatch, one, other):
    """The collectives of a sampler that gives the images of one device; bytes held on each."""
    keys = seed_keys(np.arange(8))
    plan = builders.build_sampling(one.config, one.parts.process, steps=2)
    expected = one.path(keys, plan).x
    assert np.std(expected) > 0.3
    program, found = compiled(monkeypatch, "_draw", lambda: other.path(keys, plan))
    np.testing.assert_allclose(found.x, expected, atol=1e-5)
    leaves = jax.tree.leaves(other.params)
    share = sum(leaf.addressable_data(0).nbytes for leaf in leaves) / sum(
        leaf.nbytes for leaf in leaves
    )
    return {c.kind for c in programs.collectives(program.as_text(), 8)}, share


def test_split_weights_give_the_same_images(network, monkeypatch):
    """Over "fsdp" only weights travel, no activation."""
    assert exchanged(monkeypatch, network[0], network[1]) == (set(), 1)
    kinds, share = exchanged(monkeypatch, network[0], network[2])
    assert kinds == {"all-gather"} and share < 0.3


@pytest.mark.slow
def test_weights_split_twice_and_layers_in_a_loop(network, monkeypatch):
    kinds, share = exchanged(monkeypatch, network[0], network[3])
    assert kinds == {"all-gather", "all-reduce"} and share < 0.55
    one, split = on_meshes(transformer(scan=True), None, spread.local_mesh(fsdp=4))
    kinds, share = exchanged(monkeypatch, one, split)
    assert kinds == {"all-gather"} and share < 0.3
    images = np.random.default_rng(2).integers(0, 17, (8, 8, 8, 1)).astype(np.uint8)
    bits = [m.bits_per_dim(jax.random.key(0), images).draws for m in (one, split)]
    np.testing.assert_allclose(*bits, atol=1e-3)


def test_a_users_model_stays_on_its_device(network):
    one, keys = network[0], seed_keys(np.arange(8))
    plan = builders.build_sampling(one.config, one.parts.process, steps=2)
    assert one.mesh is None and one.path(keys, plan).x.devices() == {jax.devices()[0]}


class Stopped(Exception):
    pass


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_go_on_with_another_number_of_devices(pointwise, tmp_path):
    """Two shards of four with 8 devices, the rest with one: the files of a job with two."""
    one, eight, two, _ = pointwise
    options = {
        "key": seed_keys(np.arange(NUM)), "num": NUM, "batch_size": 3, "shard_size": 3,
        "solver": "euler", "steps": 2, "labels": LABELS,
    }  # fmt: skip
    sample_to(two, tmp_path / "two", **options)

    def stop(done):
        if done == 9:
            raise Stopped

    with pytest.raises(Stopped):
        sample_to(eight, tmp_path / "changed", progress=stop, **options)
    before = contents(tmp_path / "changed")
    sample_to(one, tmp_path / "changed", **options)
    after = contents(tmp_path / "changed")
    assert len(before) == 5 and before.items() <= after.items()  # two shards and the manifest
    assert after == contents(tmp_path / "two")


class Eleven:
    """11 images in batches of 6 and 5, which 8 devices do not split; the last image twice."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = np.arange(6 * index, 6 * index + 6)
        return PIXELS[np.minimum(rows, NUM - 1)], rows < NUM


PIXELS = np.random.default_rng(1).integers(0, 256, (NUM, 4, 4, 1)).astype(np.uint8)


def test_gathered_features_are_those_of_the_images_alone():
    found = gather.gather(EXTRACTOR, Eleven(), total=NUM, keep=True)
    expected = PIXELS.reshape(NUM, -1)[:, :6] / 255
    assert found.num == NUM
    np.testing.assert_allclose(found.features, expected, rtol=1e-6)
    np.testing.assert_allclose(moments.mean(found.moments), expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.cov(found.moments), np.cov(expected.T), atol=1e-6)


def test_rows_are_split_filled_and_cut():
    mesh, seen = spread.local_mesh(fsdp=2), []

    def call(x, none, key):
        seen.append((x.shape, x.addressable_data(0).shape, key.addressable_data(0).shape))
        return {"square": x**2, "key": jax.random.key_data(key)}

    x, keys = np.arange(10.0).reshape(5, 2), seed_keys(np.arange(5))
    found = spread.over_rows(mesh, call, x, None, keys)
    assert seen == [((8, 2), (1, 2), (1,))]
    np.testing.assert_array_equal(found["square"], x**2)
    np.testing.assert_array_equal(found["key"], jax.random.key_data(keys))
    assert spread.over_rows(None, lambda x: x, x).tobytes() == x.tobytes()
    for rows, shard in ((16, 2), (6, 6)):  # split, else whole on each
        assert spread.placed(mesh, np.ones(rows)).addressable_data(0).shape == (shard,)


def test_what_a_guide_holds_for_each_image_is_split(pointwise):
    """Its classifier's three weights are not, though there are three images too."""
    one = pointwise[0]
    guide = ClassifierGuidance(Brightness(jnp.arange(8.0)), one.parts.process, np.arange(8) % 3)
    placed = spread.placed_each(spread.local_mesh(), guide, 8)
    assert placed.labels.addressable_data(0).shape == (1,)
    assert placed.classify.weights is guide.classify.weights


def test_weights_of_a_training_mesh_reach_every_device_once():
    mesh = spread.local_mesh(fsdp=4)
    config = config_of(name="tests.runs.test_spread:Pointwise")
    [split] = (m.params for m in on_meshes(config, mesh))
    replicas = jax.device_put(split, spread.replicated(mesh))
    whole = spread.on_local_devices(replicas)
    assert spread.mesh_of(whole).shape == {"data": 8, "fsdp": 1, "tensor": 1}
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(replicas), strict=True):
        assert len(a.addressable_shards) == 8
        for here, there in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert here.data.unsafe_buffer_pointer() == there.data.unsafe_buffer_pointer()
    jax.tree.map(np.testing.assert_array_equal, spread.on_local_devices(split), whole)


def test_a_run_is_loaded_onto_a_mesh(trained, capsys):
    whole, split = dj.load(trained), dj.load(trained, mesh=spread.local_mesh(tensor=8))
    jax.tree.map(np.testing.assert_array_equal, whole.params, split.params)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(whole.params))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole.params))
    sizes = [leaf.addressable_data(0).size / leaf.size for leaf in jax.tree.leaves(split.params)]
    assert min(sizes) == 1 / 8
    with pytest.raises(RunError, match="The mesh of this process: .*must divide the 8 devices"):
        spread.local_mesh(fsdp=3)
    with pytest.raises(RunError, match="A mesh has the axes data, fsdp, tensor; got .'expert'"):
        spread.local_mesh(expert=2)
    arguments = ["evaluate", f"--workdir={trained}", "--mesh=fsdp:3"]
    assert evaluate_verb.run(arguments) == 2
    assert "must divide the 8 devices" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_on_a_split_model_gives_the_figures_of_one(trained):
    options = {"limit": 20, "num": 20, "metrics": ("loss", "bpd", "bound", "frechet", "quality")}
    one = dj.evaluate(trained, mesh=spread.local_mesh(data=1), **options)
    before = {name: os.stat(trained / "eval" / f"{name}.json").st_mtime_ns for name in one}
    for axes in ({}, {"tensor": 4}):
        found = dj.evaluate(trained, mesh=spread.local_mesh(**axes), **options)
        for name, figures in one.items():
            assert os.stat(trained / "eval" / f"{name}.json").st_mtime_ns > before[name]
            for key, value in figures.items():
                expected = pytest.approx(value, rel=2e-4) if isinstance(value, float) else value
                assert found[name][key] == expected, (name, key)

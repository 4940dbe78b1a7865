"""Many images in shards: what one call would draw, bit for bit, however often it was stopped."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import numpy as np
import pytest

import diffjax as dj
from diffjax.cli.sample import numbers, ranges
from diffjax.runs import hosts, shards
from diffjax.runs.model import Model
from diffjax.runs.sample import sample_to, seed_keys
from diffjax.runs.shards import Stored
from diffjax.runs.workdir import RunError
from tests.runs.test_hosts import Processes

NUM = 21  # shards of 8, 8 and 5 images, two batches of 4 each
SEEDS = np.arange(100, 100 + NUM)
OPTIONS = {"num": NUM, "batch_size": 4, "shard_size": 7, "solver": "euler", "steps": 2}


@pytest.fixture(scope="module")
def model(trained):
    return dj.load(trained)


@pytest.fixture(scope="module")
def whole(model):
    """The images of one call that holds them all."""
    options = {k: v for k, v in OPTIONS.items() if k not in ("num", "shard_size")}
    return model.sample(seed_keys(SEEDS), NUM, **options)


def draw(model, out, **options):
    return sample_to(model, out, **({"key": seed_keys(SEEDS), **OPTIONS} | options))


def contents(folder):
    """All files below a folder by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_back(folder, format):
    """The images, by readers of the formats that know nothing of shards."""
    if format == "npz":
        files = sorted(folder.glob("*.npz"))
        return np.concatenate([np.load(file)["images"] for file in files])
    if format == "png":
        from PIL import Image

        shown = [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]
        # 17 levels over 0 .. 255: 15.9375 apart, each rounded by less than half.
        return np.round(np.stack(shown)[..., None] / (255 / 16)).astype(np.uint8)
    import grain

    files = sorted(str(file) for file in folder.glob("*.array_record"))
    source = grain.sources.ArrayRecordDataSource(files)
    return np.stack([np.load(io.BytesIO(source[i]))["image"] for i in range(len(source))])


@pytest.mark.parametrize("format", shards.FORMATS)
def test_shards_hold_what_one_call_draws(model, whole, tmp_path, format):
    written = draw(model, tmp_path, format=format)
    assert written.images is None
    assert written.files == (tmp_path / "samples", tmp_path / "samples.png")
    np.testing.assert_array_equal(read_back(tmp_path / "samples", format), whole)
    stored = Stored(tmp_path / "samples")
    places = np.array([20, 3, 3, 8, 7])
    np.testing.assert_array_equal(stored[places], whole[places])
    assert (len(stored), stored.digest) == (NUM, written.digest)


class Stopped(Exception):
    pass


def stopping(monkeypatch, at):
    """Stops before write `at` of a file, as a kill or a full disk would: one more, then none."""
    from diffjax.core import files

    count, replace = [0], os.replace

    def failing(source, target):
        count[0] += 1
        if count[0] > at:
            # As a kill: the half-written file stays where it is.
            monkeypatch.setattr(files.os, "unlink", lambda path: None)
            raise Stopped
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)


@pytest.mark.parametrize(("format", "writes"), [("npz", range(7)), ("png", (0, 1, 5, 10, 17, 25))])
def test_stopped_anywhere_and_gone_on_gives_the_same_files(
    model, tmp_path, monkeypatch, format, writes
):
    """Manifest, three shards, their entries and the grid: stopped before each of the writes."""
    draw(model, tmp_path / "whole", format=format)
    expected, drawn = contents(tmp_path / "whole"), counted(monkeypatch)
    for at in writes:
        out = tmp_path / str(at)
        with monkeypatch.context() as patch:
            stopping(patch, at)
            with pytest.raises(Stopped):
                draw(model, out, format=format)
        assert any(name.startswith(".") for name in map(os.path.basename, contents(out)))
        before, done = len(drawn), len(list((out / "samples" / "done").glob("[0-9]*")))
        draw(model, out, format=format)
        assert len(drawn) - before == 3 - done
        assert contents(out) == expected


def counted(monkeypatch):
    """Counts the images of each call that draws."""
    drawn, original = [], Model.draw

    def counting(self, key, num, *rest, **options):
        drawn.append(num)
        return original(self, key, num, *rest, **options)

    monkeypatch.setattr(Model, "draw", counting)
    return drawn


def test_a_finished_job_draws_nothing(model, tmp_path, monkeypatch):
    first = draw(model, tmp_path)
    drawn, done = counted(monkeypatch), []
    again = draw(model, tmp_path, progress=done.append)
    assert drawn == []
    assert (done, again.digest) == ([8, 16, 21], first.digest)


OTHER = {
    "number": {"num": 20, "key": seed_keys(SEEDS[:20])},
    "seeds": {"key": seed_keys(SEEDS + 1)},
    "solver": {"solver": "heun"},
    "steps": {"steps": 3},
    "batches": {"batch_size": 8},
    "shards": {"shard_size": 9},
    "format": {"format": "png"},
    "temperature": {"temperature": 0.9},
    "start": {"latents": np.zeros((NUM, 8, 8, 1), np.float32)},
    "about": {"about": {"seeds": "0-20"}},
}
NAMES = {
    "number": "num: 21 -> 20", "seeds": "keys_sha256", "solver": "solver: ", "steps": "steps: 2 ->",
    "batches": "batch_size: 4 -> 8", "shards": "size: 8 -> 12", "format": "format: npz -> png",
    "temperature": "options_sha256", "start": "options_sha256", "about": "seeds: absent -> 0-20",
}  # fmt: skip


def test_another_request_is_refused(model, tmp_path, monkeypatch):
    draw(model, tmp_path)
    before, drawn = contents(tmp_path), counted(monkeypatch)
    for name, options in OTHER.items():
        with pytest.raises(RunError, match=f"of another request.*{NAMES[name]}.*--out or --name"):
            draw(model, tmp_path, **options)
    with pytest.raises(RunError, match="checkpoint_step: 10 -> 5"):
        draw(dataclasses.replace(model, step=5), tmp_path)
    other = dataclasses.replace(model, params=jax.tree.map(lambda w: w + 1e-6, model.params))
    with pytest.raises(RunError, match="weights_sha256"):
        draw(other, tmp_path)
    with pytest.raises(RunError, match="in shards, whose grid and files these would"):
        draw(model, tmp_path, num=1, key=seed_keys([1]))
    assert contents(tmp_path) == before
    assert drawn == []


def test_missing_and_damaged_shards(model, tmp_path, monkeypatch):
    draw(model, tmp_path)
    folder, expected = tmp_path / "samples", contents(tmp_path)
    first, second = (folder / f"shard-{k:05d}.npz" for k in (0, 1))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-7])
    with pytest.raises(RunError, match="2 of 3 shards .* missing, the first 0: run the same"):
        Stored(folder)
    drawn = counted(monkeypatch)
    draw(model, tmp_path)
    assert len(drawn) == 2
    assert contents(tmp_path) == expected
    images = np.load(second)["images"]
    images[3, 0, 0, 0] ^= 1
    second.write_bytes(shards.npz_bytes(images, None))
    entry = folder / "done" / "00001.json"
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"bytes": second.stat().st_size}))
    stored = Stored(folder)
    stored[np.arange(8)]
    with pytest.raises(RunError, match="Damaged: shard 1 .*shard-00001.npz.* Delete .*00001.json"):
        stored[np.arange(8, 9)]
    with pytest.raises(RunError, match="holds no shards of images.*There are some in .*samples"):
        Stored(tmp_path)


def test_processes_share_the_shards(model, tmp_path, monkeypatch):
    """Two processes, of which one stops; three go on: the files are those of one."""
    draw(model, tmp_path / "whole")
    processes = Processes(2, monkeypatch)

    def stop_the_second(done):
        if hosts.index() == 1:
            processes.barrier.abort()
            raise Stopped

    out = tmp_path / "several"
    stopped = processes.run(lambda: draw(model, out, progress=stop_the_second))
    assert all(isinstance(result, Exception) for result in stopped)
    done = sorted(p.name for p in (out / "samples" / "done").glob("0*"))
    assert done == ["00000.json", "00002.json"]
    drawn = counted(monkeypatch)
    found = Processes(3, monkeypatch).run(lambda: draw(model, out))
    assert len(drawn) == 1
    assert contents(out) == contents(tmp_path / "whole")
    assert len({result.digest for result in found}) == 1
    few = Processes(2, monkeypatch).run(lambda: draw(model, tmp_path / "few", shard_size=NUM))
    assert [len(result.files) for result in few] == [2, 0]
    np.testing.assert_array_equal(few[0].images, few[1].images)
    refused = Processes(2, monkeypatch).run(lambda: draw(model, out, steps=3))
    assert [type(error) for error in refused] == [RunError, RunError]


def test_labels_go_with_their_images(tmp_path, model, monkeypatch):
    """Drawing is stood in for: the class of image i lies beside it, also in the tail."""
    labels = np.arange(NUM) % 10

    def drawn(self, key, num, plan, *, labels, batch_size, progress):
        return np.broadcast_to(labels[:, None, None, None], (num, 8, 8, 1)).astype(np.uint8)

    monkeypatch.setattr(Model, "draw", drawn)
    draw(model, tmp_path, labels=labels)
    for k in range(3):
        with np.load(tmp_path / "samples" / f"shard-{k:05d}.npz") as archive:
            np.testing.assert_array_equal(archive["labels"], labels[8 * k : 8 * k + 8])
            np.testing.assert_array_equal(archive["images"][:, 0, 0, 0], archive["labels"])


@pytest.mark.parametrize("format", ["npz", "arrayrecord"])
def test_one_shard_is_held_at_a_time(tmp_path, model, monkeypatch, format):
    """2,000 images of 12 kB in shards of 100: 24 MB go by, and less than 12 MB are held."""

    def drawn(self, key, num, plan, **_):
        return np.zeros((num, 64, 64, 3), np.uint8)

    monkeypatch.setattr(Model, "draw", drawn)
    parts = model.parts._replace(image_shape=(64, 64, 3))
    large = dataclasses.replace(model, parts=parts)
    options = OPTIONS | {"batch_size": 50, "shard_size": 100, "num": 2000, "format": format}
    sample_to(large, tmp_path / "warm", key=seed_keys(np.arange(200)), **(options | {"num": 200}))
    keys = seed_keys(np.arange(2000))
    tracemalloc.start()
    sample_to(large, tmp_path, key=keys, **options)
    stored, total = Stored(tmp_path / "samples"), 0
    for start in range(0, 2000, 50):
        total += int(stored[np.arange(start, start + 50)].sum())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 0
    assert peak < 12e6


def test_evaluation_reads_shards(trained, model, whole, tmp_path):
    from diffjax.runs.evaluate import _read_samples
    from diffjax.runs.evaluation import Evaluation
    from tests.runs.test_hosts import EXTRACTOR, Extractor, features_and_logits

    written = draw(model, tmp_path)
    np.savez(tmp_path / "all.npz", images=whole)
    extractor = Extractor(features_and_logits, EXTRACTOR.provenance | {"image_shape": [8, 8, 1]})
    found = [
        Evaluation(model, samples=_read_samples(tmp_path / name, model)).gathered(
            extractor, keep=True
        )
        for name in ("samples", "all.npz")
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert found[0].digest == written.digest
    (tmp_path / "samples" / "done" / "00002.json").unlink()
    with pytest.raises(RunError, match="1 of 3 shards"):
        dj.evaluate(trained, ("quality",), samples=tmp_path / "samples")


def test_a_stopped_evaluation_draws_only_what_is_missing(model, tmp_path, monkeypatch):
    """What frechet and quality judge: stopped after each batch; of another seed, drawn anew."""
    from diffjax.runs.evaluation import Evaluation

    options = {"num": NUM, "solver": "euler", "steps": 2}
    alone = Evaluation(model, **options).samples()
    drawn = counted(monkeypatch)
    for batches in (1, 2, 3):
        folder = tmp_path / str(batches)

        def stop(done, last=min(8 * batches, NUM)):
            if done == last:
                raise Stopped

        with pytest.raises(Stopped):
            Evaluation(model, folder=folder, progress=stop, **options).samples()
        before = len(drawn)
        again = Evaluation(model, folder=folder, **options).samples()
        assert len(drawn) - before == 3 - batches
        np.testing.assert_array_equal(again, alone)
    other = Evaluation(model, folder=folder, seed=1, **options).samples()
    assert np.mean(other != alone) > 0.1


@pytest.mark.slow
def test_stopped_bits_per_dim_solve_only_what_is_missing(model, tmp_path, monkeypatch):
    """20 images in batches of 8: stopped after the second, one batch is left, and one result."""
    from diffjax.runs import likelihoods
    from diffjax.runs.evaluation import Evaluation

    write, solved = likelihoods.write_npz, []

    def failing(path, arrays):
        if len(solved) == 2:
            raise Stopped
        solved.append(path)
        write(path, arrays)

    options = {"limit": 20, "folder": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(likelihoods, "write_npz", failing)
        with pytest.raises(Stopped):
            likelihoods.bpd(Evaluation(model, **options))
    before = {path: path.read_bytes() for path in solved}
    found = likelihoods.bpd(Evaluation(model, **options))
    assert {path: path.read_bytes() for path in solved} == before
    assert len(list(solved[0].parent.iterdir())) == 3
    alone = likelihoods.bpd(Evaluation(model, limit=20))
    assert found == alone
    # Another seed is another result, with a place of its own.
    other = likelihoods.bpd(Evaluation(model, limit=20, seed=1, folder=tmp_path))
    assert other["mean"] != found["mean"]


@pytest.mark.slow
def test_restarts_of_a_config_are_those_of_the_library(model):
    """A run from 0.6 to 0, two restarts from 0.2 to 0.4 and back, written out by hand."""
    from diffjax.solvers import Heun, Restart, ToEnd, grids, sample_with_restarts

    def with_sampling(**changes):
        section = {
            "steps": 3,
            "grid": {"name": "uniform", "t_max": 0.6},
            "solver": {"name": "heun"},
            "restarts": [{"t_max": 0.4, "t_min": 0.2, "steps": 2, "repeats": 2, "noise": 0.9}],
        }
        config = model.config.copy_and_resolve_references()
        with config.unlocked():
            config.sampling = {"final": "to_end", **section, **changes}
        return dataclasses.replace(model, config=config)

    process, keys = model.parts.process, seed_keys([5, 6])
    found = with_sampling().sample(keys, 2)
    times = grids.uniform(process, 3, t_max=0.6)
    nodes = np.asarray(times)
    node = nodes[1:-1][np.argmin(abs(nodes[1:-1] - 0.2))]
    by_hand = Restart(np.asarray([0.4, 0.3, node], np.float32), repeats=2, noise=0.9)
    result = jax.jit(sample_with_restarts)(
        keys, model.denoiser(), model.prior(keys), times,
        solver=Heun(), process=process, restarts=(by_hand,), final=ToEnd(),
    )  # fmt: skip
    expected = np.asarray(model.parts.quantisation.from_model(result.x))
    assert np.mean(found != expected) < 0.02  # a level at a boundary
    for changes, options, words in (
        ({"restarts": [{"t_max": 0.1, "t_min": 0.2, "steps": 2}]}, {}, "sampling.restarts"),
        ({"restarts": [{"t_max": 0.4, "t_min": 0.2, "step": 2}]}, {}, "Did you mean 'steps'"),
        ({"solver": {"name": "ode"}}, {}, "not with an adaptive solver"),
        ({"solver": {"name": "dpmpp_2m"}}, {}, "dpmpp_2m|history|one-step|one step"),
    ):
        with pytest.raises(ValueError, match=words):
            with_sampling(**changes).sample(keys, 2, **options)


def test_ranges_are_what_numbers_reads():
    for found in ([0, 1, 2, 3, 7], [5], [3, 2, 1], [4, 4, 5]):
        assert numbers("seeds", ranges(found)) == found
    assert ranges(range(50_000)) == "0-49999"


def test_a_missing_package_is_named_before_work(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffjax\[data\]'"):
        draw(model, tmp_path, format="arrayrecord")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_exported_sampler_goes_along_a_schedule(model, tmp_path, monkeypatch):
    """Asked at other times than its grid's, it gives what `Model.sample` gives, and not the plain.

    Writing the program is stood in for by calling it.
    """
    from diffjax.runs import export
    from diffjax.search import Schedule, describe
    from diffjax.solvers import DDIM, grids

    called = {}

    def stand_in(draw, weights, *inputs, platforms):
        called["images"] = np.asarray(jax.jit(draw)(weights, seed_keys([1, 2])))
        raise Stopped

    monkeypatch.setattr(export, "export_sampler", stand_in)
    process = model.parts.process
    times = grids.log_snr(process, 3)
    schedule = Schedule(
        times=times, process=describe(process), solver=describe(DDIM()), asked=0.7 * times,
        method={"name": "by hand"}, before=1.0, after=0.5, evaluations=0,
    )  # fmt: skip
    with pytest.raises(Stopped):
        export.export_to(model, tmp_path / "s.npz", solver="ddim", schedule=schedule)
    expected = model.sample(seed_keys([1, 2]), 2, solver="ddim", schedule=schedule)
    assert np.mean(called["images"] != expected) < 0.02  # a level at a boundary
    plain = dataclasses.replace(schedule, asked=None)
    elsewhere = model.sample(seed_keys([1, 2]), 2, solver="ddim", schedule=plain)
    assert np.mean(called["images"] != elsewhere) > 0.1
    with pytest.raises(ValueError, match="searched for the solver"):
        export.export_to(model, tmp_path / "s.npz", solver="euler", schedule=schedule)


# Real kills.


def run_killed(command, *, times, done, rng):
    """Runs a command, killing it `times` times as `done()` grows, and then to its end."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    for _ in range(times):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            start = done()
            wanted = start + int(rng.integers(1, 4))
            while done() < wanted and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
    subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_sampling_gives_the_same_files(trained, tmp_path, rng):
    def command(out):
        return [
            sys.executable, "-m", "diffjax", "sample", f"--workdir={trained}", f"--out={out}",
            "--num=400", "--batch_size=8", "--shard_size=16", "--format=png", "--steps=20",
        ]  # fmt: skip

    run_killed(command(tmp_path / "whole"), times=0, done=None, rng=rng)
    folder = tmp_path / "killed" / "samples" / "done"
    run_killed(
        command(tmp_path / "killed"), times=5, done=lambda: len(list(folder.glob("0*"))), rng=rng
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_evaluation_finds_the_same_figures(trained, tmp_path, rng, digits_dir):
    import shutil

    runs = [shutil.copytree(trained, tmp_path / name) for name in ("whole", "killed")]
    options = ["--metrics=frechet,quality", "--num=96", "--steps=50"]
    commands = [
        [sys.executable, "-m", "diffjax", "evaluate", f"--workdir={run}", *options] for run in runs
    ]
    run_killed(commands[0], times=0, done=None, rng=rng)
    folder = runs[1] / "eval" / "partial" / "images" / "done"
    run_killed(commands[1], times=2, done=lambda: len(list(folder.glob("0*"))), rng=rng)
    for name in ("frechet", "quality"):
        figures = [json.loads((run / "eval" / f"{name}.json").read_text()) for run in runs]
        assert figures[0] == figures[1]
    assert not (runs[1] / "eval" / "partial").exists()

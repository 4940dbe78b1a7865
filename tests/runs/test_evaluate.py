"""Distances of a run's samples: right, resumable bit for bit, and honest about the network."""

import hashlib
import json

import jax
import numpy as np
import pytest
import scipy.linalg

import diffjax as dj
from diffjax.cli import feature_net as feature_net_cli
from diffjax.cli.main import main
from diffjax.data import digits_source
from diffjax.metrics import inception
from diffjax.metrics.inception import Outputs
from diffjax.runs import extractors, gather, stats
from diffjax.runs.evaluation import Evaluation
from diffjax.runs.feature_net import train_feature_net
from diffjax.runs.workdir import RunError, load_config

NUM = 21  # samples: three batches of 8, the last of 5


@pytest.fixture(scope="module")
def net_file(tmp_path_factory, digits_dir, compilation_cache):
    path = tmp_path_factory.mktemp("net") / "net.npz"
    trained = train_feature_net(
        load_config("digits:quick"), path, steps=40, batch_size=32, width=8, stages=2, dim=12
    )
    assert trained.path == path
    assert 0.15 < trained.accuracy < 1
    return path


@pytest.fixture(scope="module")
def extractor(net_file):
    return extractors.load_feature_net(net_file, (8, 8, 1), 17)


@pytest.fixture(scope="module")
def digits(digits_dir):
    return digits_source("train").images


def features_of(extractor, images):
    return np.asarray(extractor(images).features, np.float64)


def by_sqrtm(a, b):
    """The published formula on two sets of features."""
    (m, c), (n, d) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
    return np.sum((m - n) ** 2) + np.trace(c + d - 2 * np.real(scipy.linalg.sqrtm(c @ d)))


def test_statistics_of_a_whole_split(extractor, digits, tmp_path):
    """In batches of 400 with a tail of 237: NumPy's mean and covariance of all 1,437."""
    found = stats.of_split(
        load_config("digits:quick"), "train", extractor, keep=True, batch_size=400
    )
    f = features_of(extractor, digits)
    assert found.num == len(digits) == 1437
    np.testing.assert_allclose(found.mean, f.mean(0), atol=1e-5 * f.std())
    np.testing.assert_allclose(found.cov, np.cov(f.T), atol=1e-5 * f.var())
    np.testing.assert_allclose(found.features, f, atol=1e-5)
    hashes = [
        hashlib.sha256(i.to_bytes(8, "little") + image.tobytes()) for i, image in enumerate(digits)
    ]
    digest = sum(int(found.hexdigest(), 16) for found in hashes) % 2**256
    known = found.provenance
    assert known["images_sha256_sum"] == f"{digest:064x}"
    assert known["dataset"].startswith("digits") and known["split"] == "train"
    assert known["range"] == "levels 0 to 16 as 0 to 255"
    stats.write_stats(tmp_path / "s.npz", found)
    again = stats.read_stats(tmp_path / "s.npz", extractor)
    np.testing.assert_array_equal(again.cov, found.cov)
    assert again.provenance == json.loads(json.dumps(known))
    other = extractors.Extractor(
        extractor.call, extractor.provenance | {"weights_sha256": "another"}
    )
    with pytest.raises(RunError, match="was made with .*weights_sha256"):
        stats.read_stats(tmp_path / "s.npz", other)


def test_distances_of_samples(trained, net_file, extractor, digits):
    found = dj.evaluate(trained, ("frechet", "pr"), num=NUM, feature_net=net_file, seed=3)
    key = jax.random.fold_in(jax.random.key(3), 1)
    drawn = features_of(extractor, dj.load(trained).sample(key, NUM))
    real = features_of(extractor, digits)
    frechet = found["frechet"]
    np.testing.assert_allclose(frechet["distance"], by_sqrtm(drawn, real), rtol=1e-3)
    assert (frechet["n"], frechet["reference_images"]) == (NUM, 1437)
    assert "not a FID" in frechet["of"]
    # The definition of precision, by all distances.
    to_real = np.linalg.norm(drawn[:, None] - real[None], axis=2)
    among = np.linalg.norm(real[:, None] - real[None], axis=2)
    radii = np.sort(among, axis=1)[:, 3]
    precision = np.mean((to_real <= radii[None]).any(axis=1))
    assert abs(found["pr"]["precision"] - precision) < 1.5 / NUM
    assert not (trained / "eval" / "partial").exists()
    assert list((trained / "eval").glob("reference_*.npz"))


def small_inception(*_, **__):
    """A stand-in for Inception: fixed random features and logits of the pixels."""
    weights = jax.random.normal(jax.random.key(5), (64, 6)) / 8

    @jax.tree_util.Partial
    def call(images):
        x = images.reshape(images.shape[0], -1).astype(float) @ weights
        return Outputs(x, 2 * x[:, :4])

    provenance = {
        "features": "stand-in", "image_shape": [8, 8, 1], "levels": 17,
        "weights_sha256": "none", "input": "pytorch_fid",
    }  # fmt: skip
    return extractors.Extractor(call, provenance)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(extractors, "load_inception", small_inception)
    return small_inception()


def test_inception_metrics_of_given_samples(trained, stand_in, digits, tmp_path):
    """fid, is and kid against NumPy, on 50 given images."""
    drawn = digits[:50]
    np.savez(tmp_path / "drawn.npz", images=drawn)
    found = dj.evaluate(trained, ("fid", "is", "kid"), samples=tmp_path / "drawn.npz", splits=5)
    outputs = stand_in(drawn)
    a, b = (features_of(stand_in, x) for x in (drawn, digits))
    np.testing.assert_allclose(found["fid"]["distance"], by_sqrtm(a, b), rtol=1e-3)
    scores = []
    for part in np.split(np.asarray(jax.nn.softmax(outputs.logits), np.float64), 5):
        marginal = part.mean(axis=0)[None]
        scores.append(np.exp(np.sum(part * np.log(part / marginal), axis=1).mean()))
    np.testing.assert_allclose(found["is"]["splits"], scores, rtol=1e-5)
    np.testing.assert_allclose(found["is"]["std"], np.std(scores), rtol=1e-3)
    assert (found["kid"]["blocks"], found["kid"]["subset_size"]) == (2, 50)
    assert found["fid"]["of"] == "stand-in"


class Stopped(Exception):
    pass


def run_of(trained, folder, progress=lambda done: None, **options):
    return Evaluation(
        dj.load(trained), num=NUM, splits=3, folder=folder, progress=progress, **options
    )


def counted(monkeypatch):
    """Counts the images that a model draws."""
    from diffjax.runs.model import Model

    drawn, sample = [], Model.sample

    def counting(self, key, num, **options):
        drawn.append(num)
        return sample(self, key, num, **options)

    monkeypatch.setattr(Model, "sample", counting)
    return drawn


def test_stopped_and_gone_on_is_uninterrupted(trained, stand_in, tmp_path, monkeypatch):
    """Stopped after the second of three batches: all of it the same, bit for bit."""
    monkeypatch.setitem(gather.gather.__kwdefaults__, "every", 1)
    whole = run_of(trained, tmp_path / "a").gathered(stand_in, keep=True)

    def stop(done):
        if done == 16:
            raise Stopped

    drawn = counted(monkeypatch)
    with pytest.raises(Stopped):
        run_of(trained, tmp_path / "b", stop).gathered(stand_in, keep=True)
    assert len(drawn) == 2
    on = run_of(trained, tmp_path / "b").gathered(stand_in, keep=True)
    assert len(drawn) == 3
    assert on.num == whole.num == NUM
    assert on.digest == whole.digest
    jax.tree.map(np.testing.assert_array_equal, on.moments, whole.moments)
    jax.tree.map(np.testing.assert_array_equal, on.scores, whole.scores)
    np.testing.assert_array_equal(on.features, whole.features)
    # Another seed is another set of samples: nothing of the state is used.
    other = run_of(trained, tmp_path / "b", seed=1).gathered(stand_in, keep=True)
    assert len(drawn) == 6
    assert other.digest != whole.digest


def test_a_stop_between_features_and_state_loses_nothing(trained, stand_in, tmp_path, monkeypatch):
    """The features of a batch are written, its state is not: the batch is done again, once."""
    monkeypatch.setitem(gather.gather.__kwdefaults__, "every", 1)
    whole = run_of(trained, tmp_path / "a").gathered(stand_in, keep=True)
    write, written = gather.write_npz, []

    def failing(path, arrays):
        written.append(path.name)
        if written.count("state.npz") == 2:
            raise OSError("disk full")
        write(path, arrays)

    monkeypatch.setattr(gather, "write_npz", failing)
    with pytest.raises(OSError, match="disk full"):
        run_of(trained, tmp_path / "b").gathered(stand_in, keep=True)
    monkeypatch.setattr(gather, "write_npz", write)
    on = run_of(trained, tmp_path / "b").gathered(stand_in, keep=True)
    assert on.num == NUM
    np.testing.assert_array_equal(on.features, whole.features)


def test_bits_per_dim_keeps_every_solve(trained):
    found = dj.evaluate(trained, ("bpd",), limit=5, repeats=2, probe_repeats=2)["bpd"]
    with np.load(trained / "eval" / "bpd.npz") as archive:
        draws, nfe = archive["draws"], archive["nfe"]
    assert draws.shape == nfe.shape == (5, 2, 2)
    np.testing.assert_allclose(found["mean"], draws.mean(), rtol=1e-6)
    per_image = draws.mean(axis=(1, 2))
    np.testing.assert_allclose(
        found["standard_error"], per_image.std(ddof=1) / np.sqrt(5), rtol=1e-4
    )
    probe = draws.var(axis=2, ddof=1).mean() / 20
    np.testing.assert_allclose(found["probe_error"] ** 2, probe, rtol=1e-3)
    assert found["nfe"] == pytest.approx(nfe.mean())


def test_missing_and_foreign_networks(trained, net_file, tmp_path, monkeypatch):
    monkeypatch.delenv(extractors.VARIABLE, raising=False)
    for metric in ("fid", "is", "kid", "pr"):
        with pytest.raises(RunError, match=r"pt_inception-2015-12-05.*--inception=PATH"):
            dj.evaluate(trained, (metric,), num=8)
    monkeypatch.setenv(extractors.VARIABLE, str(tmp_path / "absent.npz"))
    with pytest.raises(RunError, match="There is no file .*absent.npz"):
        dj.evaluate(trained, ("fid",), num=8)
    np.savez(tmp_path / "few.npz", **{"fc.bias": np.zeros(1008, np.float32)})
    with pytest.raises(RunError, match="283 tensors|tensors are missing"):
        extractors.load_inception(tmp_path / "few.npz", (8, 8, 1))
    with pytest.raises(RunError, match="was trained for"):
        extractors.load_feature_net(net_file, (32, 32, 3))
    with pytest.raises(RunError, match="is no network of scripts/train_feature_net"):
        extractors.load_feature_net(tmp_path / "few.npz", (8, 8, 1))
    with pytest.raises(RunError, match="must end in .npz"):
        train_feature_net(load_config("digits:quick"), tmp_path / "net.pth")


def test_the_commands(capsys, trained, tmp_path, digits_dir):
    """Train a network, write statistics, measure against them: three commands."""
    net, reference = tmp_path / "net.npz", tmp_path / "reference.npz"
    small = ["--steps=5", "--batch_size=16", "--width=8", "--stages=1", "--dim=6"]
    code = feature_net_cli.run(
        ["train_feature_net", "--config=digits:quick", f"--out={net}", *small]
    )
    assert code == 0
    assert "of the held-out images rightly" in capsys.readouterr().out
    stats_command = ["diffjax", "evaluate", "stats", "--config=digits:quick", "--split=eval"]
    assert main([*stats_command, f"--feature_net={net}", f"--out={reference}"]) == 0
    assert "360 images" in capsys.readouterr().out
    with np.load(reference) as archive:
        assert archive["sigma"].shape == (6, 6)
        assert json.loads(str(archive["provenance"]))["split"] == "eval"
        assert "features" not in archive
    evaluate = ["diffjax", "evaluate", f"--workdir={trained}", "--num=8", f"--feature_net={net}"]
    assert main([*evaluate, "--metrics=frechet", f"--reference={reference}"]) == 0
    out = capsys.readouterr().out
    assert "of 8 samples to 360 images" in out
    assert "not a FID" in out
    assert main([*evaluate, "--metrics=pr", f"--reference={reference}"]) == 2
    assert "--keep_features" in capsys.readouterr().err
    assert main(["diffjax", "evaluate", "stats", "--out=x.npz"]) == 2
    assert "--config is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_inception_from_a_file(tmp_path):
    """The whole way from the tensors of a file to features of grey 17-level images."""
    from tests.metrics.numpy_inception import forward, random_state

    state = random_state(np.random.default_rng(0))
    np.savez(tmp_path / "weights.npz", **state)
    extractor = extractors.load_inception(tmp_path / "weights.npz", (8, 8, 1), 17)
    assert not extractor.provenance["published_file"]
    assert extractor.sizes == (2048, 1008)
    images = np.random.default_rng(1).integers(0, 17, (2, 8, 8, 1)).astype(np.uint8)
    x = np.repeat(images.astype(np.float32) / 8 - 1, 3, axis=3)
    x = inception.bilinear(x, 299, half_pixels=True)
    features, logits = forward(state, np.asarray(x).transpose(0, 3, 1, 2))
    got = extractor(images)
    np.testing.assert_allclose(got.features, features, atol=2e-3 * features.std(), rtol=2e-3)
    np.testing.assert_allclose(got.logits, logits, atol=2e-3 * logits.std(), rtol=2e-3)

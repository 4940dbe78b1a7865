"""The metrics of samples: distances in a network's features, and what a small judge makes of them.

`fid`, `is` and `kid` are in the features and logits of FID's Inception network and of no other.
`pr` takes Inception where its weights are given, else the network of `scripts/train_feature_net`;
`frechet` takes that network where it is given, else a small classifier trained on the spot. Both
name what they took.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array
from diffjax.metrics import classifier_score, frechet, kernel, moments, neighbours, quality
from diffjax.runs import spread
from diffjax.runs.evaluation import Evaluation, Figures
from diffjax.runs.extractors import Extractor


def fid(run: Evaluation) -> Figures:
    """The Fréchet distance in Inception's features from the samples to the training split."""
    return _distance(run, run.inception())


def inception_score(run: Evaluation) -> Figures:
    """The Inception Score of the samples: mean and standard deviation over the splits."""
    extractor = run.inception()
    found = classifier_score.score(run.gathered(extractor, keep=False).scores)
    return {
        "mean": found.mean,
        "std": found.std,
        "splits": [float(s) for s in found.splits],
        "num_splits": len(found.splits),
    } | _about(run, extractor)


def kid(run: Evaluation) -> Figures:
    """The kernel distance in Inception's features, over blocks of at most 1,024 and over subsets.

    Both sets are put in random order first, as blocks need.
    """
    extractor = run.inception()
    real, drawn = _features(run, extractor)
    keys = jax.random.split(jax.random.fold_in(run.key, 7), 3)
    x = jax.random.permutation(keys[1], jnp.asarray(real))
    y = jax.random.permutation(keys[0], jnp.asarray(drawn))
    blocks = jax.jit(kernel.in_blocks)(x, y)
    size = min(1000, len(x), len(y))
    subsets = jax.jit(kernel.in_subsets, static_argnames="size")(keys[2], x, y, size=size)
    error = float(blocks.stderr)
    return {
        "distance": float(blocks.mean),
        "standard_error": None if np.isnan(error) else error,
        "blocks": len(blocks.parts),
        "subsets_mean": float(subsets.mean),
        "subsets_std": float(subsets.std),
        "subset_size": size,
        "reference_images": len(real),
    } | _about(run, extractor)


def precision_recall(run: Evaluation) -> Figures:
    """Precision and recall (k = 3), density and coverage (k = 5) against the training split."""
    extractor = run.feature_net()
    if extractor is None or run.has_inception():
        extractor = run.inception()
    real, drawn = _features(run, extractor)
    found = jax.jit(neighbours.compare)(real, drawn)
    figures = {name: float(value) for name, value in found._asdict().items()}
    return figures | {"reference_images": len(real)} | _about(run, extractor)


def frechet_distance(run: Evaluation) -> Figures:
    """The Fréchet distance in the features of a network trained here; never a FID."""
    extractor = run.feature_net()
    return _by_judge(run) if extractor is None else _distance(run, extractor)


def _distance(run: Evaluation, extractor: Extractor) -> Figures:
    drawn = run.gathered(extractor, keep=False)
    reference = run.reference(extractor, keep=False)
    mean, cov = frechet.gaussian("of the samples", drawn.moments)
    return {
        "distance": frechet.gaussian_distance(mean, cov, reference.mean, reference.cov),
        "reference_images": reference.num,
        "reference": reference.provenance.get("dataset"),
    } | _about(run, extractor)


def _about(run: Evaluation, extractor: Extractor) -> Figures:
    """How many samples, and the network."""
    kept = ("weights_sha256", "published_file", "input")
    return {
        "n": run.sample_batches().num,
        "features": extractor.sizes[0],
        "of": extractor.name,
    } | {k: extractor.provenance[k] for k in kept if k in extractor.provenance}


def _features(run: Evaluation, extractor: Extractor) -> tuple[np.ndarray, np.ndarray]:
    """Features of the reference and of the samples."""
    real = run.reference(extractor, keep=True).features
    drawn = run.gathered(extractor, keep=True).features
    assert real is not None and drawn is not None  # asked to be kept
    return real, drawn


def _by_judge(run: Evaluation) -> Figures:
    """The distance of n samples to n held-out images, averaged over draws of both."""
    splits = 10
    (real, _), (drawn, _) = (_judged(run, x) for x in (run.real("eval")[0], run.samples()))
    n = min(len(real) // 2, len(drawn))
    dim = real.shape[1]

    def of(features, key):
        chosen = jax.random.permutation(key, len(features))[:n]
        return moments.update(moments.zeros(dim), features[chosen])

    distances = []
    for i in range(splits):
        k1, k2 = jax.random.split(jax.random.fold_in(run.key, 100 + i))
        distances.append(frechet.frechet_distance(of(drawn, k1), of(real, k2)))
    reference = frechet.split_reference(jax.random.fold_in(run.key, 6), real, n, splits)
    return {
        "distance": float(np.mean(distances)),
        "real_versus_real": reference.mean,
        "real_versus_real_std": reference.std,
        "n": n,
        "features": dim,
        "of": "a small classifier trained on the training split; not a FID",
    }


def _judged(run: Evaluation, images: np.ndarray) -> tuple[Array, Array]:
    """The judge's features (B, F) and probabilities (B, K), on all devices of this process."""
    judge = run.judge()

    def look(images: Array) -> tuple[Array, Array]:
        seen = run.centred(images)
        return judge.features(seen), judge.probabilities(seen)

    features, probabilities = spread.over_rows(spread.local_mesh(), look, images)
    return jnp.asarray(features), jnp.asarray(probabilities)


def sample_quality(run: Evaluation) -> Figures:
    """What the judge makes of the samples, beside held-out images."""
    train, heldout, drawn = jnp.asarray(run.real("train")[0]), run.real("eval")[0], run.samples()
    (_, real_p), (_, drawn_p) = (_judged(run, images) for images in (heldout, drawn))
    shares = np.asarray(quality.class_shares(drawn_p))
    nearest = [float(quality.nearest_distance(jnp.asarray(x), train)) for x in (drawn, heldout)]
    recognised = [float(quality.recognised_share(p)) for p in (drawn_p, real_p)]
    return {
        "samples": len(drawn),
        "recognised": recognised[0],
        "recognised_real": recognised[1],
        "recognised_ratio": recognised[0] / recognised[1],
        "class_shares": [round(float(s), 4) for s in shares],
        "least_class_share": float(shares.min()),
        "largest_class_share": float(shares.max()),
        "nearest_train": nearest[0],
        "nearest_train_real": nearest[1],
        "nearest_ratio": nearest[0] / nearest[1],
    }

"""What the metrics of one evaluation share: the model, the images, the samples, the networks."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffjax import builders
from diffjax.core import random
from diffjax.metrics import classifier
from diffjax.runs import digests, extractors, hosts, stats
from diffjax.runs.extractors import Extractor
from diffjax.runs.gather import Gathered, gather
from diffjax.runs.model import Model
from diffjax.runs.shards import Shards, Stored, claim
from diffjax.runs.workdir import RunError

Figures = dict[str, Any]


class Evaluation:
    """Made once when first asked for, and kept.

    seed: of everything drawn here. num: images to sample. limit: held-out images for likelihoods.
    samples: uint8 levels, or shards of them, to judge instead of drawing any. inception,
    feature_net: files of weights, see `runs.extractors`. inception_input: how images reach
    Inception. reference: a file of statistics instead of the training split's. splits: of the
    Inception Score. repeats, probe_repeats: of bits/dim. folder: where parts of a long evaluation
    are kept; None keeps none.
    """

    def __init__(
        self,
        model: Model,
        *,
        seed: int = 0,
        num: int | None = None,
        limit: int | None = None,
        samples: np.ndarray | Stored | None = None,
        inception: str | Path | None = None,
        inception_input: str = "pytorch_fid",
        feature_net: str | Path | None = None,
        reference: str | Path | None = None,
        splits: int = 1,
        repeats: int = 1,
        probe_repeats: int = 1,
        score_sde_protocol: bool = False,
        folder: Path | None = None,
        progress: Callable[[int], None] = lambda done: None,
        **sampling: Any,
    ):
        self.model = model
        self.key = jax.random.key(seed)
        self.seed = seed
        self.num = num or model.config.eval.num_samples
        self.limit = limit
        self.splits = splits
        self.repeats, self.probe_repeats = repeats, probe_repeats
        self.score_sde_protocol = score_sde_protocol
        self.folder = folder
        self.sampling = sampling
        self._samples = samples
        self._files = {"inception": inception, "feature_net": feature_net, "reference": reference}
        self._inception_input = inception_input
        self._progress = progress
        self._cache: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def real(self, split: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(images, labels or None) of "train" or "eval", uint8 levels."""
        from diffjax.data import in_memory

        def read():
            held = in_memory(builders.build_source(self.model.config, split))
            return held.images, held.labels

        return self._once(split, read)

    def heldout(self) -> tuple[np.ndarray, np.ndarray | None]:
        """(images, labels) of the likelihoods, the first `limit`; labels if the model needs any."""
        images, labels = self.real("eval")
        if self.model.parts.num_classes is None:
            labels = None
        return images[: self.limit], None if labels is None else labels[: self.limit]

    def labels(self) -> np.ndarray | None:
        """The classes of the samples in turn, (num,); None for an unconditional model."""
        classes = self.model.parts.num_classes
        return None if classes is None else np.arange(self.num) % classes

    def samples(self) -> np.ndarray:
        """The samples to judge, all at once, uint8 levels; from where a call was stopped."""

        def draw():
            batches = self.sample_batches()
            kept = self._kept(batches)
            own, done = [], 0
            for k in hosts.share(len(batches)):
                if kept is not None and kept.entry(k) is not None:
                    own.append(kept.read(k))
                else:
                    images, mask = batches[k]
                    own.append(images[mask])
                    if kept is not None:
                        kept.write(k, own[-1], None)
                done += len(own[-1])
                self._progress(done)
            return hosts.in_order(own, len(batches))

        if self._samples is not None:
            return self._samples[np.arange(len(self._samples))]
        return self._once("samples", draw)

    def _kept(self, batches: "SampleBatches") -> Shards | None:
        """Where the batches are kept until the evaluation ends; those of other samples are not."""
        if self.folder is None:
            return None
        folder = self.folder / "partial" / "images"
        parts = self.model.parts
        shape, levels = parts.image_shape, parts.quantisation.levels
        kept = Shards(folder, "npz", batches.num, batches.size, shape, levels)
        if hosts.is_first():
            try:
                claim(kept, batches.fingerprint())
            except RunError:
                shutil.rmtree(folder)
        hosts.all_agree(True)  # returns when the first has made room
        claim(kept, batches.fingerprint())
        return kept

    def sample_batches(self) -> "SampleBatches":
        """The same samples batch by batch, drawn when asked for and not kept."""
        return SampleBatches(self, self._samples)

    def centred(self, images: ArrayLike) -> jax.Array:
        """Levels in [-1, 1], whatever the model's own range: what the judge sees."""
        levels = self.model.parts.quantisation.levels
        return jnp.asarray(images, jnp.float32) * (2 / (levels - 1)) - 1

    def judge(self) -> classifier.Classifier:
        """A classifier of the training split. Raises RunError for data without labels."""

        def train():
            images, labels = self.real("train")
            if labels is None:
                raise RunError("The metrics frechet and quality need labelled training images.")
            fit = jax.jit(classifier.train_classifier, static_argnames="num_classes")
            return fit(
                jax.random.fold_in(self.key, 2),
                self.centred(images),
                jnp.asarray(labels),
                num_classes=int(labels.max()) + 1,
            )

        return self._once("judge", train)

    def has_inception(self) -> bool:
        """Whether weights of FID's network were given, by argument or environment."""
        return bool(self._files["inception"] or os.environ.get(extractors.VARIABLE))

    def inception(self) -> Extractor:
        """FID's network. Raises RunError where its weights are not given."""
        parts = self.model.parts
        return self._once(
            "inception",
            lambda: extractors.load_inception(
                self._files["inception"],
                parts.image_shape,
                parts.quantisation.levels,
                input=self._inception_input,
            ),
        )

    def feature_net(self) -> Extractor | None:
        """The network of `scripts/train_feature_net`, where one was given."""
        path, parts = self._files["feature_net"], self.model.parts
        if path is None:
            return None
        return self._once(
            "feature_net",
            lambda: extractors.load_feature_net(path, parts.image_shape, parts.quantisation.levels),
        )

    def gathered(self, extractor: Extractor, *, keep: bool) -> Gathered:
        """Sums over the samples, and their features with `keep`; from where a call was stopped."""
        kept = self._cache.get(f"gathered {extractor.name}")
        if kept is None or (keep and kept.features is None):
            batches = self.sample_batches()
            kept = gather(
                extractor,
                batches,
                total=batches.num,
                splits=self.splits,
                keep=keep,
                folder=self._part("samples", extractor),
                fingerprint=batches.fingerprint() | {"extractor": extractor.provenance},
                progress=self._progress,
            )
            self._cache[f"gathered {extractor.name}"] = kept
        return kept

    def reference(self, extractor: Extractor, *, keep: bool) -> stats.Statistics:
        """Statistics of the training split, or of the file given; with features if `keep`.

        What had to be computed is written to eval/reference_<network>.npz and found there again.
        """
        given = self._files["reference"]
        known: stats.Statistics | None = self._cache.get(f"reference {extractor.name}")
        if known is None and given is not None:
            known = stats.read_stats(given, extractor)
        own = None if self.folder is None else self.folder / f"reference_{_short(extractor)}.npz"
        if known is None and own is not None and hosts.all_agree(own.is_file()):
            known = stats.read_stats(own, extractor)
        if known is not None and keep and known.features is None and given is not None:
            raise RunError(
                f"{given} has no features, which kid and pr need; write it with --keep_features, "
                "or leave --reference out."
            )
        if known is None or (keep and known.features is None):
            known = stats.of_split(
                self.model.config,
                "train",
                extractor,
                keep=keep,
                folder=self._part("reference", extractor),
                progress=self._progress,
            )
            if own is not None:
                stats.write_stats(own, known)
        self._cache[f"reference {extractor.name}"] = known
        return known

    def _part(self, name: str, extractor: Extractor) -> Path | None:
        folder = self.folder
        return None if folder is None else folder / "partial" / f"{name}_{_short(extractor)}"


def _short(extractor: Extractor) -> str:
    """A few letters that tell extractors apart in file names."""
    return hashlib.sha256(repr(sorted(extractor.provenance.items())).encode()).hexdigest()[:8]


class SampleBatches:
    """The samples of an evaluation as (images, mask), each batch a function of its number."""

    def __init__(self, run: Evaluation, given: np.ndarray | Stored | None):
        self._run, self._given = run, given
        self.num = run.num if given is None else len(given)
        self.size = min(self.num, run.model.config.eval.batch_size)

    def __len__(self) -> int:
        return -(-self.num // self.size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        run = self._run
        places = index * self.size + np.arange(self.size)
        mask = places < self.num
        # The tail is filled with repeats, so that every batch is one compiled shape.
        places = np.minimum(places, self.num - 1)
        if self._given is not None:
            return self._given[places], mask
        keys = random.sample_keys(jax.random.fold_in(run.key, 1), self.num)[places]
        labels = run.labels()
        labels = None if labels is None else labels[places]
        images = run.model.sample(
            keys, self.size, labels=labels, batch_size=self.size, **run.sampling
        )
        return images, mask

    def fingerprint(self) -> dict[str, Any]:
        """What the samples depend on, as plain values."""
        if self._given is not None:
            given = self._given
            digest = given.digest if isinstance(given, Stored) else digests.of_tree(given)
            return {"images": digest, "batch_size": self.size}
        sampling = sorted(self._run.sampling.items())
        return {
            "step": self._run.model.step,
            "weights_sha256": digests.of_tree(self._run.model.params),
            "seed": self._run.seed,
            "num": self.num,
            "batch_size": self.size,
            "sampling": {k: digests.without_addresses(repr(v)) for k, v in sampling},
        }

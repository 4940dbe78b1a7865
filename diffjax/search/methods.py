"""How candidates are searched: by the gradient, by evolution, by a predictor of the score.

A method is a value with `search(key, problem) -> Found`. It sees a problem through `score` and the
functions of the space alone.

    Gradient          Adam on the candidate's numbers, with the gradient through the whole solve.
    Evolution         keep the best `parents` of a population; children by crossover, by mutation
                      and at random fill it again [1].
    PredictorSearch   score a few candidates, fit a small network to their order, propose many by
                      mutation and crossover of the best, score those that it ranks first, and
                      again [2, 3].

The first needs a few hundred scores with their gradients and a smooth objective, and is the best of
the three where it applies; the others need scores alone, so a table of solvers, a stochastic solver
and a statistic such as a Frechet distance will do. All return the best candidate that they scored,
the first included, so none is worse than the start on the starts that it searched with.

References:
[1] Li et al., "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for
    Automated Diffusion Model Acceleration", 2023, https://arxiv.org/abs/2309.10438.
[2] Liu et al., "OMS-DPM: Optimizing the Model Schedule for Diffusion Probabilistic Models", 2023,
    https://arxiv.org/abs/2306.08860 (a predictor trained on pairs' order).
[3] Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic
    Models", 2023, https://arxiv.org/abs/2312.07243 (S^3: search in rounds).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, Key, Number
from diffjax.search.space import Candidate, Space


class Problem(NamedTuple):
    """space: what may change. score: candidate -> (), compiled; lower is better, NaN is worst.

    gradient: candidate, (k,) indices of starts -> (score on them, its gradient), compiled. starts:
    how many there are.
    """

    space: Space
    score: Callable[[Candidate], Array]
    gradient: Callable[[Candidate, Array], tuple[Array, Candidate]]
    starts: int


class Found(NamedTuple):
    """candidate: the best. score: its score. scored: how many scores it took; a gradient counts 3
    times its share of the starts (the solve, and backwards the solve again and its derivative).
    """

    candidate: Candidate
    score: float
    scored: float


class Method(Protocol):
    """See the module's docstring."""

    def search(self, key: Key, problem: Problem) -> Found: ...


class _Archive:
    """Every candidate scored so far, best first on demand."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.entries: list[tuple[float, Candidate]] = []

    def add(self, candidate: Candidate) -> None:
        score = float(self.problem.score(candidate))
        self.entries.append((score if np.isfinite(score) else np.inf, candidate))

    def best(self, k: int) -> list[tuple[float, Candidate]]:
        return sorted(self.entries, key=lambda entry: entry[0])[:k]

    def found(self, extra: float = 0.0) -> Found:
        score, candidate = self.best(1)[0]
        return Found(candidate, score, len(self.entries) + extra)


@pytree
class Gradient:
    """Adam on the candidate. steps: updates. learning_rate: of the logits of a grid, falling to 0
    along a cosine. batch: starts in an update, drawn anew each time. looks: how often the candidate
    is scored on all starts on the way.
    """

    steps: int = static(default=200)
    learning_rate: Number = 0.05
    batch: int = static(default=64)
    looks: int = static(default=10)

    def __post_init__(self):
        checks.at_least("steps", self.steps, 1)
        checks.positive("learning_rate", self.learning_rate)
        checks.at_least("batch", self.batch, 1)
        checks.at_least("looks", self.looks, 1)

    def search(self, key: Key, problem: Problem) -> Found:
        """Raises ValueError for a candidate that is not all floating point."""
        import optax

        leaves = jax.tree.leaves(problem.space.first)
        if not all(jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in leaves):
            raise ValueError(
                "Gradient() needs candidates of floating-point numbers; use Evolution() or "
                "PredictorSearch() for tables of choices."
            )
        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))
        candidate = problem.space.first
        state = optimizer.init(candidate)
        archive = _Archive(problem)
        archive.add(candidate)
        size = min(self.batch, problem.starts)

        @jax.jit
        def update(candidate, state, slope):
            # One gradient that overflows must not end the search.
            slope = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), slope)
            change, state = optimizer.update(slope, state)
            return optax.apply_updates(candidate, change), state

        every = max(self.steps // self.looks, 1)
        for i in range(self.steps):
            own = jax.random.fold_in(key, i)
            index = jax.random.choice(own, problem.starts, (size,), replace=False)
            _, slope = problem.gradient(candidate, index)
            candidate, state = update(candidate, state, slope)
            if (i + 1) % every == 0 or i + 1 == self.steps:
                archive.add(candidate)
        return archive.found(3 * self.steps * size / problem.starts)


@pytree
class Evolution:
    """Evolutionary search. population: candidates alive at once. generations: rounds after the
    first. parents: those that breed and survive. crossed, mutated: shares of the children; the rest
    is drawn at random.
    """

    population: int = static(default=24)
    generations: int = static(default=10)
    parents: int = static(default=6)
    crossed: Number = 0.4
    mutated: Number = 0.5

    def __post_init__(self):
        checks.at_least("population", self.population, 2)
        checks.at_least("generations", self.generations, 1)
        checks.at_least("parents", self.parents, 1)
        checks.less("parents", self.parents, "population", self.population)
        checks.in_range("crossed", self.crossed, 0.0, 1.0)
        checks.in_range("crossed + mutated", self.crossed + self.mutated, 0.0, 1.0)

    def search(self, key: Key, problem: Problem) -> Found:
        """population + generations (population - parents) scores."""
        space, archive = problem.space, _Archive(problem)
        archive.add(space.first)
        keys = iter(jax.random.split(key, self.population * (self.generations + 1)))
        for _ in range(self.population - 1):
            archive.add(space.random(next(keys)))
        for _ in range(self.generations):
            parents = [candidate for _, candidate in archive.best(self.parents)]
            for _ in range(self.population - self.parents):
                archive.add(breed(next(keys), space, parents, self.crossed, self.mutated))
        return archive.found()


def breed(
    key: Key, space: Space, parents: list[Candidate], crossed: Number, mutated: Number
) -> Candidate:
    """A child by crossover, by mutation or at random, with these chances."""
    choose, first, second, vary = jax.random.split(key, 4)
    u = float(jax.random.uniform(choose))
    a = parents[int(jax.random.randint(first, (), 0, len(parents)))]
    if u < crossed:
        b = parents[int(jax.random.randint(second, (), 0, len(parents)))]
        return space.cross(vary, a, b)
    return space.mutate(vary, a) if u < crossed + mutated else space.random(vary)


@pytree
class PredictorSearch:
    """Search by a predictor. initial: candidates scored before the first fit. rounds: fits.
    proposals: candidates that the predictor ranks in a round. scored: those of them that are
    scored. hidden, steps, learning_rate: of the predictor and its training.
    """

    initial: int = static(default=32)
    rounds: int = static(default=4)
    proposals: int = static(default=256)
    scored: int = static(default=16)
    parents: int = static(default=8)
    hidden: int = static(default=32)
    steps: int = static(default=300)
    learning_rate: Number = 1e-2

    def __post_init__(self):
        for name in ("initial", "rounds", "proposals", "scored", "parents", "hidden", "steps"):
            checks.at_least(name, getattr(self, name), 1)
        checks.positive("learning_rate", self.learning_rate)

    def search(self, key: Key, problem: Problem) -> Found:
        """initial + rounds * scored scores."""
        space, archive = problem.space, _Archive(problem)
        start, *rounds = jax.random.split(key, self.rounds + 1)
        archive.add(space.first)
        for own in jax.random.split(start, self.initial)[1:]:
            archive.add(space.random(own))
        describe = jax.jit(space.features)
        for own in rounds:
            fit, propose = jax.random.split(own)
            known = [e for e in archive.entries if np.isfinite(e[0])]
            features = jnp.stack([describe(candidate) for _, candidate in known])
            rank = self._fit(fit, features, jnp.asarray([score for score, _ in known]))
            parents = [candidate for _, candidate in archive.best(self.parents)]
            proposed = [
                breed(k, space, parents, 0.3, 0.6)
                for k in jax.random.split(propose, self.proposals)
            ]
            predicted = np.asarray(rank(jnp.stack([describe(c) for c in proposed])))
            for i in np.argsort(predicted, kind="stable")[: self.scored]:
                archive.add(proposed[i])
        return archive.found()

    def _fit(self, key: Key, features: Array, scores: Array) -> Callable[[Array], Array]:
        """A two-layer network whose order of the features is that of their scores."""
        import optax

        centre, scale = jnp.mean(features, 0), jnp.std(features, 0) + 1e-6
        first, second = jax.random.split(key)
        width = features.shape[1]
        weights: Any = {
            "in": jax.random.normal(first, (width, self.hidden)) / width**0.5,
            "shift": jnp.zeros((self.hidden,)),
            "out": jax.random.normal(second, (self.hidden,)) / self.hidden**0.5,
        }
        worse = (scores[:, None] > scores[None]).astype(features.dtype)

        def rank(weights, features):
            inner = (features - centre[None]) / scale[None] @ weights["in"]
            return jnp.tanh(inner + weights["shift"][None]) @ weights["out"]

        def loss(weights):
            ranks = rank(weights, features)
            # Each pair's order by logistic regression; the decay keeps few scores from overfitting.
            pairs = jnp.sum(worse * jax.nn.softplus(ranks[None] - ranks[:, None]))
            return pairs / jnp.maximum(jnp.sum(worse), 1) + 1e-3 * optax.tree.norm(
                weights, squared=True
            )

        optimizer = optax.adam(self.learning_rate)

        def update(carry, _):
            weights, state = carry
            change, state = optimizer.update(jax.grad(loss)(weights), state)
            return (optax.apply_updates(weights, change), state), None

        @jax.jit
        def train(weights):
            start = (weights, optimizer.init(weights))
            return jax.lax.scan(update, start, length=self.steps)[0][0]

        trained = train(weights)
        return jax.jit(lambda features: rank(trained, features))

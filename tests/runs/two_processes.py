"""One of several processes of an evaluation; `tests/runs/test_hosts.py` starts them.

python -m tests.runs.two_processes INDEX COUNT PORT WORKDIR NET OUT
"""

import json
import sys

import jax
import numpy as np

NUM = 21  # samples: three batches of 8, the last of 5


def main(index, count, port, workdir, net, out):
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    import diffjax as dj
    from diffjax.metrics import classifier_score, moments
    from diffjax.runs import hosts
    from diffjax.runs.evaluation import Evaluation

    run = Evaluation(dj.load(workdir), num=NUM, splits=3, feature_net=net, seed=3)
    found = run.gathered(run.feature_net(), keep=True)
    score = classifier_score.score(found.scores)
    arrays = {
        "mean": moments.mean(found.moments),
        "cov": moments.cov(found.moments),
        "features": found.features,
        "samples": run.samples(),
        "scores": score.splits,
        "num": found.num,
        "digest": np.frombuffer(bytes.fromhex(found.digest), np.uint8),
        # More processes than batches, rows of several axes, and what only some say.
        "few": hosts.in_order([np.ones((2, 3, 1), np.int8)] * len(hosts.share(1)), 1),
        "agree": [hosts.all_agree(index == 0), hosts.all_agree(True)],
    }
    figures = dj.evaluate(workdir, ("frechet", "pr"), num=NUM, feature_net=net, seed=3)
    np.savez(f"{out}/{index}_of_{count}.npz", **arrays)
    with open(f"{out}/{index}_of_{count}.json", "w") as file:
        json.dump(figures, file)


if __name__ == "__main__":
    index, count, port, *paths = sys.argv[1:]
    main(int(index), int(count), port, *paths)

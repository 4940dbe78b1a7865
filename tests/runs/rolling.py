"""One of two processes whose run meets the bad image of `planted`; `test_rollback` starts it.

python -m tests.runs.rolling --folder=... --at=STEP --coordinator=... --num_processes=2 ...

It trains to the end in `folder`/first and again in `folder`/again, where nothing is asked of it
(--at=0), or once in `folder`/stopped, where the second process gets a SIGTERM during the save of
step STEP, and the save lasts until all know of it.
"""

import os
import signal
import sys
import time
from pathlib import Path

from absl import flags as absl_flags

from diffjax.cli import flags
from tests.runs import planted

NEWS = 4.0  # seconds for the notice to reach all; the service looks for one every second


def main(argv):
    values = absl_flags.FlagValues()
    flags.define_processes(values)
    define = flags.Definer(values)
    define.text("folder", None, "where the runs go")
    define.integer("at", 0, "the step whose save the notice comes in")
    flags.parse(values, argv, "")
    flags.join(values, heed_notices=True)
    from diffjax.runs import hosts, train
    from diffjax.train import telemetry

    telemetry.tensorboard_writer = lambda path: telemetry.MultiWriter()
    config = planted.config("rollback")
    config.mesh.data = hosts.count()
    save, left = train._save, [values.at]

    def save_and_notice(config, checkpointer, course, figures, step, state):
        save(config, checkpointer, course, figures, step, state)
        if left == [step]:
            left.clear()
            checkpointer.wait()  # for the thread that ends the save, too
            hosts.exchange(0)
            if hosts.index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(NEWS)

    train._save = save_and_notice
    for name in ("stopped",) if values.at else ("first", "again"):
        outcome = train.train(config, Path(values.folder) / name, show_progress=False)
        print(name, *outcome, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(flags.guarded("rolling", lambda: main(sys.argv)))

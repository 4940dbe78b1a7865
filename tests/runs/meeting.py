"""One of several processes that meet, compare, and stop; `tests/runs/test_distributed.py`.

python -m tests.runs.meeting --coordinator=... --num_processes=... --process_id=...
"""

import os
import signal
import sys
import time

from absl import flags as absl_flags

from diffjax.cli import flags


def main(argv):
    values = absl_flags.FlagValues()
    flags.define_processes(values)
    flags.parse(values, argv, "")
    flags.join(values, heed_notices=True)
    from diffjax.runs import distributed, hosts

    distributed.check_alike("greeting", "hello")
    try:
        distributed.check_alike("name", f"process {hosts.index()}")
    except ValueError as error:
        print(error)
    with distributed.stop_requested(start=100, n_jitted_steps=2) as stop:
        # The second process is the slower one, and is asked to stop after 5 of its dispatches.
        for dispatch in range(1, 10_000):
            if stop():
                print(f"stopped after dispatch {dispatch}", flush=True)
                break
            if hosts.index() == 1 and dispatch == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01 * (1 + hosts.index()))
    return hosts.exchange(0) and 0


if __name__ == "__main__":
    sys.exit(flags.guarded("meeting", lambda: main(sys.argv)))

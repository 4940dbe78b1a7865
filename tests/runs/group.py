"""Real processes that run one command together on this machine; and what can befall them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from diffjax.train.telemetry import read_jsonl


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(devices):
    """That of a process with so many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


class Group:
    """The processes of one command, with the output of each in a file of `logs`."""

    def __init__(self, logs, count, *command, devices=2):
        logs.mkdir(parents=True, exist_ok=True)
        many = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
        self._logs = [logs / f"{index}.log" for index in range(count)]
        self.processes = []
        for index, log in enumerate(self._logs):
            own = [*many, f"--process_id={index}"] if count > 1 else []
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *own],
                        env=environment(devices),
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, index):
        """What process `index` has written."""
        return self._logs[index].read_text(errors="replace")

    def everything(self):
        return "\n".join(f"--- {i}\n{self.said(i)[-3000:]}" for i in range(len(self.processes)))

    def wait(self, timeout=240):
        """The exit codes, once all have ended."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running:\n{self.everything()}") from None
        return [process.returncode for process in self.processes]

    def reach(self, workdir, step, timeout=240):
        """Returns once the metrics show `step`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            rows = read_jsonl(workdir / "metrics.jsonl") if workdir.exists() else []
            if rows and rows[-1]["step"] >= step:
                return
            assert all(p.poll() is None for p in self.processes), self.everything()
            time.sleep(0.05)
        raise AssertionError(f"step {step} did not come:\n{self.everything()}")

    def kill(self, index):
        """Fault: one process is gone from one moment to the next."""
        self.processes[index].send_signal(signal.SIGKILL)

    def kill_all(self):
        """Fault: as when the power fails."""
        for process in self.processes:
            process.kill()

    def terminate(self, index):
        """Fault: one process is asked to stop."""
        self.processes[index].send_signal(signal.SIGTERM)


@contextlib.contextmanager
def running(logs, count, *command, devices=2):
    """A `Group` that is over when this is left. Another `count` next time is a fault of its own."""
    group = Group(logs, count, *command, devices=devices)
    try:
        yield group
    finally:
        group.kill_all()
        for process in group.processes:
            process.wait()


def finish(logs, count, *command, devices=2):
    """Runs to the end; what process 0 wrote."""
    with running(logs, count, *command, devices=devices) as group:
        assert group.wait() == [0] * count, group.everything()
        return group.said(0)

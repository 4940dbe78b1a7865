"""What the launchers share: their options, and running several processes to one end.

A launcher runs the same `diffjax` command in several processes and ends with one exit code: 0 where
all did, 3 where they stopped after a save, else that of the first to fail.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
STOPPED = 3  # see diffjax.cli.flags
VERBS = ("train", "sample", "evaluate")


def parser(about: str) -> argparse.ArgumentParser:
    """A parser with what all launchers take."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--dry-run", action="store_true", help="print what would be run")
    return found


def parse(found: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, and the diffjax command after them as `command`."""
    found.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="verb ...",
        help="the diffjax command: train, sample or evaluate with its flags",
    )
    options = found.parse_args(argv)
    options.command = options.command[options.command[:1] == ["--"] :]
    if not options.command or options.command[0] not in VERBS:
        found.error(f"the diffjax command comes last and begins with {', '.join(VERBS)}")
    return options


def shown(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A command as a line for a shell."""
    before = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    return " ".join([*before, shlex.join(command)])


class Process(NamedTuple):
    """One of the processes. environment: all of it, None for this one's."""

    command: Sequence[str]
    environment: Mapping[str, str] | None = None


def supervise(
    processes: Sequence[Process], *, grace: float, stop: Callable[[], None] | None = None
) -> int:
    """Runs all to the end and returns one exit code.

    grace: seconds that the others have when one has failed; then they are killed. stop: what a
    SIGTERM or Ctrl-C here does, where the processes are elsewhere; by default SIGTERM goes to all,
    and Ctrl-C reaches them from the terminal. The output of process p > 0 has [p] before each line.
    """
    started = [_start(i, process, stop is not None) for i, process in enumerate(processes)]

    def forward(number: int, frame: object) -> None:
        if stop is not None:
            stop()
        elif number == signal.SIGTERM:
            for process in started:
                process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    failed: list[int] = []
    deadline = float("inf")
    while any(process.poll() is None for process in started):
        for index, process in enumerate(started):
            if index not in failed and process.poll() not in (None, 0, STOPPED):
                failed.append(index)
                deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            late = [i for i, process in enumerate(started) if process.poll() is None]
            print(f"Killing {late}: {grace:g} s after the first failure.", file=sys.stderr)
            for process in started:
                process.kill()
            deadline = float("inf")
        time.sleep(0.05)
    return _code([process.returncode for process in started], failed)


def _code(codes: Sequence[int], failed: Sequence[int]) -> int:
    bad = [*(codes[i] for i in failed), *(c for c in codes if c not in (0, STOPPED))]
    if bad:
        return bad[0] if bad[0] > 0 else 128 - bad[0]
    return max(codes)


def _start(index: int, process: Process, apart: bool) -> subprocess.Popen:
    """apart: of a session of its own, which Ctrl-C does not reach."""
    ours = index == 0  # on the terminal, with its progress bar
    pipe = None if ours else subprocess.PIPE
    started = subprocess.Popen(
        process.command,
        env=process.environment,
        start_new_session=apart,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=None if ours else subprocess.STDOUT,
    )
    if started.stdout is not None:
        threading.Thread(target=_prefixed, args=(index, started.stdout), daemon=True).start()
    return started


def _prefixed(index: int, lines) -> None:
    for line in lines:
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()

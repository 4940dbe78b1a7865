"""Several processes as one run: how they find one another, stop together and part.

Every process runs the same command. They meet at the coordinator, a port that process 0 opens, and
from then on `jax.devices()` are the devices of all. Where they meet is said by flags, by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by the cluster (TPU pod, Slurm,
Open MPI, Kubernetes), which JAX asks. With none of these there is one process, and nothing is done.

**Stopping.** A SIGTERM is taken by JAX's preemption service, which tells all processes. It fixes
the first update that none of them has begun, and all save there. Asking costs a lock on the host:
no collective, no wait for the device. A scheduler's notice is a SIGTERM (Slurm, Kubernetes, a TPU
pod's maintenance); Ctrl-C is passed on as one.

**Losses.** Each process sends heartbeats to the coordinator. One that is silent for `peer_timeout`
seconds is lost, and JAX ends the others, which cannot go on without it: those that see the broken
connection first say so and leave with exit code 4, the rest are aborted with JAX's message, all at
once where the coordinator is lost. The same command goes on from the last checkpoint, with as many
processes as there are then.
"""

import contextlib
import functools
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.runs import hosts
from diffjax.runs.workdir import RunError, claim
from diffjax.train.storage import causes

ADDRESS, NUMBER, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_FLAGS = {ADDRESS: "--coordinator", NUMBER: "--num_processes", INDEX: "--process_id"}
# What gloo, NCCL and the coordination service say of a broken connection.
_LOSSES = ("gloo", "connection", "nccl", "unavailable", "heartbeat", "coordination", "peer")
LOST = 4  # the exit code of a process that lost another
_FAREWELL = 10.0  # seconds for the others to come to the same end
_NEWS = 2.0  # seconds for them to see the loss themselves: the coordinator's end aborts them
_TIDYING = 10.0  # seconds to close files after a loss


class NotMet(RunError):
    """The processes did not find one another. JAX ends the process too, some time later."""


class Place(NamedTuple):
    """coordinator: host:port of process 0. process_id: which of num_processes this one is."""

    coordinator: str
    num_processes: int
    process_id: int


def place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Place | None:
    """Where this process belongs, by arguments or else the environment; None for one process.

    environment: os.environ by default. Raises RunError for what is missing or does not fit.
    """
    environment = os.environ if environment is None else environment
    given: dict[str, Any] = {ADDRESS: coordinator, NUMBER: num_processes, INDEX: process_id}
    given = {name: environment.get(name) if v is None else v for name, v in given.items()}
    given = {name: value for name, value in given.items() if value not in (None, "")}
    total = _number(NUMBER, given.get(NUMBER), least=1)
    if not given or (total == 1 and _number(INDEX, given.get(INDEX, 0)) == 0):
        return None
    if missing := [name for name in _FLAGS if name not in given]:
        names = " and ".join(f"{_FLAGS[name]} (or {name})" for name in missing)
        raise RunError(
            f"Several processes need --coordinator=host:port, --num_processes and --process_id; "
            f"missing: {names}. On a TPU pod or under Slurm, --distributed finds all three."
        )
    address, index = str(given[ADDRESS]), _number(INDEX, given[INDEX])
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RunError(
            f"--coordinator must be host:port of process 0, such as 10.0.0.1:8476; got {address!r}."
        )
    if index >= total:
        raise RunError(
            f"--process_id counts from 0 and must be below --num_processes={total}; got {index}."
        )
    return Place(address, total, index)


def _number(name: str, value: Any, least: int = 0) -> int:
    """A whole number of the flag or variable. Raises RunError for anything else; 0 for None."""
    if value is None:
        return 0
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise RunError(
            f"{_FLAGS[name]} (or {name}) must be a whole number from {least} on; got {value!r}."
        )
    return number


def join(
    where: Place | None,
    *,
    detect: bool = False,
    heed_notices: bool = False,
    start_timeout: int = 300,
    peer_timeout: int = 100,
) -> None:
    """Meets the other processes; to be called before JAX uses a device. Nothing for one process.

    detect: asks the cluster instead of `where`. heed_notices: SIGTERM is from here on a notice that
    `stop_requested` gives, not an end. start_timeout: seconds to wait for all. peer_timeout:
    seconds of silence after which a process is lost.
    Raises RunError where the cluster says nothing, NotMet where not all come.
    """
    if where is None and not detect:
        return
    if where is not None and detect:
        raise RunError(
            "--distributed asks the cluster where this process belongs; leave it out beside "
            f"--coordinator, --num_processes and --process_id (here {tuple(where)})."
        )
    # Collectives between processes on CPUs; said aloud, as JAX's default has changed before.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known = where._asdict() if where is not None else {}
    error = _within(
        start_timeout,
        functools.partial(
            jax.distributed.initialize,
            coordinator_address=known.get("coordinator"),
            num_processes=known.get("num_processes"),
            process_id=known.get("process_id"),
            cluster_detection_method=None if detect else "deactivate",
            # Where its own time is up JAX aborts with a trace of its stack.
            initialization_timeout=start_timeout + 60,
            heartbeat_timeout_seconds=peer_timeout,
        ),
    )
    if isinstance(error, ValueError):
        raise RunError(
            f"--distributed found no cluster ({error}) It knows TPU pods, Slurm, Open MPI and "
            "Kubernetes; elsewhere give --coordinator, --num_processes and --process_id."
        ) from error
    if error is not None:
        raise NotMet(_not_met(where, error)) from error
    if not heed_notices:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the service has taken it


def _within(seconds: float, work: Callable[[], Any]) -> Exception | None:
    """Does `work` and returns what it raises; TimeoutError where it takes longer."""
    found: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"not all came within {seconds:g} seconds")
    return found[0] if found else None


def _not_met(where: Place | None, error: Exception) -> str:
    """Why the processes did not meet, for people."""
    cause = " ".join(str(error).split())[:300]
    if where is None:
        return f"The processes of the cluster did not meet: {cause}."
    address, total, index = where
    return (
        f"Process {index} of {total} did not meet the others at {address}: {cause}. Start all "
        f"{total} processes, each with its own --process_id, and see that they reach that port."
    )


@contextlib.contextmanager
def stop_requested(start: int, n_jitted_steps: int) -> Iterator[Callable[[], bool]]:
    """Gives what `train.loop.fit` asks after each dispatch: whether to save and leave.

    start: the update that the run goes on from. All processes get the answer True after the same
    dispatch, of `n_jitted_steps` updates each. With one process: `train.preempt.stop_on_signals`.
    """
    from diffjax.train import preempt

    if hosts.count() == 1:
        with preempt.stop_on_signals() as asked:
            yield asked
        return
    with _interrupt_as_notice():
        yield functools.partial(next, _agreed(start, n_jitted_steps))


def _agreed(start: int, n_jitted_steps: int) -> Iterator[bool]:
    """After each dispatch, whether the update at which all stop lies behind.

    The service names one update, the first that no process has asked for, and says yes to that
    number alone. So each number is asked for once and in order, also those before `start`: the
    notice may have come before there was a step. And after a rollback, whose updates are numbered
    on: once it is yes it stays so, also where the update that all were to save was a bad one.
    """
    from jax.experimental import multihost_utils

    asked, reached = 0, False
    while True:
        upto = max(asked, start) + n_jitted_steps
        for step in range(asked + 1, upto + 1):  # each number, also after a yes
            reached |= multihost_utils.reached_preemption_sync_point(step)
        yield reached
        asked = upto


@contextlib.contextmanager
def _interrupt_as_notice() -> Iterator[None]:
    """Ctrl-C is a notice the first time, and an end the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def notice(number, frame):
        del number, frame
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGINT, notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_alike(what: str, text: str) -> None:
    """Raises RunError, in all processes, unless `text` is the same in all."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    found = hosts.exchange(digest)
    others = [p for p, there in enumerate(found) if not np.array_equal(there, found[0])]
    if others:
        raise RunError(
            f"All processes must have the same {what}; process {others[0]} has another than "
            "process 0. Start all with one command, and the same version of diffjax."
        )


def claim_together(workdir: Path, config: Any) -> None:
    """`workdir.claim` by the first process, and checked by all.

    Raises RunError as `claim` does, in the processes that it concerns or in all, and where the
    others do not see what the first has written.
    """
    if hosts.count() == 1:
        claim(workdir, config)
        return
    failed = None
    if hosts.is_first():
        try:
            claim(workdir, config)
        except RunError as error:
            failed = error
    if not hosts.all_agree(failed is None):
        raise failed or RunError(f"Process 0 cannot have {workdir}; it says why.")
    if not hosts.all_agree((workdir / "config.json").is_file()):
        raise RunError(
            f"{workdir} is not the same directory in all processes: config.json, which process 0 "
            "wrote, is not there in all. Use storage that all share."
        )
    claim(workdir, config)


def is_loss(error: BaseException) -> bool:
    """Whether an error means that another process is gone: it, or one that it came from."""
    found = (e for e in causes(error) if isinstance(e, jax.errors.JaxRuntimeError))
    text = " ".join(str(e).lower() for e in found)
    return jax.distributed.is_initialized() and any(mark in text for mark in _LOSSES)


def lost_message(error: BaseException) -> str:
    """What a broken collective means, for people."""
    cause = str(error).strip().splitlines()[0][:200]
    return (
        f"Process {hosts.index()} of {hosts.count()} lost touch with another ({cause}). What that "
        "one says last is the cause. The same command goes on from the last checkpoint, with as "
        "many processes as you like."
    )


@contextlib.contextmanager
def losses_end() -> Iterator[None]:
    """Ends this process in a few seconds, exit code `LOST`, where a collective inside breaks.

    Closing a checkpoint that is being written waits for the lost one, until JAX aborts.
    """
    try:
        yield
    except Exception as error:
        if is_loss(error):
            with contextlib.suppress(OSError):  # a log on a full disk
                print(lost_message(error), file=sys.stderr, flush=True)
            timer = threading.Timer(_TIDYING, os._exit, (LOST,))
            timer.daemon = True
            timer.start()
        raise


def leave(code: int, error: BaseException) -> int:
    """The exit code of a command that failed with `error`; of several processes, ends this one.

    Where all fail alike they part in good order. Where only some do, the others cannot come to the
    meeting with which a program of several processes ends, so nobody is waited for for long.
    """
    if not jax.distributed.is_initialized():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if is_loss(error):
        time.sleep(_NEWS)
    elif not isinstance(error, NotMet):
        _within(_FAREWELL, jax.distributed.shutdown)
    os._exit(code)

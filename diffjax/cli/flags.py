"""What the verbs share: parsing without absl's app, one clear line for an error, the setting-up."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from diffjax.runs.distributed import LOST
from diffjax.runs.workdir import RunError

STOPPED = 3  # the exit code of a run that was asked to stop and has saved
FULL = 5  # of a run whose disk is full or broken; what it saved before is whole


class Definer:
    """Defines flags among `values`, one short line each."""

    def __init__(self, values: absl_flags.FlagValues):
        self._values = values

    def text(self, name: str, default: str | None, about: str) -> None:
        absl_flags.DEFINE_string(name, default, about, flag_values=self._values)

    def integer(self, name: str, default: int | None, about: str) -> None:
        absl_flags.DEFINE_integer(name, default, about, flag_values=self._values)

    def number(self, name: str, default: float | None, about: str) -> None:
        absl_flags.DEFINE_float(name, default, about, flag_values=self._values)

    def switch(self, name: str, default: bool, about: str) -> None:
        absl_flags.DEFINE_bool(name, default, about, flag_values=self._values)

    def words(self, name: str, default: list[str], about: str) -> None:
        absl_flags.DEFINE_list(name, default, about, flag_values=self._values)


def define_processes(values: absl_flags.FlagValues) -> None:
    """The flags of a verb that several processes can do together."""
    define = Definer(values)
    define.text("coordinator", None, "several processes: host:port of process 0")
    define.integer("num_processes", None, "several processes: how many")
    define.integer("process_id", None, "several processes: which this is, from 0")
    define.switch("distributed", False, "several processes, as a TPU pod, Slurm or Open MPI says")
    define.integer("start_timeout", 300, "seconds to wait for all processes")
    define.integer("peer_timeout", 100, "seconds of silence after which a process is lost")


def define_mesh(values: absl_flags.FlagValues) -> None:
    """The flag of a verb that samples or measures a model; after `join`, `local_mesh` reads it."""
    about = "weights over several devices of a process, as fsdp:4; whole on each by default"
    Definer(values).text("mesh", None, about)


def local_mesh(values: absl_flags.FlagValues) -> Any:
    """The mesh of this process's devices that --mesh names. Raises RunError."""
    from diffjax.cli.plan import axes
    from diffjax.runs import spread

    return spread.local_mesh(**({} if values.mesh is None else axes(values.mesh)))


def join(values: absl_flags.FlagValues, *, heed_notices: bool = False) -> None:
    """Meets the other processes where flags, environment or cluster name any; before JAX is used.

    heed_notices: for a verb that saves and leaves at a SIGTERM.
    """
    from diffjax.runs import distributed

    given = (values.coordinator, values.num_processes, values.process_id)
    # With --distributed the environment's variables are the cluster's own affair.
    environment = {} if values.distributed else os.environ
    distributed.join(
        distributed.place(*given, environment),
        detect=values.distributed,
        heed_notices=heed_notices,
        start_timeout=values.start_timeout,
        peer_timeout=values.peer_timeout,
    )


def say(line: str) -> None:
    """Prints what all processes would, in the first; at the end, as it asks JAX which this is."""
    from diffjax.runs import hosts

    if hosts.is_first():
        print(line)


def parse(values: absl_flags.FlagValues, argv: Sequence[str], about: str) -> bool:
    """Parses flags; False after printing help. Raises RunError for flags that are not right.

    argv[0] is the verb as typed. about: the verb's own help text.
    """
    if wants_help(argv):
        print(f"{about}\n\nflags:\n{_help(values)}")
        return False
    try:
        rest = values(list(argv))
    except absl_flags.Error as error:
        raise RunError(str(error)) from error
    if len(rest) > 1:
        raise RunError(f"Unexpected argument {rest[1]!r}; every option is a --flag=value.")
    return True


def wants_help(argv: Sequence[str]) -> bool:
    """Whether help is asked for."""
    return any(a in ("-h", "--help", "-help", "help") for a in argv[1:])


def _help(values: absl_flags.FlagValues) -> str:
    """One line a flag with its default."""
    lines = []
    for name in sorted(values):
        flag = values[name]
        value = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        default = "" if value in (None, "") else f" (default: {value})"
        lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def guarded(verb: str, work: Callable[[], int]) -> int:
    """Runs `work`; what a person can put right becomes one line on stderr and exit code 2.

    RunError, BuildError, CheckpointError and the checks of the library are all ValueErrors. One of
    several processes that lost another says so, exit code 4. A disk that is full or broken is 5.
    DIFFJAX_TRACEBACK=1 shows the whole traceback.
    """
    import jax

    from diffjax.runs import distributed
    from diffjax.train.loop import Diverged
    from diffjax.train.storage import FULL_OR_BROKEN, SaveError

    def failed(error: Exception, message: str, code: int) -> int:
        trace = traceback.format_exc() if os.environ.get("DIFFJAX_TRACEBACK") else ""
        _say_last(f"{trace}diffjax {verb}: {' '.join(message.split())}\n")
        return distributed.leave(code, error)

    try:
        return work()
    except SaveError as error:
        return failed(error, str(error), FULL)
    except OSError as error:
        if distributed.is_loss(error):  # a time that was up, in waiting for it
            return failed(error, distributed.lost_message(error), LOST)
        if error.errno not in FULL_OR_BROKEN:
            return failed(error, str(error), 2)
        way_out = "free space or mend the disk, and start the same command again"
        return failed(error, f"{error}; {way_out}. What was saved before is whole.", FULL)
    except (Diverged, ValueError, ModuleNotFoundError) as error:
        return failed(error, str(error), 2)
    except Exception as error:
        if distributed.is_loss(error):
            return failed(error, distributed.lost_message(error), LOST)
        if not jax.distributed.is_initialized():
            raise
        _say_last(traceback.format_exc())  # the others must not wait for this one
        return distributed.leave(1, error)


def _say_last(text: str) -> None:
    """Writes to stderr, and out all that waits. A stream on the full disk is given up.

    Else what cannot be written would end the process otherwise, and keep the exit code.
    """
    for stream, last in ((sys.stdout, ""), (sys.stderr, text)):
        try:
            stream.write(last)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second process starts in seconds.

    The directory is JAX_COMPILATION_CACHE_DIR, else diffjax's own below the user's cache.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "diffjax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_deterministic() -> None:
    """Has a GPU's programs give the same bits each time; before JAX meets its devices.

    XLA then leaves out operations that add in no fixed order and does not choose by timing.
    """
    flag = "--xla_gpu_deterministic_ops=true"
    before = os.environ.get("XLA_FLAGS", "")
    if flag not in before.split():
        os.environ["XLA_FLAGS"] = f"{before} {flag}".strip()


def say_deterministic() -> None:
    """Says what `make_deterministic` came to, once the devices are known."""
    import jax

    if jax.default_backend() != "gpu":
        backend = jax.default_backend()
        print(f"--deterministic is for GPUs; on {backend} there is nothing to switch.")


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr, called with the number done; silent elsewhere."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {what}", disable=None) as shown:
        yield lambda done: shown.update(done - shown.n) and None

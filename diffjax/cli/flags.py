"""What the verbs share: parsing without absl's app, one clear line for an error, the setting-up."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags as absl_flags

from diffjax.runs.workdir import RunError

STOPPED = 3  # the exit code of a run that was asked to stop and has saved


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

    RunError, BuildError, CheckpointError and the checks of the library are all ValueErrors.
    DIFFJAX_TRACEBACK=1 shows the whole traceback.
    """
    from diffjax.train.loop import Diverged

    try:
        return work()
    except (Diverged, OSError, ValueError) as error:
        if os.environ.get("DIFFJAX_TRACEBACK"):
            traceback.print_exc()
        message = " ".join(str(error).split())
        print(f"diffjax {verb}: {message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"diffjax {verb}: {error}", file=sys.stderr)
        return 2


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second process starts in seconds.

    The directory is JAX_COMPILATION_CACHE_DIR, else diffjax's own below the user's cache.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "diffjax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr, called with the number done; silent elsewhere."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {what}", disable=None) as shown:
        yield lambda done: shown.update(done - shown.n) and None

"""Strict settings of every test: 8 simulated devices, no silent broadcasting, float64 on call.

Programs are compiled without LLVM's optimisations and, where XLA is known to have them, by its
older emitters: compiling is what tests spend their time on, and it is two to six times quicker so.
`scripts/demo` and the benches run optimised programs.
"""

import collections
import fcntl
import os
import shutil
from importlib import metadata

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # A flag that XLA does not know ends the process.
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10.")
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

FILES: list[None] = []  # one entry a finished file of tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Variants of members meet the laws in the slow lane."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if any(getattr(value, "variant", False) is True for value in params.values()):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter):
    """Which files the time went to."""
    seconds: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest 60 files")
    for name, total in seconds.most_common(60):
        terminalreporter.write_line(f"{total:7.1f}s {name}")


@pytest.fixture
def key():
    """A typed key."""
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def fresh_cache():
    """No compiled programs: for tests that count them, as functions share one cache that evicts."""
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drops compiled programs every few files: they are gigabytes in the end."""
    yield
    FILES.append(None)
    if len(FILES) % 40 == 0:
        jax.clear_caches()


@pytest.fixture
def rng():
    """NumPy randomness for inputs."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data directory of the test session's own, so that nothing lands in the user's."""
    directory = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(directory))
        yield directory


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A directory that the processes of a parallel test run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def compilation_cache(shared_dir):
    """A cache of compiled programs for the tests that train and sample the same small models."""
    directory = str(shared_dir / "xla")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
        jax.config.update("jax_compilation_cache_dir", directory)
        yield directory
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, shared_dir, digits_dir, compilation_cache):
    """The workdir of a finished quick run on the digits: 10 steps, checkpoints at 5 and 10.

    Trained once and copied, so that each process may write into its own.
    """
    import diffjax as dj
    from diffjax.runs.workdir import load_config

    finished = shared_dir / "trained"
    with open(shared_dir / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            workdir = tmp_path_factory.mktemp("run")
            outcome = dj.train(load_config("digits:quick"), workdir, show_progress=False)
            assert outcome == (10, True)
            workdir.rename(finished)
    return shutil.copytree(finished, tmp_path_factory.mktemp("copy") / "run")

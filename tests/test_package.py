"""The package as a user gets it: a wheel, its public names, its configs from anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffjax as dj

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked into a directory of its own."""
    where = tmp_path_factory.mktemp("wheel")
    run = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", where, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = where.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", where / "site",
         wheel],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return where / "site"


def python(installed, code, cwd):
    """Runs code with the installed wheel ahead of this checkout, from another directory."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_wheel_works_from_another_directory(installed, tmp_path):
    out = python(
        installed,
        "import diffjax, pathlib\n"
        "from diffjax import builders\n"
        "from diffjax.runs.workdir import config_directory, load_config\n"
        "print(pathlib.Path(diffjax.__file__).parent.parent)\n"
        "print(config_directory())\n"
        "config = load_config('vp/cifar10_ddpmpp_continuous:quick')\n"
        "print(builders.build_parts(config).process)\n",
        tmp_path,
    )
    package, configs, process = out.splitlines()
    assert Path(package) == installed
    assert Path(configs) == installed / "diffjax" / "_configs"
    assert process.startswith("VP(")
    assert (installed / "diffjax" / "py.typed").is_file()


def test_the_wheel_holds_the_library_only(installed):
    tops = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert tops == {"diffjax", "bin"}


def test_public_names():
    assert sorted(dj.__all__) == sorted(set(dj.__all__))
    for name in dj.__all__:
        assert getattr(dj, name) is not None
    assert callable(dj.train)
    import diffjax.train.loop  # noqa: F401

    assert callable(dj.train), "importing the room must not hide the function"

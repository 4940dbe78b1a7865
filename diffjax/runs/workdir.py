"""A run's directory, and configs by name, path and text.

    config.json            the config, with a schema version
    checkpoints/<step>/    see `diffjax.train.checkpoint`
    metrics.jsonl          training figures, one line a step
    tensorboard/           the same for TensorBoard
    samples/<step>.png     grids drawn during training
    eval/<name>.json       what `evaluate` found

A config lies in the package (`vp/cifar10_ddpmpp_continuous`) or anywhere (`path/to/file.py`): a
Python file with `get_config()`, optionally taking one string given after a colon (`digits:quick`).

Stored configs, here and in checkpoints, carry a schema version. A field that came later than a
config has the default of `configs/common.py`, which does what was done before there was the field;
a field that changed its name or meaning has a function in `MIGRATIONS`.
"""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffjax.core.files import write_atomic
from diffjax.version import __version__

SCHEMA = 2  # of stored configs; a change that old readers cannot read, or would overlook, adds one

# The sections whose fields all configs have; the fields of others depend on the `name` in them.
_FIXED_SECTIONS = ("training", "eval")


class RunError(ValueError):
    """A request that a run cannot serve; the message is for people."""


def _from_1(config: dict[str, Any]) -> dict[str, Any]:
    model, own = config["model"], ":" in config["model"]["name"]
    return config | {
        "model": model if own else {"dtype": "float32", "remat": False} | model,
        "ema": {"offload": False} | config["ema"],
        "optim": {"moment_dtype": "float32"} | config.get("optim", {}),
        "data": {"workers": 0, "ahead": 2, "placed": 1} | config.get("data", {}),
    }


# From each earlier schema to the next: fields whose name or meaning changed, or whose section has
# other fields in other configs.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def config_directory() -> Path:
    """Where the shipped configs lie: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for directory in (package / "_configs", package.parent / "configs"):
        if (directory / "common.py").is_file():
            return directory
    raise RunError(f"The shipped configs are missing beside {package}; reinstall diffjax.")


def config_names() -> list[str]:
    """The shipped configs by name."""
    root = config_directory()
    files = (p for p in root.rglob("*.py") if "def get_config(" in p.read_text())
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in files)


def config_listing() -> str:
    """The shipped configs as lines of text: one paragraph for each folder."""
    folders: dict[str, list[str]] = {}
    for name in config_names():
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    options: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    ", "width": 100}
    options |= {"break_on_hyphens": False, "break_long_words": False}
    return "\n".join(textwrap.fill("  ".join(names), **options) for names in folders.values())


def load_config(name: str) -> ConfigDict:
    """The config of a shipped name or a path, with an optional `:argument` for its get_config.

    Raises RunError where there is none or where the file has no `get_config`.
    """
    name, _, argument = name.partition(":")
    shipped = config_directory() / f"{name.removesuffix('.py').removeprefix('configs/')}.py"
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        path = path.resolve()
    elif shipped.is_file():
        path = shipped
    else:
        near = difflib.get_close_matches(name, config_names(), n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise RunError(
            f"There is no config {name!r}: neither a file nor shipped.{hint} `diffjax` lists all."
        )
    with _module(path) as module:
        if not hasattr(module, "get_config"):
            raise RunError(f"{path} must define get_config() returning a ConfigDict.")
        config = module.get_config(argument) if argument else module.get_config()
    return config.lock()


@contextlib.contextmanager
def _module(path: Path) -> Iterator[Any]:
    """The module in a file of configs, which may import its neighbours while this is open."""
    with _importable_configs(path):
        spec = importlib.util.spec_from_file_location("diffjax_config", path)
        assert spec is not None and spec.loader is not None  # the file exists and ends in .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@contextlib.contextmanager
def _importable_configs(path: Path) -> Iterator[None]:
    """Lets a config import its neighbours as `configs.…`, wherever the folder `configs` lies."""
    root = config_directory()
    own = next((p for p in path.parents if p.name == "configs"), None)
    folders = [str(own)] if own is not None else []
    folders.append(str(root))
    before = {k: v for k, v in sys.modules.items() if k == "configs" or k.startswith("configs.")}
    for name in before:
        del sys.modules[name]
    spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
    spec.submodule_search_locations = folders
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name in [k for k in sys.modules if k == "configs" or k.startswith("configs.")]:
            del sys.modules[name]
        sys.modules.update(before)


def plain(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    config = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.loads(json.dumps(config))


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two plain configs differ, as `a.b: old -> new`."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left} -> {right}")
    return found


def read_config(workdir: str | Path) -> ConfigDict:
    """The config that a workdir was made with, locked. Raises RunError where it cannot be read."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise RunError(f"{workdir} is not a diffjax workdir: it has no config.json. Train first.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        schema, config = stored["schema"], dict(stored["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); restore it, or use a new workdir.") from error
    if schema not in (*MIGRATIONS, SCHEMA):
        raise RunError(
            f"{path} has schema {schema}; this diffjax {__version__} reads 1 to {SCHEMA}. Use the "
            "version that wrote it."
        )
    return ConfigDict(_migrated(schema, config)).lock()


def versioned(config: Any) -> dict[str, Any]:
    """A config as plain JSON values with its schema: what is stored."""
    return {"schema": SCHEMA, "config": plain(config)}


def _migrated(schema: int, config: dict[str, Any]) -> dict[str, Any]:
    """A config of an earlier schema as one of this; later fields have their defaults."""
    for number in range(schema, SCHEMA):
        config = MIGRATIONS[number](config)
    with _module(config_directory() / "common.py") as module:
        defaults = plain(module.base())
    missing = {name: section for name, section in defaults.items() if name not in config}
    known = {name: defaults[name] | config[name] for name in _FIXED_SECTIONS if name in config}
    return config | missing | known


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """A plain config without what changes no number: the mesh, and how batches are read ahead.

    A field that is left out has its default: whether it is said makes no other config.
    """
    config = _migrated(1, config)
    data = dict(config["data"])
    for name in ("workers", "ahead", "placed"):
        data.pop(name, None)
    return config | {"mesh": None, "data": data}


def claim(workdir: str | Path, config: Any) -> None:
    """Makes the workdir this config's: writes config.json, or checks that it is the same.

    Raises RunError, naming the fields, where the directory belongs to another config, and where it
    cannot be written.
    """
    path = Path(workdir) / "config.json"
    if path.exists():
        known, wanted = plain(read_config(workdir)), plain(config)
        changed = differences(_computed(known), _computed(wanted))
        if changed:
            raise RunError(
                f"{workdir} belongs to another config ({'; '.join(changed[:5])}"
                f"{'; ...' if len(changed) > 5 else ''}). Use another --workdir, or leave --config "
                "out to go on with the stored one."
            )
        return
    try:
        write_atomic(path, json.dumps(versioned(config), indent=2) + "\n")
    except OSError as error:
        raise RunError(
            f"Cannot write {workdir} ({error.strerror}); choose another workdir."
        ) from error

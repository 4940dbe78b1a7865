"""Who may import whom, and what `import diffjax` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffjax"

# A room may import itself, `version` and these. One file is a room too.
LOWER = {"core", "processes", "prediction"}
METHODS = LOWER | {"solvers", "guidance", "losses"}
ALL = METHODS | {"inverse", "likelihood", "search", "nets", "metrics", "data", "train", "testing"}
ALL |= {"interop"}
MAY_IMPORT = {
    "core": set(),
    "nets": {"core"},
    "metrics": {"core"},
    "data": {"core"},
    "train": {"core"},
    "processes": {"core"},
    "prediction": {"core", "processes"},
    "solvers": LOWER,
    "guidance": LOWER,
    "losses": LOWER,
    "inverse": METHODS,
    "likelihood": METHODS,
    "search": METHODS,
    "interop": {"core", "nets", "metrics", "prediction", "solvers"},
    "testing": ALL,
    "builders": ALL,
    "runs": ALL | {"builders"},
    "cli": ALL | {"builders", "runs"},
    "version": set(),
    "__main__": {"cli"},
    # The face of the package: everything that a user writes, the runs lazily.
    "__init__": ALL | {"runs"},
}
HEAVY = ["tensorflow", "tensorflow_datasets", "tensorstore", "orbax", "grain", "clu", "matplotlib"]
HEAVY += ["sklearn", "optax", "PIL", "ml_collections"]


def room_of(path: Path) -> str:
    """The room of a file of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(source: str, package: str) -> set[str]:
    """Full dotted names that a module imports, also inside functions, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _is_import_module(node):
            found |= _literal_start(node.args[0])
    return found


def _is_import_module(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name == "import_module" and bool(call.args)


def _literal_start(node: ast.expr) -> set[str]:
    """The name given to `import_module`, as far as it is written out."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    known = isinstance(first, ast.Constant) and isinstance(first.value, str)
    return {first.value.rstrip(".")} if known else set()


def wrong_arrows(room: str, source: str, package: str) -> set[str]:
    """Imports of `source`, a module of `room`, that the arrows forbid."""
    wrong = set()
    for name in imports_of(source, package):
        parts = name.split(".")
        if parts[0] in ("tests", "scripts"):
            wrong.add(name)
        if parts[0] != "diffjax" or len(parts) < 2:
            continue
        # `from diffjax import x` of a name that is no room is an import of the whole face.
        target = parts[1] if parts[1] in MAY_IMPORT else "__init__"
        if target not in {room, "version"} | MAY_IMPORT[room]:
            wrong.add(name)
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} has no place among the rooms"
    package = ".".join(["diffjax", *path.relative_to(PACKAGE).parent.parts])
    assert not wrong_arrows(room, path.read_text(), package)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "import diffjax.processes"),
        ("nets", "from diffjax.processes import VP"),
        ("solvers", "from diffjax import losses"),
        ("losses", "def f():\n    from diffjax.solvers import sample"),
        ("prediction", "from ..solvers import base"),
        ("runs", "import importlib\nimportlib.import_module('diffjax.cli.main')"),
        ("solvers", "from diffjax import VP"),
        ("core", "from tests import oracles"),
    ],
)
def test_a_wrong_arrow_is_seen(room, source):
    assert wrong_arrows(room, source, f"diffjax.{room}")


def test_a_right_arrow_passes():
    source = "import jax\nfrom diffjax.core.types import Array\nfrom . import base\n"
    assert not wrong_arrows("solvers", source, "diffjax.solvers")


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_costs_jax_and_flax_only():
    loaded = loaded_by("import diffjax")
    assert {"jax", "flax"} <= loaded
    assert not set(HEAVY) & loaded


def test_a_heavy_import_is_seen():
    assert "sklearn" in loaded_by("import diffjax, sklearn")

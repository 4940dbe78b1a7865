"""Packages that only reading data needs, imported where they are used."""

import importlib
from typing import Any


def require(module: str) -> Any:
    """The module of that name. Raises ImportError naming the pip command where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Reading data needs {module}, which failed to import ({error}). "
            "Install it with: pip install 'diffjax[data]'"
        ) from error

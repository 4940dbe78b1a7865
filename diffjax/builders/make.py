"""A member of a family from a section of a config."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

Section = Mapping[str, Any]


class BuildError(ValueError):
    """A config that cannot be built; the message names the field, the value and the way out."""


def make(family: Mapping[str, Callable[..., Any]], section: Section, where: str, **given: Any):
    """Calls the member that `section["name"]` names with the section's other fields and `given`.

    where: the section's place in the config, for messages. Raises BuildError for an unknown name,
    a field that the member does not take, or values that it refuses.
    """
    fields = {key: frozen(value) for key, value in dict(section).items()}
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise BuildError(f"config.{where}.name must name one of {', '.join(family)}; got {name!r}.")
    member = _imported(name, where) if ":" in name else family.get(name)
    if member is None:
        near = difflib.get_close_matches(name, family, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BuildError(
            f"config.{where}.name = {name!r} is unknown; choose one of {', '.join(family)}, or "
            f"give your own as 'package.module:callable'.{hint}"
        )
    _check_fields(member, fields, where)
    try:
        return member(**fields, **{k: v for k, v in given.items() if k not in fields})
    except (TypeError, ValueError) as error:
        raise BuildError(f"config.{where} ({name}): {error}") from error


def _imported(name: str, where: str) -> Callable[..., Any]:
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
        return found
    except (ImportError, AttributeError) as error:
        raise BuildError(f"config.{where}.name = {name!r} cannot be imported: {error}.") from error


def _check_fields(member: Callable[..., Any], fields: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(member).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [n for n in parameters if n not in ("parent", "name")]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" It takes {', '.join(known)}."
            raise BuildError(f"config.{where}.{field} is not a field of this {where}.{hint}")


def frozen(value: Any) -> Any:
    """Lists become tuples: networks must be hashable, and JSON knows no tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in value)
    return value

"""Checks that the configurations make of their fields."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """Raised for a configuration that cannot work. The message is one line: got, expected, what to do."""


@cache
def literal_fields(kind: type) -> dict[str, tuple[str, ...]]:
    """Return the allowed values of each field of the dataclass `kind` that is annotated as a `Literal`."""
    hints = get_type_hints(kind).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


def check_literals(config: Any, require: Callable[[bool, str, object, str], None], prefix: str = "") -> None:
    """Call `require(holds, field, got, expected)` for each `Literal` field of the dataclass instance `config`.

    `require` raises the caller's error if `holds` is false. `prefix` is put in front of the field's name.
    """
    for name, choices in literal_fields(config.__class__).items():
        got = getattr(config, name)
        require(got in choices, prefix + name, got, f"one of {', '.join(choices)}")


def require(condition: bool, field: str, got: object, expected: str, remedy: str = "") -> None:
    """Raise `ConfigError` unless `condition` is true."""
    if not condition:
        raise ConfigError(f"{field}: got {got!r}, expected {expected}" + (f"; {remedy}" if remedy else ""))


def require_each(config: Any, fields: str, lowest: float, expected: str) -> None:
    """Raise `ConfigError` unless each of the fields, named in one string, is finite and at least `lowest`."""
    for name in fields.split():
        value = getattr(config, name)
        finite = isinstance(value, int | float) and math.isfinite(value)
        require(finite and value >= lowest, name, value, expected)

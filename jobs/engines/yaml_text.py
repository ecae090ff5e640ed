"""YAML as people write it: keys in their order, and texts of several lines as blocks."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """The safe dumper with blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True, so that a value that is used twice is written twice."""
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(content: Any) -> str:
    """Return the YAML of lists, dictionaries and plain values."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True))

"""Results of the GPU script: one JSON line each, written at once, and Markdown tables of them."""

import json
import os
import platform
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
Row = dict[str, Any]


class Results:
    """Rows of one section; a stop at any moment loses none that is written."""

    def __init__(self, folder: Path, section: str) -> None:
        self._path = folder / "results.jsonl"
        self._section = section

    def put(self, check: str, **values: Any) -> None:
        """Print a row and write it to the disk."""
        line = json.dumps({"section": self._section, "check": check, **values}, default=str)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempt(self, check: str, work: Callable[[], object]) -> None:
        """Do the work; an error is a row, and the section continues."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.put(check, error=f"{type(error).__name__}: {error}"[:600])


def read(folder: Path) -> list[Row]:
    """Return all rows written so far."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(rows: list[Row], device: str, command: str) -> str:
    """Return the rows as Markdown: a table for each group of rows of a section that have the same columns."""
    import torch

    lines = [f"Device: {device}. torch {torch.__version__}, Python {platform.python_version()}. Command: `{command}`."]
    groups: dict[tuple[str, tuple[str, ...]], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["section"], tuple(name for name in row if name != "section")].append(row)
    section = ""
    for (name, columns), found in groups.items():
        if name != section:
            section = name
            lines += ["", f"**{name.replace('_', ' ')}**"]
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_text(row[column]) for column in columns) + " |" for row in found]
    return "\n".join(lines) + "\n"


def write_into(document: Path, text: str) -> None:
    """Replace what lies between the two marks of a document, or add marks and text at its end."""
    content = document.read_text() if document.exists() else ""
    if BEGIN not in content:
        content = f"{content.rstrip()}\n\n## On a GPU\n\n{BEGIN}\n{END}\n"
    before, _, rest = content.partition(BEGIN)
    document.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value).replace("|", "/").replace("\n", " ")

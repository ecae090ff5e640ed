"""Flags from frozen dataclasses, and a wrong one as one line that names the nearest that exists."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from itertools import dropwhile, takewhile
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")


class UsageError(Exception):
    """The command line cannot be understood; the message says what was expected."""


def parse(kind: type[Options], argv: Sequence[str], prog: str, default: Options | None = None) -> Options:
    """Build the options from flags. A wrong flag is one line that names the nearest that exists."""
    given: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options: Options = tyro.cli(
                kind, args=list(argv), prog=prog, config=(tyro.conf.FlagCreatePairsOff,), **given
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise UsageError(f"{_one_line(said.getvalue())}; `{prog} --help` lists what there is") from None
    return options


def _one_line(box: str) -> str:
    """The first statement of a framed message, and the flag that it takes for the one meant.

    The frame is of box-drawing characters or, where the terminal knows none, of blanks and hyphens.
    """
    lines = [line.strip("│╰╯ ") for line in box.strip().splitlines()][1:]  # without the title

    def ruled(line: str) -> bool:
        return bool(line) and set(line) <= {"─", "-"}

    statement = takewhile(lambda line: not ruled(line), dropwhile(ruled, lines))
    text = " ".join(line for line in statement if line)
    if "Perhaps you meant:" in lines:
        text += f"; did you mean {lines[lines.index('Perhaps you meant:') + 1].split(' ')[0]}?"
    return text.rstrip(".")


def choose(argv: Sequence[str], words: dict[str, Callable[[list[str]], None]], prog: str) -> None:
    """Act on the second word of a two-word command."""
    listed = "|".join(words)
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {prog} {listed} ...   ({prog} WORD --help says more)")
        return
    if not argv or argv[0] not in words:
        got = argv[0] if argv else "nothing"
        raise UsageError(f"got {got!r} after `{prog}`; expected one of {listed}")
    words[argv[0]](list(argv[1:]))

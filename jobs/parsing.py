"""Command-line parsing: flags from frozen dataclasses, and errors of one line that name the nearest known flag."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Annotated, Any, TypeVar

import tyro

Options = TypeVar("Options")
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A bool that is only ever switched on: `--follow`, without `--no-follow`."""


class UsageError(Exception):
    """Raised for a command line that cannot be parsed; the message says what was expected."""


@dataclass(frozen=True)
class Command:
    """A command or subcommand: its one-line summary, and the function that parses the other arguments and runs it."""

    summary: str
    act: Callable[[list[str]], None]


def parse(kind: type[Options], argv: Sequence[str], prog: str, default: Options | None = None) -> Options:
    """Return the options of class `kind` that the flags set; raise `UsageError` with one line for a wrong flag.

    default: the options that the flags change; by default the class's own.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            options: Options = tyro.cli(kind, args=list(argv), prog=prog, **given)
    except SystemExit as error:
        if not error.code:
            raise
        raise UsageError(f"{_one_line(output.getvalue())}; `{prog} --help` lists the options") from None
    return options


def _one_line(box: str) -> str:
    """Return the first statement of tyro's framed error message, and the flag that it suggests.

    The frame is made of box-drawing characters or, on a terminal without them, of blanks and hyphens.
    """
    lines = [line.strip("│╰╯ ") for line in box.strip().splitlines()][1:]  # without the title

    def is_rule(line: str) -> bool:
        return bool(line) and set(line) <= {"─", "-"}

    statement = takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines))
    text = " ".join(line for line in statement if line)
    if "Perhaps you meant:" in lines:
        text += f"; did you mean {lines[lines.index('Perhaps you meant:') + 1].split(' ')[0]}?"
    return text.rstrip(".")


def choose(argv: Sequence[str], commands: Mapping[str, Command], prog: str) -> None:
    """Run the subcommand that `argv` begins with, or print the list of subcommands for `--help`."""
    names = "|".join(commands)
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {prog} {names} ...   (`{prog} COMMAND --help` lists its options)\n\n{command_table(commands)}")
        return
    if not argv or argv[0] not in commands:
        got = argv[0] if argv else "nothing"
        raise UsageError(f"got {got!r} after `{prog}`; expected one of {names}")
    commands[argv[0]].act(list(argv[1:]))


def command_table(commands: Mapping[str, Command]) -> str:
    """Return one line per command: its name and its summary."""
    width = max(map(len, commands))
    return "\n".join(f"  {name.ljust(width)}  {command.summary}" for name, command in commands.items())

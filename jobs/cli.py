"""The command `detr`: parse, then call one function.

Flags are built from frozen dataclasses, so a mistyped one is refused with the nearest that exists. Help must answer in
under a second: nothing here imports torch, ray or mlflow before a command is known to be well formed. A user's mistake
is one line on stderr and exit status 1 (2 for the command line itself), never a traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from jobs import cluster_commands, data_commands, exchange_commands, model_commands, run_commands
from jobs.command_line import UsageError

_USAGE = "usage: detr COMMAND ...   (detr COMMAND --help says more)"


@dataclass(frozen=True)
class Command:
    """One word of the command line: what it does, and the function that parses the rest and acts."""

    summary: str
    act: Callable[[list[str]], None]


COMMANDS: dict[str, Command] = {
    "demo": Command("the whole product on built-in data, in minutes", run_commands.demo),
    "shard": Command(
        "images and labels to WebDataset shards: shard coco|voc|yolo|index|verify|info", data_commands.shard
    ),
    "train": Command("train RECIPE [--any.field value ...]", run_commands.train),
    "show": Command("print a recipe's resolved configuration", run_commands.show),
    "resume": Command("go on with a run, or with the run of a registered version", run_commands.resume),
    "runs": Command("list runs; runs RUN --follow watches one", run_commands.runs),
    "evaluate": Command("score a registered version on a data set", model_commands.evaluate),
    "predict": Command("detect on pictures with a registered version", model_commands.predict),
    "register": Command("register the best checkpoint of a run", model_commands.register),
    "import": Command("register a file of the original's: import FILE.pth --name NAME", exchange_commands.import_file),
    "export": Command("write a registered version as --original FILE or --onnx FILE", exchange_commands.export),
    "ui": Command("open the MLflow UI", run_commands.ui),
    "submit": Command("submit SPEC -- COMMAND ...: run a command on a Ray cluster", cluster_commands.submit),
    "jobs": Command("jobs list|status|logs|stop", cluster_commands.jobs),
}


def main() -> NoReturn:
    """Entry point of the installed command."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Carry out one command line and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, rest = argv[0], list(argv[1:])
    if name not in COMMANDS:
        return _fail(
            f"there is no command {name!r}; did you mean {nearest(name, COMMANDS)}? `detr --help` lists them", 2
        )
    if "--verbose" not in rest:
        _quiet()
    from pipeline.errors import USER_ERRORS, first_line

    try:
        COMMANDS[name].act(rest)
    except UsageError as error:
        return _fail(str(error), 2)
    except USER_ERRORS as error:
        return _fail(str(error), getattr(error, "exit_status", 1))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away (`detr runs | head`); that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            return _fail(first_line(error), 1)
        return _fail(f"{error.filename}: {error.strerror}; expected a path that can be used here", 1)
    return 0


def nearest(word: str, known: Sequence[str] | dict[str, Command]) -> str:
    """The known word most like this one."""
    return max(known, key=lambda other: difflib.SequenceMatcher(None, word, other).ratio())


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["Train DETR on COCO-format data, on a laptop or a GPU cluster.", "", _USAGE, "", *lines])


def _quiet() -> None:
    """Libraries' chatter is for `--verbose`."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


def _fail(message: str, status: int) -> int:
    print(f"detr: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

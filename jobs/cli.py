"""The command `detr`: the table of its subcommands, and the exit status and message of errors.

Help must answer in under a second, so no torch, ray or mlflow is imported before a command line has been parsed. A
user's mistake is one line on stderr and exit status 1 (2 for the command line itself), never a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from jobs.commands import batches, cluster, clusters, compare, exchange, jobs, models, runs, shard, sweep
from jobs.nearest import nearest
from jobs.parsing import Command, UsageError, command_table
from pipeline.errors import USER_ERRORS, Interrupted
from pipeline.signals import hear_stops
from shards.errors import one_line

COMMANDS: dict[str, Command] = {
    "demo": Command("Train, register and evaluate a small model on built-in data, in minutes", runs.demo),
    "shard": Command(
        "Make, verify and describe data sets: shard coco|coco-panoptic|voc|yolo|index|verify|info", shard.shard
    ),
    "train": Command("Train a recipe: train RECIPE [--any.field value ...]", runs.train),
    "sweep": Command(
        "Train with every combination of some options: sweep NAME RECIPE --optim.lr 1e-4,2e-4", sweep.sweep
    ),
    "show": Command(
        "Print the configuration of a recipe, or a version: show RECIPE [--any.field ...] | MODEL", runs.show
    ),
    "show-batch": Command(
        "Draw the batch of a step as the model sees it: show-batch RECIPE --step N --out FILE", batches.show_batch
    ),
    "resume": Command("Resume a run from its newest checkpoint: resume RUN", runs.resume),
    "runs": Command("List runs, or follow one: runs [RUN [--follow]]", runs.runs),
    "sync": Command("Send to MLflow what a run's last driver could not: sync RUN", runs.sync),
    "evaluate": Command("Score a registered model on a data set", models.evaluate),
    "compare": Command("Compare two models on the same images: compare BEFORE AFTER", compare.compare),
    "promote": Command("Move an alias to a version that loses nothing: promote MODEL --alias NAME", compare.promote),
    "lineage": Command("Follow a registered model to its data and code: lineage MODEL", models.lineage),
    "predict": Command("Detect objects in image files with a registered model", models.predict),
    "register": Command("Register the best checkpoint of a run: register RUN --name NAME", models.register),
    "import": Command("Register a checkpoint of the original DETR: import FILE.pth --name NAME", exchange.import_file),
    "export": Command("Write a registered model to a file: --original FILE, --onnx FILE", exchange.export),
    "ui": Command("Open the MLflow UI", runs.ui),
    "clusters": Command("List the clusters of your file, or check one: clusters [check NAME]", clusters.clusters),
    "submit": Command("Run a command on a cluster: submit NAME -- COMMAND ...", cluster.submit),
    "jobs": Command("List, print, stop and resume jobs: jobs list|status|logs|stop|resume", jobs.jobs),
}


def main() -> NoReturn:
    """Run the installed command `detr`."""
    hear_stops()
    if not os.environ.get("DETR_JOB"):
        sys.exit(run(sys.argv[1:]))
    from pipeline.driver.job import job_output

    with job_output():
        status = run(sys.argv[1:])
    sys.exit(status)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        return _run(argv)
    except KeyboardInterrupt as error:
        if argv and argv[0] in ("train", "resume", "demo", "sweep"):
            return _fail("stopped before the workers ran; give the same command again", Interrupted.exit_status)
        return _fail("interrupted", 128 + getattr(error, "number", signal.SIGINT))


def _run(argv: Sequence[str]) -> int:
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
    try:
        COMMANDS[name].act(rest)
    except UsageError as error:
        return _fail(str(error), 2)
    except USER_ERRORS as error:
        return _fail(str(error), getattr(error, "exit_status", 1))
    except BrokenPipeError:
        # The reader of the output has exited, as in `detr runs | head`: not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            return _fail(one_line(error), 1)
        return _fail(f"{error.filename}: {error.strerror}; expected a path that can be used", 1)
    return 0


def _help() -> str:
    return (
        "Train DETR on COCO-format data, on a laptop or a GPU cluster.\n\n"
        "usage: detr COMMAND ...   (`detr COMMAND --help` lists its options)\n\n" + command_table(COMMANDS)
    )


def _quiet() -> None:
    """Hide the warnings of libraries; `--verbose` shows them."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


def _fail(message: str, status: int) -> int:
    print(f"detr: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

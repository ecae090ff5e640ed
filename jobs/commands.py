"""One function per word of the command line: each builds its options, then calls one function of a package.

Imports of heavy packages stand inside the functions, after parsing, so that help is quick.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from pipeline.config import RunConfig, to_json
from pipeline.recipes import RECIPES

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
    """The first statement of a framed message, and the flag that it takes for the one meant."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()]
    ruled = [position for position, line in enumerate(box.splitlines()) if set(line) <= set("│─ ")]
    text = " ".join(line for line in lines[1 : ruled[0] if ruled else None] if line)
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


# ---------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class ShardCoco:
    """Turn a COCO folder and its annotation file into WebDataset shards with a manifest."""

    images: Path
    """Folder of the image files."""
    annotations: Path
    """COCO instances JSON."""
    out: str
    """Folder to write."""
    samples_per_shard: int = 1000
    workers: int = 2
    """Threads, each writing whole shards; the result does not depend on them."""
    limit: int = 0
    """Only so many images, those of lowest id; 0 for all."""


def shard(argv: list[str]) -> None:
    """detr shard coco|verify|info."""
    choose(argv, {"coco": _shard_coco, "verify": _shard_verify, "info": _shard_info}, "detr shard")


def _shard_coco(argv: list[str]) -> None:
    options = parse(ShardCoco, argv, "detr shard coco")
    from pipeline.progress import progress_bar
    from shards.write import WriteConfig, write_coco

    config = WriteConfig(samples_per_shard=options.samples_per_shard, workers=options.workers, limit=options.limit)
    with progress_bar("sharding") as progress:
        manifest = write_coco(options.images, options.annotations, options.out, config, progress)
    print(_describe(manifest))


@dataclass(frozen=True)
class DataSet:
    """A data set written by `detr shard`."""

    url: tyro.conf.Positional[str]
    """Its folder or URL."""


def _shard_info(argv: list[str]) -> None:
    from shards.manifest import load_manifest

    manifest = load_manifest(parse(DataSet, argv, "detr shard info").url)
    print(_describe(manifest))
    print("categories  " + ", ".join(f"{category.id} {category.name}" for category in manifest.categories))


def _describe(manifest: Any) -> str:
    crowds = int(manifest.index().annotations["iscrowd"].sum())
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"data set    {manifest.name} in {manifest.url}",
        f"images      {manifest.images} in {len(manifest.shards)} shards, {size / 1e6:.1f} MB",
        f"annotations {manifest.annotations} ({crowds} crowd regions), at most {manifest.index().max_boxes} boxes in an image",
        f"classes     {manifest.num_classes}",
        f"digest      {manifest.digest}",
        f"source      {manifest.source_digest} (sha256 of the annotation file)",
    ]
    return "\n".join(lines)


def _shard_verify(argv: list[str]) -> None:
    options = parse(DataSet, argv, "detr shard verify")
    from pipeline.progress import progress_bar
    from shards.errors import ShardError
    from shards.verify import verify

    with progress_bar("verifying", "shard") as progress:
        report = verify(options.url, progress)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.ok:
        raise ShardError(f"{options.url}: {len(report.problems)} problems; expected the data set as it was written")
    print(f"{options.url}: {report.images} images in {report.shards} shards, every byte as written")


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Start:
    """How a run starts; none of it changes the result."""

    address: str | None = None
    """A Ray cluster to train on (`auto`, HOST:6379); by default RAY_ADDRESS, else a local one is started."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show what Ray, MLflow and the workers print."""


@dataclass(frozen=True)
class Train:
    """Train a recipe. Any of its fields can be overridden."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    start: Annotated[Start, tyro.conf.arg(name="")]
    smoke: bool = False
    """Two steps of the recipe, on two images each with random backbone weights: does everything fit together?"""


def train(argv: list[str]) -> None:
    """detr train RECIPE [--any.field value ...]."""
    options = _train_options(argv, "detr train")
    if options is None:
        return
    from pipeline.train import train as start_training

    config = smoke(options.config) if options.smoke else options.config
    if options.smoke:
        print("smoke: two steps of two images on one worker, random backbone weights, evaluation on two images")
    _print_outcome(start_training(config, _launch(options.start)))


def check_train(argv: list[str]) -> RunConfig | None:
    """The configuration that `detr train ARGV` would run, checked as far as it can be without data; None for help."""
    options = _train_options(argv, "detr train")
    return None if options is None else options.config


def _train_options(argv: list[str], prog: str) -> Train | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: {prog} RECIPE [--any.field value ...]   ({prog} RECIPE --help lists every field)\n\n{_recipe_list()}"
        )
        if not argv:
            raise UsageError("which recipe?")
        return None
    recipe = recipe_named(argv[0])
    return parse(Train, argv[1:], f"{prog} {argv[0]}", default=Train(recipe, Start()))


def recipe_named(name: str) -> RunConfig:
    """The recipe; an unknown name is refused with the nearest that exists."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, 1, 0.0)
        raise UsageError(f"there is no recipe {name!r}; did you mean {close[0]}? Expected one of: {', '.join(RECIPES)}")
    return RECIPES[name]


def smoke(config: RunConfig) -> RunConfig:
    """Two steps of a recipe that fit on a laptop: everything as it is but the batch, the workers and the weights."""
    return replace(
        config,
        model=replace(config.model, backbone_weights="random"),
        optim=replace(config.optim, batch_size=2, max_steps=2),
        evaluate=replace(config.evaluate, limit=2, pictures=1),
        cluster=replace(config.cluster, workers=1, cpus_per_worker=2, max_failures=0),
        track=replace(
            config.track, run_name=f"{config.run_name}-smoke", register_as=f"{config.model_name}-smoke", log_every=1
        ),
    )


def _recipe_list() -> str:
    width = max(map(len, RECIPES))
    return "recipes\n" + "\n".join(
        f"  {name.ljust(width)}  {config.model.backbone}{' DC5' if config.model.dilation else ''}, {config.optim.epochs} epochs, "
        f"batch {config.optim.batch_size}, {config.cluster.workers} workers"
        for name, config in RECIPES.items()
    )


def _launch(start: Start) -> Any:
    from pipeline.train import Launch

    return Launch(address=start.address, verbose=start.verbose)


def _print_outcome(outcome: Any) -> None:
    from pipeline.report import metrics_table

    print(f"\n{metrics_table(outcome.metrics)}\n")
    print(f"best        {outcome.best}")
    print(f"registered  models:/{outcome.model_name}@best (version {outcome.version})")
    print("in MLflow   detr ui")


def show(argv: list[str]) -> None:
    """detr show RECIPE."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: detr show RECIPE [--any.field value ...]\n\n{_recipe_list()}")
        return
    config = parse(RunConfig, argv[1:], f"detr show {argv[0]}", default=recipe_named(argv[0]))
    print(to_json(config).decode())


def demo(argv: list[str]) -> None:
    """detr demo."""
    start = parse(Start, argv, "detr demo")
    from pipeline.demo import demo as run_demo

    run_demo(_launch(start))


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint, at the exact next sample."""

    run: tyro.conf.Positional[str]
    """The run's id, the start of it, or its name; or models:/NAME@ALIAS for the run a version came from."""
    start: Annotated[Start, tyro.conf.arg(name="")]
    epochs: int | None = None
    """Train to this many epochs instead of those it was started with."""


def resume(argv: list[str]) -> None:
    """detr resume RUN."""
    options = parse(Resume, argv, "detr resume")
    from pipeline.train import resume as go_on

    _print_outcome(go_on(options.run, epochs=options.epochs, launch=_launch(options.start)))


@dataclass(frozen=True)
class Runs:
    """List the newest runs, or show one."""

    run: tyro.conf.Positional[str | None] = None
    """A run's id, the start of it, or its name."""
    follow: bool = False
    """Watch it until it ends."""
    limit: int = 20


def runs(argv: list[str]) -> None:
    """detr runs [RUN [--follow]]."""
    options = parse(Runs, argv, "detr runs")
    from pipeline.mlflow_store import connect, find_run, find_runs
    from pipeline.report import runs_table

    client = connect()
    if options.run is None:
        print(runs_table(find_runs(client, limit=options.limit)))
        return
    run = find_run(client, options.run)
    print(runs_table([run]))
    if options.follow:
        from pipeline.follow import follow

        follow(client, run.info.run_id, sys.stderr)


# ---------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Evaluate:
    """Score a registered version on a data set: the twelve COCO numbers."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: str
    """Folder or URL of the data set's shards."""
    json: Path | None = None
    """Also write the numbers here."""


def evaluate(argv: list[str]) -> None:
    """detr evaluate models:/NAME@ALIAS --data URL."""
    options = parse(Evaluate, argv, "detr evaluate")
    import msgspec

    from pipeline.registered import evaluate_registered
    from pipeline.report import metrics_table

    metrics = evaluate_registered(options.model, options.data, progress=True).score.metrics
    print(metrics_table(metrics))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(metrics), indent=2) + b"\n")


@dataclass(frozen=True)
class Predict:
    """Detect on pictures: annotated copies and a COCO-style detections.json."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files."""
    out: Path
    """Folder to write into."""
    threshold: float = 0.5
    """Leave out detections of a lower score."""


def predict(argv: list[str]) -> None:
    """detr predict models:/NAME@ALIAS IMAGE... --out DIR."""
    options = parse(Predict, argv, "detr predict")
    if not options.images:
        raise UsageError("no picture given; expected `detr predict models:/NAME@ALIAS IMAGE... --out DIR`")
    from pipeline.registered import predict as detect

    found = detect(options.model, options.images, options.out, threshold=options.threshold)
    print(
        f"{len(found)} detections in {len(options.images)} pictures: see {options.out} and {options.out / 'detections.json'}"
    )


@dataclass(frozen=True)
class Register:
    """Register the best checkpoint of a run, finished or not."""

    run: tyro.conf.Positional[str]
    """The run's id, the start of it, or its name."""
    name: str
    """Registered model."""
    alias: str = "best"
    """Alias that will point at the new version."""


def register(argv: list[str]) -> None:
    """detr register RUN --name NAME --alias ALIAS."""
    options = parse(Register, argv, "detr register")
    from pipeline.registry import register_run

    version = register_run(options.run, name=options.name, alias=options.alias)
    print(f"registered models:/{options.name}@{options.alias} (version {version})")


@dataclass(frozen=True)
class Ui:
    """Open the MLflow UI on the local store (on loopback), or say where the tracking server is."""

    port: int = 5000
    host: str = "127.0.0.1"


def ui(argv: list[str]) -> None:
    """detr ui."""
    options = parse(Ui, argv, "detr ui")
    from pipeline.ui import serve_ui

    serve_ui(options.host, options.port)


# ---------------------------------------------------------------------------------------------------------- clusters


@dataclass(frozen=True)
class Submit:
    """Run `detr COMMAND ...` on a Ray cluster: `detr submit SPEC [--address URL] -- COMMAND ...`."""

    spec: tyro.conf.Positional[str]
    """Where and with what it runs; `local` is the cluster at the given address."""
    address: str | None = None
    """Of the cluster's job server; by default the spec's, or RAY_API_SERVER_ADDRESS."""
    follow: bool = False
    """Show the job's log until it ends."""


def submit(argv: list[str]) -> None:
    """detr submit SPEC -- COMMAND ..."""
    mine, _, command = (
        (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :]) if "--" in argv else (argv, "", [])
    )
    options = parse(Submit, mine, "detr submit")
    if not command:
        raise UsageError("nothing to run; expected `detr submit SPEC -- train RECIPE ...`")
    from jobs.submit import follow_logs, spec_named
    from jobs.submit import submit as send

    spec = spec_named(options.spec, options.address)
    job_id = send(spec, command)
    print(
        f"submitted {job_id} to {spec.address}\nfollow it   detr jobs logs {job_id} --follow\nstop it     detr jobs stop {job_id}"
    )
    if options.follow:
        follow_logs(spec, job_id, sys.stdout)


@dataclass(frozen=True)
class Cluster:
    """Which cluster's jobs."""

    address: str | None = None
    """Of the cluster's job server; by default RAY_API_SERVER_ADDRESS, else this machine's."""


@dataclass(frozen=True)
class Job(Cluster):
    """A job on a cluster."""

    id: tyro.conf.Positional[str] = tyro.MISSING
    """The job's id, as `detr submit` printed it."""


@dataclass(frozen=True)
class JobLogs(Job):
    """What a job has printed."""

    follow: bool = False
    """Go on until it ends."""


def jobs(argv: list[str]) -> None:
    """detr jobs list|status|logs|stop."""
    choose(argv, {"list": _jobs_list, "status": _jobs_status, "logs": _jobs_logs, "stop": _jobs_stop}, "detr jobs")


def _jobs_list(argv: list[str]) -> None:
    options = parse(Cluster, argv, "detr jobs list")
    from jobs.submit import jobs_table, spec_named

    print(jobs_table(spec_named("local", options.address)))


def _jobs_status(argv: list[str]) -> None:
    options = parse(Job, argv, "detr jobs status")
    from jobs.submit import spec_named, status

    print(status(spec_named("local", options.address), options.id))


def _jobs_logs(argv: list[str]) -> None:
    options = parse(JobLogs, argv, "detr jobs logs")
    from jobs.submit import follow_logs, logs, spec_named

    spec = spec_named("local", options.address)
    if options.follow:
        follow_logs(spec, options.id, sys.stdout)
    else:
        print(logs(spec, options.id), end="")


def _jobs_stop(argv: list[str]) -> None:
    options = parse(Job, argv, "detr jobs stop")
    from jobs.submit import spec_named, stop

    print(stop(spec_named("local", options.address), options.id))

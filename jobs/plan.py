"""Plan of a job, before any engine sees it: (cluster, request, code) -> Plan, a pure function.

`Request` is a parsed command, `Plan` all that an engine renders. `make_plan` gives a training without `--run` a name of
its own, so that the launcher's retries are the same run.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jobs.clusters.entries import Cluster
from jobs.clusters.secret import Secret
from jobs.code import Code
from pipeline.config import RunConfig

STATUS_LATER = 75
"""Exit status of a command that is to be started again (docs/stopping-and-resuming.md)."""
SUBMITTABLE = ("demo", "shard", "train", "sweep", "resume", "evaluate", "predict", "register", "import", "export")
"""Commands that can be jobs."""
_CONTINUED = ("train", "sweep", "resume")
"""Commands that continue what they did when they are started again."""
GRACE_S = 60
"""Seconds that a job has to save after SIGTERM."""


@dataclass(frozen=True)
class Request:
    """A `detr` command to run on a cluster.

    config: that of a training, or of the first trial of a sweep, with the cluster's defaults; else None.
    """

    argv: tuple[str, ...]
    config: RunConfig | None = None
    run: str = ""
    """Name that `--run` gave."""
    smoke: bool = False
    model: str = ""
    """Registered model that it starts from, models:/..."""
    known_run: str = ""
    """Run that it continues or registers."""
    reads: tuple[str, ...] = ()
    """Folders, files and URLs that it reads."""


@dataclass(frozen=True)
class Workers:
    """Needs of a run: `count` workers, or at least `fewest`, each with these resources."""

    count: int
    fewest: int
    gpus: int
    cpus: int

    def per_node(self, gpus: int, cpus: int) -> int:
        """Return how many workers fit a node; 0 CPUs: their number is not known."""
        by_gpu = gpus // self.gpus if self.gpus else math.inf
        by_cpu = cpus // self.cpus if cpus else math.inf
        fits = min(by_gpu, by_cpu)
        return self.count if fits == math.inf else int(fits)


@dataclass(frozen=True)
class Plan:
    """A job: everything that an engine needs, and nothing secret."""

    cluster: Cluster
    job: str
    """Name of the job, 47 characters of a-z, 0-9 and - at most, so that it is a name for every launcher."""
    run: str
    """Name of the run, which every retry of the job continues; empty for a command that is no training."""
    argv: tuple[str, ...]
    """Words after `detr`, with the defaults of the cluster."""
    code: Code
    environment: Mapping[str, str]
    secrets: Mapping[str, Secret]
    workers: Workers | None
    """None for a command that is no training."""
    config: RunConfig | None = field(repr=False, default=None)

    @property
    def command(self) -> tuple[str, ...]:
        """Words that run on the cluster. With -P no package of the working folder hides this project's."""
        return (self.cluster.python, "-P", "-m", "jobs.cli", *self.argv)

    @property
    def start(self) -> tuple[str, ...]:
        """Lines of the shell before the command: into the folder of the cluster, with a line if it or Python is missing."""
        cluster, lines = self.cluster, []
        if cluster.directory:
            problem = f"there is no folder {cluster.directory} here; expected the directory of the entry {cluster.name}"
            lines.append(_or_say(f"cd {shlex.quote(cluster.directory)} 2>/dev/null", problem))
        problem = f"there is no {cluster.python} here; expected the python of the entry {cluster.name}"
        lines.append(_or_say(f"command -v {shlex.quote(cluster.python)} >/dev/null", problem))
        return tuple(lines)

    @property
    def shell(self) -> str:
        """The command as a line of the shell, after those of `start`."""
        return "; ".join([*self.start, f"exec {shlex.join(self.command)}"])

    @property
    def shown(self) -> str:
        """The command as a user would write it."""
        return shlex.join(["detr", *self.argv])

    @property
    def restarts(self) -> bool:
        """True if the same command, started again, continues."""
        return self.argv[0] in _CONTINUED

    @property
    def retries(self) -> int:
        """Number of times that a launcher starts the command again if it fails."""
        return self.cluster.retries if self.restarts else 0

    @property
    def nodes(self) -> int:
        """Number of nodes that the job wants at most; 0 if the entry does not say."""
        return self.cluster.nodes.most if self.cluster.nodes else 0


def make_plan(cluster: Cluster, request: Request, code: Code, suffix: str, mlflow: str) -> Plan:
    """Return the plan of a job.

    suffix: four to eight hexadecimal digits that no other job has. mlflow: this machine's MLflow, for an entry without.
    """
    argv, run, given = request.argv, "", ""
    config = request.config if argv[0] == "train" else None
    if config is not None:
        ending = "-smoke" if request.smoke else ""  # which the command adds
        given = request.run or f"{config.run_name.removesuffix(ending)}-{suffix}"
        run = f"{given}{ending}"
        if not request.run:
            argv = (*_without(argv, "--track.run-name"), "--run", given)
        if cluster.storage and not _has(argv, "--storage"):
            argv = (*argv, "--storage", cluster.storage)
    base = re.sub(r"[^a-z0-9]+", "-", (given.removesuffix(f"-{suffix}") or argv[0]).lower()).strip("-")
    job = f"{base if base[:1].isalpha() else f'run-{base}'}"[: 47 - len(suffix) - 1].rstrip("-") + f"-{suffix}"
    environment = {
        "MLFLOW_TRACKING_URI": cluster.mlflow or mlflow,
        "DETR_JOB": job,
        "DETR_LAUNCHER": cluster.launcher,
        "DETR_CLUSTER": cluster.name,
        **({"DETR_CACHE": cluster.cache} if cluster.cache else {}),
        **({"DETR_COMMIT": code.commit} if cluster.code == "snapshot" else {}),
        **cluster.environment,
    }
    workers = workers_of(request.config, cluster) if request.config else None
    return Plan(cluster, job, run, argv, code, environment, cluster.references, workers, config)


def workers_of(config: RunConfig, cluster: Cluster) -> Workers:
    """Return what the workers of a run need on this cluster; `auto` takes GPUs where its nodes have some."""
    wanted = config.cluster
    has_gpus = bool(cluster.nodes and cluster.nodes.gpus)
    gpu = wanted.gpu == "yes" or (wanted.gpu == "auto" and has_gpus)
    return Workers(wanted.workers, wanted.fewest, int(gpu), wanted.cpus_per_worker)


def describe(plan: Plan) -> str:
    """Return the plan as lines for `--dry-run`."""
    cluster, code = plan.cluster, plan.code
    rows = [("cluster", f"{cluster.name} ({cluster.launcher})"), ("job", plan.job)]
    if plan.run:
        rows.append(("run", f"{plan.run}, the same run in every retry"))
    rows.append(("command", plan.shown))
    if cluster.code == "snapshot" and code.files:
        size = f"{len(code.files)} tracked files, {code.size / 1e6:.1f} MB"
        rows.append(("code", f"{size}, commit {code.commit}, digest {code.digest}"))
    elif cluster.code == "installed":
        rows.append(("code", "installed on the cluster"))
    if plan.workers:
        workers = plan.workers
        fewest = f"{workers.fewest} to " if workers.fewest < workers.count else ""
        each = f"{workers.gpus} GPU and " if workers.gpus else ""
        rows.append(("workers", f"{fewest}{workers.count}, each {each}{workers.cpus} CPUs"))
    if cluster.nodes:
        nodes = cluster.nodes
        count = f"{nodes.fewest} to {nodes.most}" if nodes.elastic else str(nodes.most)
        rows.append(("nodes", f"{count}, each {nodes.gpus} GPUs {nodes.accelerator}".rstrip()))
    rows += [("environment", f"{name}={value}") for name, value in plan.environment.items()]
    rows += [("secret", f"{name} from {secret}") for name, secret in plan.secrets.items()]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in rows)


def _or_say(test: str, problem: str) -> str:
    message = shlex.quote(f"detr: {problem}")
    return f"{test} || {{ echo {message} >&2; exit 1; }}"


def _has(argv: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in _dashed(argv))


def _without(argv: Sequence[str], flag: str) -> tuple[str, ...]:
    """Return the words without a flag and its value."""
    kept, skip = [], False
    for word, dashed in zip(argv, _dashed(argv), strict=True):
        if skip:
            skip = False
        elif dashed == flag:
            skip = True
        elif not dashed.startswith(f"{flag}="):
            kept.append(word)
    return tuple(kept)


def _dashed(argv: Sequence[str]) -> list[str]:
    """Return the words with the flags in the form with dashes; the parser takes underscores too."""
    return [
        word.partition("=")[0].replace("_", "-") + "".join(word.partition("=")[1:]) if word.startswith("--") else word
        for word in argv
    ]

"""A run whose driver, workers and nodes are killed at random, and whose command is then given again.

The cluster is real: a head without CPUs, where the driver runs, and two nodes for one worker each. A node that starts
again has an empty home and scratch folder. So has a driver that comes back as if from another host, and another working
folder. Only the run's storage, the data and MLflow are the same for all.
"""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.checkpoint.location import location
from tests.support.command import TINY, Command, kill
from tests.support.lost_hosts import Cluster, host_environment
from tests.support.recording import Recording
from tests.support.undisturbed import differences

Say = Callable[[str], None]
KINDS = ("driver", "worker", "node", "all")
RUN = "killed"
_STEP_S, _NEXT_S = 0.1, 500.0


class Kill(NamedTuple):
    """One kill: what, and when."""

    kind: str
    step: int
    """Step that the run has taken when it comes."""
    starting: bool
    """It comes `delay_s` after the command, or the kill, before it, and not at a step."""
    delay_s: float
    elsewhere: bool
    """The command comes back from another host."""
    victim: int
    """Number of the worker or the node."""


class Report(NamedTuple):
    """What became of a run after all kills."""

    kills: list[Kill]
    attempts: int
    """Groups of workers that have taken a step."""
    points: int
    seconds: float
    again_s: float
    """Seconds of the command of the finished run, given once more on another host."""
    problems: list[str]

    def __str__(self) -> str:
        kinds = Counter(kill.kind for kill in self.kills)
        hosts = sum(kill.elsewhere for kill in self.kills)
        named = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS)
        text = f"{len(self.kills)} kills ({named}; {hosts} continued from another host), {self.attempts} attempts, "
        text += f"{self.seconds:.0f} s, {self.again_s:.1f} s for the command afterwards: "
        held = f"weights and curves bitwise those of an undisturbed run, one run in MLflow, {self.points} points, none twice"
        return text + ("; ".join(self.problems) or held)


def steps_for(count: int) -> int:
    """Return the steps of a run that is to be killed so often."""
    return 60 + 15 * count


def plan(seed: int, count: int) -> list[Kill]:
    """Return the kills of a seed, in order: each kind as often as the others, at different steps."""
    chance = random.Random(seed)
    kinds = [kind for start in range(0, count, len(KINDS)) for kind in chance.sample(KINDS, len(KINDS))][:count]
    steps = sorted(chance.sample(range(3, steps_for(count) - 20), count))
    kills = []
    for kind, step in zip(kinds, steps, strict=True):
        whole = kind in ("driver", "all")
        starting = whole and chance.random() < 0.25
        delay_s = chance.uniform(0.5, 12) if starting else chance.uniform(0, 3 * _STEP_S)
        kills.append(Kill(kind, step, starting, delay_s, whole and chance.random() < 0.5, chance.randrange(2)))
    return kills


class KilledRun:
    """The run, its hosts and the cluster, all below one folder. `data` holds the shards `train` and `val`."""

    def __init__(self, folder: Path, data: Path, storage: str, count: int, environment: Mapping[str, str], say: Say):
        self._folder, self._storage, self._say = folder, storage, say
        self._recording = Recording(folder / "steps")
        (folder / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
        self._environment = (
            Command(folder).env
            | self._recording.environment
            | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
            | {"RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_AUTH_MODE": "token"}
            | dict(environment)
        )
        self._cluster = Cluster(folder, self._environment)
        self._hosts = 0
        self._host = self._new_host()
        self._driver: subprocess.Popen[str] | None = None
        self._words = [
            *("train", "overfit", "--data.train", str(data / "train"), "--data.val", str(data / "val"), *TINY),
            *("--optim.max-steps", str(steps_for(count)), "--evaluate.every", "10"),
            *("--cluster.workers", "2", "--cluster.max-failures", "100", "--cluster.collective-timeout-s", "60"),
            *("--storage", storage, "--run", RUN, "--address", self._cluster.address),
        ]

    def survive(self, kills: list[Kill]) -> Report:
        """Kill as planned, give the command again until the run ends, and compare it with an undisturbed one."""
        start = time.monotonic()
        self._recording.pace(_STEP_S)
        try:
            self._cluster.start()
            self._driver = self._host.start(*self._words)
            for number, planned in enumerate(kills, 1):
                next_at_once = number < len(kills) and kills[number].starting
                self._say(f"kill {number}: {self._carry_out(planned, settle=not next_at_once)}")
            self._finish()
            again_s = self._give_to_finished_run()
        finally:
            if self._driver and self._driver.poll() is None:
                self._driver.kill()
                self._driver.wait()
            self._cluster.lose_all()
        attempts = len({line.group for line in self._recording.lines()})
        undisturbed = self._folder / "undisturbed"
        problems, points = differences(location(self._storage) / RUN, self._folder / "mlflow.db", undisturbed)
        return Report(kills, attempts, points, time.monotonic() - start, again_s, problems)

    def _carry_out(self, planned: Kill, *, settle: bool) -> str:
        """Kill and give the command again; `settle`: wait until another group trains. Return what happened."""
        if not planned.starting:
            self._reach(planned.step)
        time.sleep(planned.delay_s)
        step, before, start = self._recording.last()[0], self._newest(), time.monotonic()
        victim = self._kill(planned)
        again = self._give_again(planned)
        when = f"{planned.delay_s:.1f} s after the start" if planned.starting else f"after step {step}"
        where = ", from another host" if planned.elsewhere else ""
        if not settle:
            return f"{victim} {when}; {again}{where}"
        self._wait(lambda: self._newest() > before, "a step after the kill")
        return f"{victim} {when}; {again}{where}; training again after {time.monotonic() - start:.0f} s"

    def _kill(self, planned: Kill) -> str:
        assert self._driver
        if planned.kind == "worker":
            workers = self._cluster.workers()
            if not workers:
                return "worker, though there was none"
            kill(workers[planned.victim % len(workers)])
        elif planned.kind == "node":
            self._cluster.lose_node(planned.victim)
        else:
            self._driver.kill()
            if planned.kind == "all":
                self._cluster.lose_all()
        return planned.kind

    def _give_again(self, planned: Kill) -> str:
        assert self._driver
        if planned.kind in ("driver", "all"):
            self._driver.communicate()
            if planned.kind == "all":
                self._cluster.start()
            if planned.elsewhere:
                self._host = self._new_host()
            self._driver = self._host.start(*self._words)
            return "the command again"
        # The driver lives and waits for its workers: a second one must leave the run to it.
        second = self._host.start(*self._words)
        output, _ = second.communicate(timeout=_NEXT_S)
        assert second.returncode == 75, (second.returncode, output)
        assert f"{self._driver.pid}" in output
        return "the command again, which left the run to the first"

    def _reach(self, step: int) -> None:
        self._wait(lambda: self._recording.last()[0] >= step, f"step {step}")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        assert self._driver
        end = time.monotonic() + _NEXT_S
        while not condition():
            if self._driver.poll() is not None:
                self._continue(what)
            assert time.monotonic() < end, f"not within {_NEXT_S:.0f} s: {what}\n{self._output_so_far()}"
            time.sleep(0.1)

    def _continue(self, what: str) -> None:
        """Give the command again after a driver that ended by itself, if it asks for that."""
        assert self._driver
        output, _ = self._driver.communicate()
        assert self._driver.returncode == 75, f"before {what}: exit {self._driver.returncode}\n{output}"
        self._say(f"exit 75, the command again: {output.strip().splitlines()[-1:]}")
        self._driver = self._host.start(*self._words)

    def _output_so_far(self) -> str:
        assert self._driver
        self._driver.kill()
        return self._driver.communicate()[0]

    def _newest(self) -> float:
        """Return when the newest process that has taken a step began."""
        return max((line.since for line in self._recording.lines()), default=0.0)

    def _new_host(self) -> Command:
        self._hosts += 1
        folder = self._folder / f"host-{self._hosts}"
        command = Command(folder)
        command.env = host_environment(folder, self._environment)
        return command

    def _finish(self) -> None:
        assert self._driver
        self._recording.pace(0)
        while True:
            output, _ = self._driver.communicate(timeout=_NEXT_S)
            if self._driver.returncode == 0:
                return
            assert self._driver.returncode == 75, f"exit {self._driver.returncode}\n{output}"
            self._say(f"exit 75, the command again: {output.strip().splitlines()[-1:]}")
            self._driver = self._host.start(*self._words)

    def _give_to_finished_run(self) -> float:
        """Give the command of the finished run on another host; return the seconds that it takes to answer."""
        start = time.monotonic()
        self._new_host()(*self._words)
        return time.monotonic() - start

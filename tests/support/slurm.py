"""A stand-in for Slurm on this machine: sbatch, srun, scontrol, squeue, sacct and scancel that start real processes.

A job runs in a process namespace of its own, and so does each of its nodes, so that everything of a job ends with it. It
gets no variable of the process that submits it, as with `--export=NONE`. This needs root and the command `unshare`.

As a program, `python slurm.py sbatch ...` is one of Slurm's commands; its state are files in the folder STUB_SLURM.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sacct", "scancel")
_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def reason_without_slurm() -> str:
    """Return the reason why this machine cannot have it, or ""."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "process namespaces need root and the command `unshare`"
    done = subprocess.run([*_NAMESPACE, "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"process namespaces cannot be made here: {done.stderr.strip()}"


class Slurm:
    """The cluster: `environment` is what a user's processes need to find its commands, `login` that of jobs."""

    def __init__(self, folder: Path, login: Mapping[str, str], cpus: int = 1) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name in COMMANDS:
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
        (programs / "hostname").write_text("#!/bin/sh\necho 127.0.0.1 10.0.0.1\n")
        for program in programs.iterdir():
            program.chmod(0o755)
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        # Numbers of its own, since a job's folder and ports on this machine come from its number.
        self.first = random.randrange(10**6, 9 * 10**6)
        own = {"PATH": path, "STUB_SLURM": str(folder), "STUB_CPUS": str(cpus)}
        (folder / "first").write_text(str(self.first))
        self.environment = own
        (folder / "login.json").write_text(json.dumps({**login, **own}))

    def jobs(self) -> list[dict[str, Any]]:
        """Return what is known of every job."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("job-*.json"))]

    def warn(self, name: str) -> None:
        """Send the signal that `--signal=B:TERM@...` asks for before the time limit."""
        subprocess.run(["scancel", "--batch", "--signal=TERM", f"--name={name}"], env=self.environment, check=True)

    def stop(self) -> None:
        """End everything."""
        for job in self.jobs():
            for pid in (job.get("runner"), job.get("pid")):
                try:
                    os.kill(int(pid or 0) or 2**22, signal.SIGKILL)
                except ProcessLookupError:
                    continue


class _State:
    """The files of one job."""

    def __init__(self, number: int) -> None:
        self.path = Path(os.environ["STUB_SLURM"]) / f"job-{number}.json"

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found

    def write(self, **changes: Any) -> dict[str, Any]:
        known = (self.read() if self.path.exists() else {}) | changes
        aside = self.path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(known))
        aside.rename(self.path)
        return known


def _sbatch(words: list[str]) -> None:
    script = Path(words[-1])
    lines = [line.split(" ", 1)[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    options = dict(line.lstrip("-").partition("=")[::2] for line in lines)
    folder = Path(os.environ["STUB_SLURM"])
    number = int((folder / "first").read_text()) + len(list(folder.glob("job-*.json")))
    state = _State(number)
    state.write(number=number, name=options["job-name"], state="PENDING", script=str(script), options=options, starts=0)
    words = [sys.executable, "-S", __file__, "run", str(number)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    state.write(runner=subprocess.Popen(words, start_new_session=True, **quiet).pid)  # type: ignore[call-overload]
    print(number)


def _run(number: int) -> None:
    """Run a job, again as long as it asks for that."""
    state = _State(number)
    job = state.read()
    folder = Path(os.environ["STUB_SLURM"])
    spooled = folder / f"script-{number}"
    shutil.copy(job["script"], spooled)
    nodes = job["options"]["nodes"].split("-")[-1]
    while True:
        environment = json.loads((folder / "login.json").read_text())
        environment |= {"SLURM_JOB_ID": str(number), "SLURM_NNODES": nodes, "SLURM_EXPORT_ENV": "NONE"}
        environment |= {"SLURM_JOB_NUM_NODES": nodes, "SLURM_RESTART_COUNT": str(job["starts"])}
        environment["SLURM_CPUS_ON_NODE"] = environment["STUB_CPUS"]
        if cpus := job["options"].get("cpus-per-task"):
            environment["SLURM_CPUS_PER_TASK"] = cpus
        with Path(job["options"]["output"]).open("ab") as log:
            words = [*_NAMESPACE, sys.executable, "-S", __file__, "init", str(spooled)]
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        job = state.write(state="RUNNING", starts=job["starts"] + 1, pid=process.pid, start=time.time(), requeue=False)
        while process.poll() is None and not (job := state.read())["requeue"]:
            time.sleep(0.1)
        process.kill()
        process.wait()
        job = state.read()
        if not job["requeue"] or job["state"] == "CANCELLED":
            break
        state.write(state="PENDING")
    if job["state"] != "CANCELLED":
        state.write(state="COMPLETED" if process.returncode == 0 else "FAILED")


def _init(script: str) -> None:
    """Run the script as the first process of a namespace, which waits for orphans, too."""
    pid = os.spawnlp(os.P_NOWAIT, "bash", "bash", script)
    while True:
        ended, status = os.wait()
        if ended == pid:
            sys.exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128)


def _srun(words: list[str]) -> None:
    command = words[next(place for place, word in enumerate(words) if not word.startswith("-")) :]
    base = os.environ | {"SLURM_CPUS_ON_NODE": os.environ["STUB_CPUS"]}
    nodes = [
        subprocess.Popen([*_NAMESPACE, *command], env=base | {"SLURM_NODEID": str(node)})
        for node in range(int(os.environ["SLURM_NNODES"]))
    ]

    def end(*_: object) -> None:
        for node in nodes:
            node.kill()

    signal.signal(signal.SIGTERM, end)
    sys.exit(max(abs(node.wait()) for node in nodes))


def _scontrol(words: list[str]) -> None:
    assert words[0] == "requeue"
    _State(int(words[1])).write(requeue=True)


def _queue(ended: bool) -> None:
    for path in sorted(Path(os.environ["STUB_SLURM"]).glob("job-*.json")):
        job = json.loads(path.read_text())
        if (job["state"] in ("PENDING", "RUNNING")) is ended:
            continue
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(job["start"])) if "start" in job else "N/A"
        print(f"{job['name']}|{job['state']}|{start}|{'Priority' if job['state'] == 'PENDING' else 'None'}")


def _scancel(words: list[str]) -> None:
    name = next(word.partition("=")[2] for word in words if word.startswith("--name="))
    for path in Path(os.environ["STUB_SLURM"]).glob("job-*.json"):
        job = json.loads(path.read_text())
        if job["name"] != name or job["state"] not in ("PENDING", "RUNNING"):
            continue
        if "--signal=TERM" in words and "--batch" in words:
            (init,) = _children(job["pid"])
            os.kill(_children(init)[0], signal.SIGTERM)
        else:
            _State(job["number"]).write(state="CANCELLED")
            os.kill(job["pid"], signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _main(name: str, words: list[str]) -> None:
    if name == "sbatch":
        _sbatch(words)
    elif name == "run":
        _run(int(words[0]))
    elif name == "init":
        _init(words[0])
    elif name == "srun":
        _srun(words)
    elif name == "scontrol":
        _scontrol(words)
    elif name == "scancel":
        _scancel(words)
    else:
        _queue(ended=name == "sacct")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])

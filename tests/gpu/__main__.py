"""Everything that only a GPU can show, in one call of at most nine minutes: `python -m tests.gpu`, or `make gpu`.

Each section is a module of this folder and runs in a process of its own with a limit, so that a crash or a hang costs only
its own figures. Every figure is on the disk when it is known (`OUT/results.jsonl`, `OUT/log.txt`), the tables of
`BENCHMARKS.md` are rewritten after each section, and the sections that matter most come first.

The machine needs torch, torchvision, scipy and numpy. Sections that read data sets or write checkpoints need a few small
packages more; without them they are left out with the reason, or `--wheels FOLDER` installs them from files. `PEER_DETR`
names a checkout of the original to compare with. `--tiny --device cpu` runs all of it on small inputs, as a rehearsal.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from tests.gpu import results
from tests.gpu.results import Results
from tests.gpu.work import Setting

_ROOT = Path(__file__).parents[2]
_DATA = ("msgspec", "fsspec", "safetensors")


class Section(NamedTuple):
    """Module of this folder, with its limit in seconds and the packages that it needs beside torch."""

    module: str
    limit_s: int
    needs: tuple[str, ...] = ()


SECTIONS = (
    Section("machine", 20),
    Section("marked", 90, ("pytest", *_DATA)),
    Section("precision", 90),
    Section("steps", 90, _DATA),
    Section("throughput", 120),
    Section("graphs", 100, _DATA),
    Section("attention", 60),
    Section("deformable", 40),
    Section("saving", 60, _DATA),
    Section("whole_run", 90, (*_DATA, "simplejpeg", "hotcoco", "PIL")),
    Section("contexts", 60, (*_DATA, "simplejpeg", "PIL")),
    Section("ranks", 90, _DATA),
    Section("loader", 40, (*_DATA, "simplejpeg", "PIL")),
    Section("convergence", 180, (*_DATA, "simplejpeg", "hotcoco", "PIL")),
)


def main() -> None:
    options = _options()
    setting = Setting(options.device, options.tiny)
    if options.only:
        section = importlib.import_module(f"tests.gpu.{options.only}")
        section.run(Results(options.out, options.only), setting)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    paths = [str(_ROOT), *([_installed(options.wheels)] if options.wheels else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    if options.tiny and options.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # tiny operations on busy cores wait for threads rather than compute
    for section in SECTIONS:
        if options.section and section.module not in options.section:
            continue
        left = end - time.monotonic()
        if left < 5:
            Results(options.out, section.module).put("left out", reason="no minutes left")
        else:
            _run(section, min(section.limit_s * (3 if options.device == "cpu" else 1), left), options, environment)
        _write_tables(options, setting)
    print(f"figures: {options.out}/results.jsonl; tables: {options.out}/tables.md")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small inputs: a rehearsal, whose figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for figures, log and tables")
    parser.add_argument("--minutes", type=float, default=9.0, help="end of all sections together")
    parser.add_argument("--section", action="append", help="only these; all by default")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that the machine lacks")
    parser.add_argument("--write", type=Path, help="also write the tables between the marks of this document")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(section: Section, limit_s: float, options: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run a section in a process of its own, its output also in the log."""
    missing = [name for name in section.needs if not _found(name, environment)]
    if missing:
        Results(options.out, section.module).put("left out", reason=f"needs {', '.join(missing)}")
        return
    command = [sys.executable, "-m", "tests.gpu", "--only", section.module, "--device", options.device]
    command += ["--out", str(options.out.resolve()), *(["--tiny"] if options.tiny else [])]
    start = time.monotonic()
    print(f"=== {section.module}, at most {limit_s:.0f} s", flush=True)
    with (options.out / "log.txt").open("a") as log:
        log.write(f"=== {section.module}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: object = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = f"stopped after {limit_s:.0f} s"
    took = time.monotonic() - start
    if status != 0:
        Results(options.out, section.module).put("section failed", status=status, seconds=took)
    print(f"    {took:.0f} s, status {status}", flush=True)


def _found(name: str, environment: dict[str, str]) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def _installed(wheels: Path) -> str:
    """Install the wheels into a folder of their own and return it."""
    target = tempfile.mkdtemp(prefix="detr-gpu-")
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target]
    subprocess.run([*command, *files], check=True)
    return target


def _write_tables(options: argparse.Namespace, setting: Setting) -> None:
    command = f"python -m tests.gpu {' '.join(sys.argv[1:])}".strip()
    text = results.tables(results.read(options.out), setting.name, command)
    (options.out / "tables.md").write_text(text)
    if options.write:
        results.write_into(options.write, text)


if __name__ == "__main__":
    main()

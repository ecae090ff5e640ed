"""The writing command, stopped in several ways: it ends at once, and a restart gives the same data set."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco

IMAGES, SAMPLES = 500, 1  # enough shards that no way of stopping comes too late


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with generated images in `train` and the data set of them in `expected`."""
    root = tmp_path_factory.mktemp("killed")
    split = write_synthetic(root, train=IMAGES, val=1, size=64).train
    write_coco(split.images, split.annotations, root / "expected", WriteConfig(samples_per_shard=SAMPLES))
    return root


def command(made: Path, out: Path) -> list[str]:
    source = ["--images", str(made / "train"), "--annotations", str(made / "annotations" / "instances_train.json")]
    options = ["--out", str(out), "--samples-per-shard", str(SAMPLES), "--workers", "2"]
    return [sys.executable, "-m", "jobs.cli", "shard", "coco", *source, *options]


@contextmanager
def writing(made: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield the command in a process group of its own, when a few of its shards are finished."""
    process = subprocess.Popen(
        command(made, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell they ignore Ctrl-C, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    below: list[psutil.Process] = []
    try:
        until = time.monotonic() + 180
        while len(notes(out)) < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.002)
        below = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        process.kill()
        for child in below:  # they should have ended with it; otherwise they hold its pipes open
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate(timeout=120)


def notes(out: Path) -> list[Path]:
    return sorted(out.with_name(out.name + ".partial").glob(".partial/shard-*.json"))


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_the_command(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.kill()
    return -signal.SIGKILL, ""


def kill_a_worker(process: subprocess.Popen[str]) -> tuple[int, str]:
    workers(process)[0].kill()
    return 1, "detr: a worker process was killed"


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    return 130, "detr: interrupted"


@pytest.mark.parametrize("stop", [kill_the_command, kill_a_worker, interrupt], ids=lambda stop: stop.__name__)
def test_restarted_writer_gives_the_same_data_set(stop, made, tmp_path):
    out = tmp_path / "out"
    with writing(made, out) as process:
        below = psutil.Process(process.pid).children(recursive=True)
        status, message = stop(process)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == status
        assert errors.startswith(message)
        assert len(errors.splitlines()) == bool(message)
        left = psutil.wait_procs(below, timeout=60)[1]
    assert left == []
    assert not out.exists()
    kept = {path.name.removesuffix(".json"): path for path in notes(out)}
    assert 4 <= len(kept) < IMAGES // SAMPLES
    before = {name: (out.with_name("out.partial") / name).stat().st_mtime_ns for name in kept}

    done = subprocess.run(command(made, out), capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(out) == content(made / "expected")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == before
    assert load_manifest(out).images == IMAGES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

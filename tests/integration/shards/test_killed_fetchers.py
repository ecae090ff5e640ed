"""Cache of a node that several processes share, some of which are killed at any moment."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

LIMIT, FILES = 1_000_000, 8

# Two threads read random files through the cache, in small pieces, and check what they read.
READER = """
import hashlib, os, random, sys, threading, time
from pathlib import Path
from shards.store import download
from shards.store.cache import Cache
from shards.store.download import Item

download.PIECE = 40_000
items = [Item(str(path), path.stat().st_size, path.name) for path in sorted(Path("store").iterdir())]
cache = Cache(Path("kept"), int(sys.argv[1]))
print("ready", flush=True)

def read():
    until = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < until:
        item = random.choice(items)
        with os.fdopen(cache.open(item), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != item.sha256:
                os._exit(3)
        counts.append(1)

counts = []
threads = [threading.Thread(target=read) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(counts))
"""


def test_killed_processes_stop_no_other_and_the_limit_is_kept(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for number in range(FILES):
        content = os.urandom(300_000 + number)
        (tmp_path / "store" / hashlib.sha256(content).hexdigest()).write_bytes(content)

    def start(seconds: float) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", READER, str(LIMIT), str(seconds)]
        return subprocess.Popen(
            words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, stdout=subprocess.PIPE, text=True
        )

    staying = [start(3.0) for _ in range(2)]
    for process in staying:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for _ in range(3):
        victim = start(60)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.05, 0.3))
        psutil.Process(victim.pid).kill()
        victim.communicate()
    for process in staying:
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0
        assert int(output) > 0
    kept = [path for path in (tmp_path / "kept").iterdir() if path.suffix != ".lock"]
    assert 0 < sum(path.stat().st_size for path in kept) <= LIMIT

"""A small file system of a test's own, real and mounted, so that a disk is really full or really read-only."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_UNSHARE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]


def mounted(mebibytes: dict[Path, int]) -> list[str]:
    """Return the words to put before a command that sees disks of the given MiB at these folders, alone.

    Skips the test where this machine lets nobody mount.
    """
    for folder in mebibytes:
        folder.mkdir(parents=True, exist_ok=True)
    mounts = [f'mount -t tmpfs -o size={size}m tmpfs "{folder}"' for folder, size in mebibytes.items()]
    script = " && ".join([*mounts, 'exec "$@"'])
    words = [*_UNSHARE, script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mounts in a namespace of the test's own (unshare --map-root-user --mount)")
    return words


def remount(folder: Path, options: str) -> None:
    """From inside the command: `ro` lets nothing be written any more, `size=50m` makes room."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def run_on(words: list[str], function: str, *arguments: str) -> str:
    """Call `MODULE:NAME` with the arguments in a process that sees the disk; return its output."""
    module, _, name = function.partition(":")
    code = f"import sys; from {module} import {name}; {name}(*sys.argv[1:])"
    done = subprocess.run(
        [*words, sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

"""The code that a job runs: the files that git tracks in this project's checkout, and their commit."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jobs.errors import JobError

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MIB = 100


@dataclass(frozen=True)
class Code:
    """Code on this machine: `commit` ends in `-dirty` if tracked files differ from it."""

    root: Path
    commit: str
    files: tuple[str, ...]
    """Tracked files, relative to `root`. Empty if this project was installed as a package."""
    untracked: tuple[str, ...] = ()
    """Python files that git neither tracks nor ignores: a snapshot leaves them out."""

    @classmethod
    def installed(cls) -> Code:
        """Return the code of a cluster that has this project installed: nothing travels."""
        return cls(ROOT, "", ())

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.root / name).stat().st_size for name in self.files)

    @cached_property
    def digest(self) -> str:
        """Digest of names and contents."""
        digest = hashlib.sha256()
        for name in self.files:
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.sha256((self.root / name).read_bytes()).digest())
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Raise `JobError` if there are no files to send, or too many bytes."""
        if not self.files:
            raise JobError(
                f'code is "snapshot" but {self.root} is no git checkout of this project; expected one: submit from a '
                'checkout, or install this release on the cluster and set code = "installed"'
            )
        if self.size > LIMIT_MIB * 2**20:
            largest = max(self.files, key=lambda name: (self.root / name).stat().st_size)
            raise JobError(
                f"the tracked files of {self.root} have {self.size / 2**20:.0f} MiB, most in {largest}; expected at most "
                f"{LIMIT_MIB}: take large files out of git"
            )

    def copy_to(self, folder: Path) -> None:
        """Copy the files into an empty folder."""
        self.check()
        for name in self.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / name, target)


def code_here(root: Path = ROOT) -> Code:
    """Return the code of this checkout, without files if there is no checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout

    try:
        tracked = [name for name in git("ls-files", "-z").split("\0") if name]
        present = tuple(name for name in tracked if (root / name).is_file())
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        others = git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py").split("\0")
        commit = git("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return Code(root, "unknown", ())
    if "jobs/code.py" not in present:
        return Code(root, "unknown", ())  # installed into a folder of another checkout
    return Code(root, commit, present, tuple(name for name in others if name))

"""Versions of the code and libraries that a run is made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

_LIBRARIES = ("torch", "torchvision", "numpy", "ray", "webdataset", "mlflow", "detr-cluster")


def code_commit() -> str:
    """Return the Git commit of this code, with `-dirty` if files differ from it, or `unknown` outside a checkout.

    The snapshot of a submitted job is no checkout; `DETR_COMMIT` has its commit.
    """
    if sent := os.environ.get("DETR_COMMIT"):
        return sent
    try:
        dirty = _git("status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def repository() -> str:
    """Return the web address of this code's repository without a login; empty if its remote has none."""
    try:
        remotes = _git("remote").split()
        return (
            web_address(_git("remote", "get-url", "origin" if "origin" in remotes else remotes[0])) if remotes else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def web_address(remote: str) -> str:
    """Return the web address of the repository that a remote of Git names; empty for a path and what else has none."""
    found = re.fullmatch(r"(\w+://)?(?:[^/]*@)?([\w-]+(?:\.[\w-]+)+)(:\d+)?[:/]([^:?#]+?)(?:\.git)?/?", remote)
    if found is None or found[1] not in (None, "https://", "http://", "ssh://", "git://"):
        return ""
    port = (found[3] or "") if (found[1] or "").startswith("http") else ""  # that of SSH is none of a web server
    return f"https://{found[2]}{port}/{found[4]}"


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries; Ray and MLflow are optional for the loop."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def versions_line() -> str:
    """Return the versions of Python, of CUDA if torch has it, and of the libraries."""
    import torch

    libraries = library_versions()
    if torch.version.cuda:
        libraries["torch"] += f" (CUDA {torch.version.cuda})"
    return ", ".join(
        f"{name} {version}" for name, version in {"Python": platform.python_version(), **libraries}.items()
    )

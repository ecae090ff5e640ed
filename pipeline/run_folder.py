"""The location of a run, `STORAGE/NAME` or `STORAGE/NAME-ID`, a folder or an address in a store: the names in it.

    name                   written by                                          read by

    initial.safetensors    driver, before workers start                        workers, if there is no checkpoint
    checkpoints/           all ranks; background evaluation adds metrics       workers, evaluation, registration
    saved                  rank 0, after each checkpoint: its step             workers; `detr resume`
    unsent-training.zip    rank 0: what MLflow has not taken yet               next attempt; at the end the driver
    unsent-evaluation.zip  background evaluation: the same                     next evaluation; at the end the driver
    unsent-files/          both: pictures and artifacts of what is unsent      those of the two objects
    run.json               driver: configuration, state and result             the same command; `detr resume`
    lease/                 drivers: a file each, its holder's changes          another driver, which is refused
    events/                rank 0: one file per step that the guard handled    guard, which counts them; users

With `checkpoint.store` the checkpoints are there instead. The scratch folder of a node holds what its processes share and
Ray Train's files. What the processes of a run tell each other while it runs is in Ray (`pipeline/cluster/notes/notes.py`).
ARCHITECTURE.md has the same table.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import RunConfigError

INITIAL_NAME = "initial.safetensors"
CHECKPOINTS = "checkpoints"
SAVED = "saved"
UNSENT_TRAINING = "unsent-training.zip"
UNSENT_EVALUATION = "unsent-evaluation.zip"
UNSENT_FILES = "unsent-files"
EVENTS = "events"
RECORD = "run.json"
LEASE = "lease"
META = "meta.json"
"""File that makes a checkpoint complete."""


def scratch(run_id: str) -> Path:
    """Return a folder of this node for what the run's processes here share, with access for this user alone.

    It is below `DETR_SCRATCH`, or else below the folder for temporary files. It does not outlive the node, and no other
    node sees it. Raise `RunConfigError` if it cannot be made or belongs to another user.
    """
    folder, problem = _make_scratch(run_id)
    if problem:
        raise RunConfigError(f"{folder} on {platform.node()} {_with_remedy(problem)}")
    return folder


def scratch_problem(trial: str) -> str:
    """Return the reason why this node has no scratch folder that can be written, or "".

    `trial` names a folder there that is made and removed for this.
    """
    folder, problem = _make_scratch(trial)
    if not problem:
        try:
            (folder / "trial").write_bytes(b"1")
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
        shutil.rmtree(folder, ignore_errors=True)
    return problem and f"scratch folder {folder.parent} {_with_remedy(problem)}"


def _make_scratch(run_id: str) -> tuple[Path, str]:
    """Return the scratch folder of a run, and the reason why it cannot be used or ""."""
    given = os.environ.get("DETR_SCRATCH")
    own = Path(given) if given else Path(tempfile.gettempdir()) / f"detr-{os.getuid()}"
    folder = own / run_id
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        # Others may make folders where temporary files are; a link of theirs would lead to a folder of ours.
        owners = {path.lstat().st_uid for path in ([folder] if given else [own, folder])}
    except OSError as error:
        return folder, f"cannot be made ({error.strerror})"
    if owners != {os.getuid()} or (own.is_symlink() and not given):
        return folder, "belongs to another user"
    return folder, ""


def _with_remedy(problem: str) -> str:
    return f"{problem}; expected a folder on this node's disk for this user alone: set DETR_SCRATCH to another"

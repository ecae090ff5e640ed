"""The table of a run's folder, in the module and in ARCHITECTURE.md, against a run and against each other."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import run_folder
from pipeline.config import GuardConfig, RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver.lease import Claims, Lease
from pipeline.driver.record import new_record, write_record
from pipeline.errors import TrainingError
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.unsent import UnsentObject
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.runs import run_folder_table
from tests.support.tracking_server import Server

ROOT = Path(run_folder.__file__).parents[1]


def test_architecture_has_the_same_table() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().replace("`", "")
    table = re.findall(
        r"^\| (.+) \| (.+) \| (.+) \|$", text[text.index("The location of a run, a folder") :], re.MULTILINE
    )
    rows = [[cell.replace("`", "") for cell in row] for row in run_folder_table()]
    assert [list(row) for row in table[1 : len(rows) + 1]] == rows


def test_every_name_of_the_module_is_in_the_table() -> None:
    names = {value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)}
    assert names - {run_folder.META} == {name.rstrip("/") for name, _, _ in run_folder_table()}


def test_the_table_names_every_file_of_a_run(config: RunConfig, run_info: RunInfo, tmp_path: Path) -> None:
    folder = run_info.folder
    guarded = replace(config, guard=GuardConfig(policy="skip", max_grad_norm=1e-9, max_events=1))
    Lease(Claims(folder), "run").acquire()
    write_record(folder, new_record("run", config, config, ("", "")))
    unsent = UnsentObject(str(folder / run_folder.UNSENT_TRAINING))
    tracker = SpoolTracker(tmp_path / "spool", Server(up=False), unsent)
    run(replace(config, optim=replace(config.optim, max_steps=2)), run_info, Ranks(), tracker)
    with pytest.raises(TrainingError, match="max_events"):
        run(guarded, run_info, Ranks(), tracker)
    tracker.close()
    entries = {path.name + "/" * path.is_dir() for path in folder.iterdir()}
    assert entries == {name for name, _, _ in run_folder_table()} - {"unsent-evaluation.zip"}

"""Page of an experiment: its description, and a view of its runs with the columns that tell them apart.

MLflow's list shows source, models and data by default, and no option of the store changes that. It applies a view that
is saved in a tag of the experiment when a link names it (`links.runs_page`), and lists it under "Views". The tags are not
documented; without them MLflow shows its own list.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from pipeline.tracking.pages.links import VIEW, runs_page
from pipeline.tracking.tags import TAG_NOTE, TAG_PHASE

if TYPE_CHECKING:
    from mlflow import MlflowClient

COLUMNS = ("metrics.`val/AP`", "metrics.`val/AP50`", "metrics.`epoch`", "params.`recipe`", f"tags.`{TAG_PHASE}`")
"""Columns of the view, in MLflow's names; with those of data and models the first would be out of sight."""
TAG_VIEW = f"mlflow.sharedViewState.{VIEW}"
_NAME = "AP, epoch and phase"


def complete_experiment(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> None:
    """Add the description and the view to an experiment with these tags; what a person has changed stays."""
    wanted = {TAG_VIEW: _view(), TAG_NOTE: _note(experiment_id)}
    for key, value in wanted.items():
        if key not in tags:
            client.set_experiment_tag(experiment_id, key, value)


def _view() -> str:
    state = {
        "selectedColumns": COLUMNS,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "viewMaximized": True,
    }
    now = int(time.time() * 1000)
    view = {"name": _NAME, "createdAt": now, "updatedAt": now, "state": msgspec.json.encode(state).decode()}
    return msgspec.json.encode(view).decode()


def _note(experiment_id: str) -> str:
    return (
        "Runs of `detr train`. The page of each run says how good and how far it is, from which data and code, and how it "
        f"is continued. [Table of all runs with AP, epoch and phase]({runs_page(experiment_id)}) (also under *Views*)."
    )

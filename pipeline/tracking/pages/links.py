"""Links to MLflow's pages of a run and of an experiment."""

from __future__ import annotations

import re
from urllib.parse import quote

from pipeline.tracking.server.address import tracking_uri, without_secret

UI_PORT = 5000
"""Port on which `detr ui` serves a store that is not a server."""
VIEW = "detr"
"""Key of the view of an experiment's runs that `pages.experiment` saves."""
# Without this the UI opens its pages for language models.
_COMMITS = {"gitlab": "-/commit", "bitbucket": "commits"}  # elsewhere as on GitHub
_TRAINING = "workflowType=machine_learning"


def runs_page(experiment_id: str) -> str:
    """Return the list of an experiment's runs, with this project's columns, relative to the address of the UI."""
    return f"#/experiments/{experiment_id}/runs?{_TRAINING}&viewStateShareKey={VIEW}"


def experiments_page() -> str:
    """Return the list of experiments, relative to the address of the UI."""
    return f"#/experiments?{_TRAINING}"


def run_page(experiment_id: str, run_id: str, tab: str = "") -> str:
    """Return the page of a run, relative to the address of the UI; a tab is `model-metrics` or `artifacts/FILE`."""
    return f"#/experiments/{experiment_id}/runs/{run_id}{'/' if tab else ''}{tab}?{_TRAINING}"


def artifact(run_id: str, path: str) -> str:
    """Return an artifact of a run, relative to the address of the UI."""
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run_id}"


def version_page(name: str, version: str) -> str:
    """Return the page of a registered version, relative to the address of the UI."""
    return f"#/models/{quote(name, safe='')}/versions/{version}"


def commit_text(commit: str, repository: str) -> str:
    """Return a commit as Markdown, with a link to it if the address of its repository is known."""
    number, _, dirty = commit.partition("-")
    text = f"`{number[:12]}`"
    if repository and re.fullmatch(r"[0-9a-f]{7,64}", number):
        host = repository.partition("://")[2].partition("/")[0]
        text = f"[{text}]({repository}/{_COMMITS.get(host.split('.')[0], 'commit')}/{number})"
    return text + (" with uncommitted changes" if dirty else "")


def ui_address() -> str:
    """Return the address of the UI without secrets: the server's, or that of `detr ui` for any other store."""
    uri = tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return f"http://127.0.0.1:{UI_PORT}/"
    return without_secret(uri).replace("***@", "").partition("?")[0].rstrip("/") + "/"


def is_served() -> bool:
    """Return whether the store is a server, which has a UI; for any other store `detr ui` starts one."""
    return tracking_uri().startswith(("http://", "https://"))


def run_link(experiment_id: str, run_id: str) -> str:
    """Return the link to the page of a run for a person, with the command that must run first if there is one."""
    if not experiment_id:  # of a run of an older release
        return ui_address() + experiments_page() if is_served() else "`detr ui`"
    link = ui_address() + run_page(experiment_id, run_id)
    return link if is_served() else f"{link} (while `detr ui` runs)"

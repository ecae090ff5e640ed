"""Pages of a version in MLflow: descriptions of the version, of its logged model and of its registered model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipeline.registry.description import describe_model, describe_version
from pipeline.registry.facts import VersionFacts, facts_about
from pipeline.tracking.pages.pictures import CURVES, DETECTIONS
from pipeline.tracking.tags import TAG_NOTE
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOG = logging.getLogger(__name__)
_IMAGES = "images"  # folder of `MlflowClient.log_image`
_TITLES = {DETECTIONS: "detections beside the truth", CURVES: "precision over recall"}


def write_pages(client: MlflowClient, name: str, version: str) -> None:
    """Write the descriptions of a version, its logged model and its registered model; log a failure and go on.

    The version is complete without them. A description that a person gave the registered model stays.
    """
    uri = f"models:/{name}/{version}"
    try:
        facts = facts_about(client, uri)
        text = describe_version(facts, _pictures(client, facts))
        client.update_model_version(name, version, text)
        if facts.model_id:
            client.set_logged_model_tags(facts.model_id, {TAG_NOTE: text})
        if not client.get_registered_model(name).description:
            client.update_registered_model(name, describe_model(facts))
    except Exception as error:  # the client and the store behind it may raise anything
        LOG.warning("%s has no description in MLflow (%s)", uri, one_line(error))


def _pictures(client: MlflowClient, facts: VersionFacts) -> dict[str, str]:
    """Return the pictures of the version's step among the artifacts of its run, by their titles."""
    names = [entry.path for entry in client.list_artifacts(facts.run_id, _IMAGES)]
    found = {}
    for key, title in _TITLES.items():
        start = f"{_IMAGES}/{key.replace('/', '~')}+step+{facts.tags.get('step', '')}+"
        path = next((name for name in sorted(names) if name.startswith(start) and name.endswith(".png")), None)
        if path is not None:
            found[title] = path
    return found

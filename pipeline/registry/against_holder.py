"""Change of a version against the one that has an alias in the figure that decides, and whether it is more than chance."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.kept import Kept, decided_by, difference_of
from pipeline.registry.kept_detections import fetch, short_digest, stored
from shards.dataset.manifest import load_manifest
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOG = logging.getLogger(__name__)


def holder(client: MlflowClient, name: str, alias: str) -> Any:
    """Return the version that has the alias; None if no version has it, or if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        number = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if number is None else client.get_model_version(name, number)


def holder_if_known(client: MlflowClient, name: str, alias: str) -> Any:
    """Return the same as `holder`; None also if the registry does not answer, for what is a remark only."""
    try:
        return holder(client, name, alias)
    except Exception as error:  # the client and the store behind it may raise anything
        LOG.warning("the version of %s that has @%s is not known (%s)", name, alias, one_line(error))
        return None


def note_change(client: MlflowClient, before: Any, name: str, number: str, alias: str) -> str:
    """Record as a tag of a version how its AP or PQ differs from that of the one that had the alias, and return the text.

    Return an empty text without such a version, or if the detections of both on the same validation data are not kept. It
    is a remark: if it cannot be made, that is only logged.
    """
    try:
        version = client.get_model_version(name, number)
        if before is None or str(before.version) == str(version.version):
            return ""
        kept = [_kept(client, which, version.tags.get("val_digest", "")) for which in (before, version)]
        if None in kept:
            return ""
        first, second = (found for found in kept if found is not None)
        manifest = load_manifest(second.data)
        found = difference_of(manifest, [first], [second], sizes=False)
        change = found.deciding
        names = [f"version {which.version}" for which in (before, version)]
        decided = decided_by(change.name, manifest, names, [first, second])
        reason = "" if decided == change.name else f" (decided by {decided})"
        text = (
            f"{change.name} {change.difference:+.4f} against version {before.version}, 95% interval {change.low:+.4f} to "
            f"{change.high:+.4f} on {found.images:,} images: {'within' if change.is_chance else 'more than'} chance{reason}"
        )
        client.set_model_version_tag(name, number, f"change.{alias}", text)
        return text
    except Exception as error:  # as above
        LOG.warning("version %s of %s is not compared with @%s (%s)", number, name, alias, one_line(error))
        return ""


def _kept(client: MlflowClient, version: Any, digest: str) -> Kept | None:
    """Return the detections of a version on the data set of this digest, or None."""
    files = stored(client, version.run_id, int(version.tags.get("step", 0)))
    name = files.get(short_digest(digest))
    return None if name is None else fetch(client, version.run_id, name)

"""Promotion: an alias moves to a version only if that loses no AP (PQ), and the version's tags say why it moved."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.comparison.compare import Comparison, compare_models
from pipeline.comparison.models import model_of_version
from pipeline.errors import PipelineError, RegistryError
from pipeline.registry.against_holder import holder
from pipeline.registry.publish import check_names
from pipeline.registry.versions import find_version
from pipeline.tracking.mlflow_client import connect, translated_errors
from pipeline.tracking.mlflow_runs import user_name
from shards.errors import ShardError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEAST_IMAGES = 100
"""Number of images from which the interval is wide enough: on 25 images it misses the truth twice as often as it says."""


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion."""

    uri: str
    """Version that has the alias now."""
    alias: str
    against: str
    """Version that had it before; empty if none had."""
    comparison: Comparison | None
    """None without a version before, or if a forced promotion could not compare."""

    @property
    def moved(self) -> bool:
        """False if the version had the alias already."""
        return self.uri != self.against


def promote(uri: str, alias: str, data: str | None = None, *, force: bool = False, progress: bool = False) -> Promotion:
    """Move `alias` to a version if the 95% interval of its change excludes a loss against the version that has it.

    The change is that of PQ if segments of both are kept, else of AP of boxes.

    The tags `promoted.ALIAS.*` of the version say against what, on what data, with what interval, when and by whom. The
    first version of an alias has nothing to lose against. Raise `RegistryError` if a loss is not excluded and not `force`.
    """
    client = connect()
    with translated_errors():
        version = find_version(client, uri)
        check_names(version.name, alias)
        candidate = model_of_version(version)
        holding = holder(client, version.name, alias)
        if holding is None:
            _record(client, version, alias, {"against": "nothing: no version had the alias"})
            return Promotion(candidate.name, alias, "", None)
        against = model_of_version(holding)
        if against == candidate:
            return Promotion(candidate.name, alias, candidate.name, None)
        facts = {"against": against.name}
        comparison = None
        try:
            comparison = compare_models(client, [against], [candidate], data, progress=progress)
            facts |= _facts(comparison)
            refuse_loss(comparison)
        except (PipelineError, ShardError) as error:
            if not force:
                raise
            facts["forced"] = one_line(error)
        _record(client, version, alias, facts)
        return Promotion(candidate.name, alias, against.name, comparison)


def refuse_loss(comparison: Comparison) -> None:
    """Raise `RegistryError` unless the interval of the change excludes a loss, on enough images."""
    change, images = comparison.difference.deciding, comparison.difference.images
    before, after = comparison.before[0], comparison.after[0]
    if images < LEAST_IMAGES:
        raise RegistryError(
            f"{images} images are too few to say whether {after} loses against {before}; expected {LEAST_IMAGES} at least: "
            "give --data with more, or --force"
        )
    if change.before < 0:
        raise RegistryError(
            f"{comparison.data} has no objects that could be found, so it cannot say whether {after} loses against {before}; "
            "expected annotated images: give --data with some, or --force"
        )
    if change.low < 0:
        reason = "" if comparison.decided_by == change.name else f", decided by {comparison.decided_by}"
        raise RegistryError(
            f"{after} may lose against {before}: {change.name} {change.difference:+.4f}, 95% interval {change.low:+.4f} to "
            f"{change.high:+.4f} on {images:,} images of {comparison.data}{reason}; expected an interval that excludes a "
            "loss: train further, give --data with more images, or --force"
        )


def _facts(comparison: Comparison) -> dict[str, str]:
    change = comparison.difference.deciding
    reason = {} if comparison.decided_by == change.name else {"decided_by": comparison.decided_by}
    return reason | {
        change.name: f"{change.before:.6f} to {change.after:.6f}, change {change.difference:+.6f}",
        "interval": f"{change.low:+.6f} to {change.high:+.6f} (95%, {comparison.difference.draws} draws)",
        "data": f"{comparison.data}, {comparison.difference.images} images, digest {comparison.digest}",
    }


def _record(client: MlflowClient, version: Any, alias: str, facts: dict[str, str]) -> None:
    """Write the facts as tags of the version and move the alias last, so that it never moves without a reason."""
    facts |= {
        "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "by": user_name(),
    }
    prefix = f"promoted.{alias}."
    for key in version.tags:
        if key.startswith(prefix) and key.removeprefix(prefix) not in facts:
            client.delete_model_version_tag(version.name, version.version, key)  # of an earlier promotion
    for key, value in facts.items():
        client.set_model_version_tag(version.name, version.version, prefix + key, value)
    client.set_registered_model_alias(version.name, alias, version.version)

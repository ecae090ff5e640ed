"""Spools of a run: of rank 0, and of the evaluation in the background.

They are in the scratch folder of the node that writes them (`run_folder.scratch`). What a worker could not send is also
beside the run (`unsent`), from which the driver sends it at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from pipeline.errors import RunConfigError
from pipeline.run_folder import UNSENT_EVALUATION, UNSENT_TRAINING, scratch
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_sender import EventSender
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.spool_folder import Send, SpoolFolder
from pipeline.tracking.tags import TAG_PHASE
from pipeline.tracking.unsent import Keeper, UnsentObject, open_spool
from shards.errors import ShardError, one_line
from shards.store.retry import fewer_retries

if TYPE_CHECKING:
    from pipeline.checkpoint.location import Location


@dataclass(frozen=True)
class RunSpool:
    """Names of a spool in the scratch folder and of its object beside the run."""

    name: str
    unsent: str
    any_order: bool = False
    """Steps come in any order: a checkpoint whose evaluation fails is evaluated after later ones."""


TRAINING = RunSpool("spool", UNSENT_TRAINING)
EVALUATION = RunSpool("spool-evaluation", UNSENT_EVALUATION, any_order=True)


def open_tracker(kind: RunSpool, folder: Location, run_id: str, uri: str) -> SpoolTracker:
    """Return the tracker of a run on this node, which continues what this node or another has left.

    `folder` is the run's, `uri` the address of MLflow. Raise what the store raises.
    """
    target = _object(kind, folder)
    spool = scratch(run_id) / kind.name
    send = EventSender(uri, run_id, spool, kind.any_order)
    return SpoolTracker(spool, send, target, any_order=kind.any_order)


def anything_left(folder: Location, run_id: str) -> bool:
    """Return whether MLflow has not taken everything that is kept beside the run or on this node."""
    for kind in (TRAINING, EVALUATION):
        old = _old_spool(kind, folder)
        if (old and not old.empty) or not SpoolFolder(scratch(run_id) / kind.name).empty:
            return True
        if UnsentObject(str(folder / kind.unsent)).exists():
            return True
    return False


class Sent(NamedTuple):
    """Result of sending what was left."""

    complete: bool
    """True if nothing is left."""
    events: int
    """Number of events that MLflow has taken."""


def send_left(folder: Location, run_id: str, uri: str, say: Callable[[str], None]) -> bool:
    """Send to MLflow what the run's workers could not, after they have ended; return whether nothing is left.

    What MLflow does not accept in time is kept beside the run, and `say` gets a warning.
    """
    return count_left(folder, run_id, uri, say).complete


def count_left(folder: Location, run_id: str, uri: str, say: Callable[[str], None]) -> Sent:
    """Do what `send_left` does, and return the number of events as well."""
    with fewer_retries():  # like the time for MLflow: a driver that was asked to stop is killed soon
        sent = [_send_left(kind, folder, run_id, uri, say) for kind in (TRAINING, EVALUATION)]
    return Sent(all(each.complete for each in sent), sum(each.events for each in sent))


def _send_left(kind: RunSpool, folder: Location, run_id: str, uri: str, say: Callable[[str], None]) -> Sent:
    events, spool = 0, SpoolFolder(scratch(run_id) / kind.name)
    try:
        target = _object(kind, folder)
        if not spool.events.exists() and not target.exists():
            return Sent(True, 0)
        keep = open_spool(spool, target)
        begin = spool.sent
        complete = spool.drain(_without_phase(EventSender(uri, run_id, spool.path, kind.any_order)))
        events = spool.read(begin, spool.sent).count(b"\n")
        keep(spool.size)
    except (OSError, ShardError, RunConfigError) as error:
        say(
            f"warning: what MLflow has not taken stays where it is until `detr sync {run_id}` sends it ({one_line(error)})"
        )
        return Sent(False, events)
    if complete:
        spool.remove()
    else:
        say(
            f"warning: MLflow does not take the last points now ({spool.refusal}); they are kept in {target.url}, and the "
            f"next command of the run or `detr sync {run_id}` sends them"
        )
    return Sent(complete, events)


def _without_phase(send: Send) -> Send:
    """Return a function that sends all but the phase: the workers have ended, and the driver says what follows."""

    def send_without(events: Sequence[Event]) -> None:
        send(
            [
                replace(event, tags={key: value for key, value in event.tags.items() if key != TAG_PHASE})
                if event.kind == "tags"
                else event
                for event in events
            ]
        )

    return send_without


def _object(kind: RunSpool, folder: Location) -> UnsentObject:
    """Return the object of a spool beside the run; first make it of a spool that an older release left there."""
    target, old = UnsentObject(str(folder / kind.unsent)), _old_spool(kind, folder)
    if old and old.events.exists():
        old.create()
        Keeper(old, target, kept=False)(old.size)
        old.remove()
    return target


def _old_spool(kind: RunSpool, folder: Location) -> SpoolFolder | None:
    """Return the spool that older releases have in the run's folder, which was on a shared disk."""
    return SpoolFolder(folder / kind.name) if isinstance(folder, Path) else None

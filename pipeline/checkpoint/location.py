"""Location of a run's checkpoints: a folder, or a URL.

A store behind a URL cannot rename, so uploading `meta.json` last completes a checkpoint. It names the folder of the
state:

    STORE/NAME/checkpoints/step-00001000/meta.json             {"state_folder": "8f1c...", ...}
                                         8f1c.../              *.distcp, .metadata
                                         evaluation.json

Every attempt uploads into a new folder. A checkpoint can therefore be written again without a moment in which there is
none, files of two attempts are never mixed, and nothing refers to the files of a killed attempt, which pruning removes.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RunConfigError
from pipeline.run_folder import META as META
from shards.errors import ShardError, one_line
from shards.store import storage
from shards.store.retry import StoreError, fewer_retries

PARTIAL = ".partial"


@dataclass(frozen=True, order=True)
class Url:
    """Address in a store; joined with `/` like a `Path`."""

    url: str

    def __truediv__(self, name: str) -> Url:
        return Url(storage.join(self.url, name))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last component of the address."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """Address without its last component, like that of a `Path`."""
        return Url(self.url.rpartition("/")[0])


Location = Path | Url


def location(url: str) -> Location:
    """Return the folder or the address in a store that `url` names.

    Raise `RunConfigError` for an address that nothing here can open, which must not become a folder called `s3:`.
    """
    storage.refuse_unknown(url)
    path = storage.local_path(url)
    return path if path is not None else Url(storage.absolute(url))


def checkpoint_root(store: str, folder: Location) -> Location:
    """Return the parent of a run's `checkpoints`: the run's folder, or its name below `store` (`CheckpointConfig`)."""
    return location(store) / folder.name if store else folder


def check(store: str, option: str = "checkpoint.store") -> None:
    """Write and remove a small file below the store's URL; raise `RunConfigError` if that fails.

    It is tried a few times only: a person waits for the answer.
    """
    if store.startswith("memory://"):
        raise RunConfigError(
            f"{option} {store} is the memory of each process, and what is saved there is lost with it; expected a "
            f"folder or URL that this machine and every worker may write: give another --{option}"
        )
    name = f".detr-{secrets.token_hex(8)}"
    probe = storage.join(store, name)
    try:
        with fewer_retries():
            storage.write(probe, b"may checkpoints be written here?")
            storage.remove(probe)
    except (StoreError, ShardError) as error:
        # The message starts with the address and has a remedy, but must name the store instead of this file.
        raise RunConfigError(f"{option} {str(error).replace('/' + name, '')}") from None
    except OSError as error:
        raise RunConfigError(
            f"{option} {store} cannot be written ({one_line(error)}); expected a folder or URL that this machine "
            f"and every worker may write: give another --{option}"
        ) from None

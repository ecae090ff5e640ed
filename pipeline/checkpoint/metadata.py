"""Description of a checkpoint: `meta.json`, beside the weights and the optimizer's state.

Everything else that a run needs to continue is a function of it: the plan and augmentation of (seed, position), the
learning rate of the step, and dropout of (seed, step, rank) by the rule named in `randomness`. The rest tells where the
checkpoint came from, without the run's folder or its tracking server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pipeline.checkpoint.location import META, Location
from pipeline.errors import CheckpointError
from pipeline.figures import deciding_name
from shards.store import storage
from shards.store.retry import may_pass

FORMAT = 3
_MOVED = {
    "seed": "seed",
    "batch_size": "optim.batch_size",
    "sort_window": "data.sort_window",
    "shuffle_shards": "data.shuffle_shards",
    "epoch_tail": "data.epoch_tail",
}
"""Fields of formats 1 and 2 that are options in `config` since format 3."""
_FIRST_DEFAULTS: dict[str, Any] = {"sort_window": 1, "shuffle_shards": 0, "epoch_tail": "straddle"}
"""Values of a format 1 from before these options existed."""


class Best(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Highest deciding figure of a run at the time of a checkpoint (PQ, AP of masks or AP), and its step."""

    step: int
    ap: float


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of `meta.json`: the position and configuration of the run, and where the checkpoint came from."""

    step: int
    epoch: float
    samples: int
    """Position in the stream of samples."""
    run_id: str
    """MLflow's id of the run."""
    config: dict[str, Any]
    """The whole `RunConfig`, untyped: a later version with other options can read it. See `option`."""
    train_digest: str
    num_classes: int
    code_commit: str
    world_size: int
    versions: dict[str, str]
    """Versions of the installed libraries."""
    format: int = FORMAT
    # The defaults below are the values of checkpoints from before there were these fields.
    origin_step: int = 0
    """Step and sample at which the plan of steps starts: not 0 after an accepted change of the stream."""
    origin_samples: int = 0
    plan_version: int = 1
    val_digest: str = ""
    total_steps: int = 0
    """Last step of the schedule."""
    lr_factor: float = 1.0
    """Factor on the learning rates at the next step."""
    randomness: str = ""
    """Rule for the random numbers of a step."""
    best: Best | None = None
    milestone: bool = False
    """Never deleted; see `CheckpointConfig`."""
    evaluate: bool = False
    """To be evaluated in the background, and kept until then."""
    state_folder: str = ""
    """Folder beside this file that holds the state, in a store by URL; empty: the state lies beside this file."""

    def option(self, path: str) -> Any:
        """Return an option of the run's configuration by its path, such as `optim.batch_size`."""
        value: Any = self.config
        for name in path.split("."):
            value = value[name]
        return value

    @property
    def ema(self) -> bool:
        """True if the checkpoint has averages of the weights."""
        return bool(self.config["optim"].get("ema", 0) > 0)


def parse_meta(text: bytes) -> Meta:
    """Return the content of a `meta.json` of any format; raise `msgspec.DecodeError` if it is damaged."""
    fields = msgspec.json.decode(text, type=dict[str, Any])
    try:
        if fields.get("format", 1) < 3:
            fields = _to_format_3(fields)
        meta = msgspec.convert(fields, Meta)
        for path in _MOVED.values():
            meta.option(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise msgspec.ValidationError(f"a field is missing or of another type: {error}") from None
    return meta


def _to_format_3(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of format 1 or 2 as those of format 3.

    They repeat options of the run beside `config`, and format 1 has no `config`: there it gets these options alone.
    """
    fields = _FIRST_DEFAULTS | fields
    config = fields.get("config") or {}
    for name, path in _MOVED.items():
        section, _, option = path.rpartition(".")
        options = config.setdefault(section, {}) if section else config
        options[option] = fields.pop(name)
    fields.pop("ema", None)  # `config` has it; a run of format 1 had no averages
    return fields | {"config": config, "format": FORMAT, "state_folder": fields.pop("part", "")}


def read_meta(path: Location) -> Meta:
    """Return the metadata of a checkpoint.

    Raise `CheckpointError` if `meta.json` is missing or damaged, and an error that may pass as it is.
    """
    try:
        return parse_meta(storage.read(str(path / META)))
    except (OSError, msgspec.DecodeError) as error:
        if may_pass(error):
            raise
        raise CheckpointError(f"{path / META} cannot be read ({error}); expected a complete checkpoint") from None


def deciding_figure(metrics: Mapping[str, float]) -> float:
    """Return the figure that the best checkpoint has the most of: PQ or AP (`pipeline.figures`)."""
    return metrics[deciding_name(metrics)]

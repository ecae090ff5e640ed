"""Parsing a command that is to be submitted, without running it: what it names must exist before it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.clusters.entries import Cluster
from jobs.commands import exchange, models, runs, shard, stored, sweep
from jobs.nearest import nearest
from jobs.parsing import UsageError, parse
from jobs.plan import Request
from jobs.refusals import check_words, seen_fitted, with_storage
from jobs.refusals import read_request as read_training

_OPTIONS: dict[str, type[Any]] = {
    "demo": runs.Demo,
    "resume": runs.Resume,
    "evaluate": models.Evaluate,
    "predict": models.Predict,
    "register": models.Register,
    "import": exchange.Import,
    "export": exchange.Export,
}
_SHARD: dict[str, type[Any]] = {
    "coco": shard.ShardCoco,
    "coco-panoptic": shard.ShardCocoPanoptic,
    "voc": shard.ShardVoc,
    "yolo": shard.ShardYolo,
    "index": shard.ShardIndex,
    "verify": stored.Verification,
    "info": stored.Information,
}
_READ = ("images", "annotations", "segments", "corrections", "root", "data", "file", "categories", "folder", "url")
"""Options that name folders, files or URLs to read."""


def read_request(cluster: Cluster, argv: Sequence[str]) -> Request:
    """Return the parsed command; raise `UsageError` for flags that it does not take."""
    check_words(cluster, argv)
    name, words = argv[0], list(argv[1:])
    if name == "train":
        return read_training(cluster, argv)
    if name == "sweep":
        return _sweep(cluster, with_storage(cluster, argv))
    kind = _OPTIONS.get(name)
    prog = f"detr {name}"
    if name == "shard":
        if not words or words[0] not in _SHARD:
            meant = f": did you mean {nearest(words[0], _SHARD)}?" if words else ""
            raise UsageError(
                f"got {words[0] if words else 'nothing'!r} after `detr shard`; expected one of {'|'.join(_SHARD)}{meant}"
            )
        kind, prog, words = _SHARD[words[0]], f"detr shard {words[0]}", words[1:]
    assert kind is not None  # every word of SUBMITTABLE has one
    options = parse(kind, words, prog)
    reads: list[str] = []
    for option in _READ:
        value = getattr(options, option, None)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        reads += [str(each) for each in values]
    model = str(getattr(options, "model", ""))
    return Request(tuple(argv), model=model, known_run=str(getattr(options, "run", "") or ""), reads=tuple(reads))


def _sweep(cluster: Cluster, argv: Sequence[str]) -> Request:
    """Return the parsed sweep; its trials are checked where it runs, and here the first of them."""
    own, words = sweep.divided(argv[1:])
    options = parse(sweep.Sweep, own, "detr sweep")
    recipe, trials = sweep.trials_of(options.name, options.recipe, words)
    first = trials[0]
    config = seen_fitted(cluster, sweep.config_of(recipe, first), (recipe, *first.options), first.name)
    reads = [options.recipe] if options.recipe.endswith(".toml") else []
    model = config.initial if config.initial.startswith("models:/") else ""
    return Request(tuple(argv), config, reads=tuple(reads), model=model)

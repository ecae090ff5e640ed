"""Distribution of the model over the ranks by DDP, FSDP or hybrid sharding, and the norm of its gradient.

A world of one needs no process group, so the same loop runs in a unit test, on a laptop and on a cluster.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from detr.backbone import FrozenBatchNorm
from detr.compute import fsdp_units
from detr.model import DETR
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RunConfigError

LOG = logging.getLogger(__name__)
Strategy = Literal["single", "ddp", "fsdp", "hsdp"]


def distribute(
    model: nn.Module, ranks: Ranks, strategy: Strategy = "ddp", *, uneven: bool = False, graphs: bool = False
) -> nn.Module:
    """Return the model wrapped for training on several ranks; a collective call.

    ddp: every rank holds the whole model, with rank 0's weights. fsdp: parameters, gradients and optimizer state are
    sharded over the ranks, under the same names; build the optimizer afterwards. hsdp: the same over the ranks of each
    node, and gradients are averaged between the nodes; if these have unequal numbers of ranks, raise `RunConfigError` or,
    with `uneven`, shard over all ranks instead. In a world of one the model is returned as it is, and so, with rank 0's
    weights, if `graphs` run its passes: they average gradients themselves.
    """
    if ranks.world_size == 1:
        return model
    if graphs:
        ranks.send_tensors(model.state_dict().values())
        return model
    if strategy in ("fsdp", "hsdp"):
        return _shard(model, _mesh(ranks, strategy, uneven))
    return _replicate(model, ranks)


def _mesh(ranks: Ranks, strategy: Strategy, uneven: bool) -> DeviceMesh:
    """Return the mesh of all ranks or, for hsdp on several nodes, one with a row for each node; a collective call."""
    if strategy == "hsdp":
        # The cluster places the ranks, so they are asked; numbers alone do not say which ones share a node.
        names = ranks.all_gather(ranks.node)
        nodes = [] if uneven and _unequal(names, ranks) else ranks_by_node(names)
        if len(nodes) > 1:
            return DeviceMesh(ranks.device.type, nodes, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(ranks.device.type, (ranks.world_size,))


def _unequal(names: Sequence[str], ranks: Ranks) -> bool:
    """Return True, with a warning, if the nodes of the ranks hold unequal numbers of them."""
    sizes = list(Counter(names).values())
    unequal = len(set(sizes)) > 1
    if unequal and ranks.first:
        LOG.warning(
            "hsdp needs as many workers on each node, and %d nodes have %s: sharding over all workers, as fsdp does",
            len(sizes),
            ", ".join(map(str, sizes)),
        )
    return unequal


def ranks_by_node(nodes: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each node, given each rank's node; raise `RunConfigError` unless all have equally many."""
    of_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        of_node.setdefault(node, []).append(rank)
    sizes = [len(members) for members in of_node.values()]
    if len(set(sizes)) > 1:
        raise RunConfigError(
            f"cluster.strategy: got hsdp with {', '.join(map(str, sizes))} workers on {len(sizes)} nodes, expected as "
            "many on each: choose --cluster.workers so that all nodes are full, or --cluster.strategy fsdp"
        )
    return list(of_node.values())


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply FSDP2: one sharding group for each block of the model, and one for the rest."""
    # The warning is about changing an output in place, which is not done here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for parameter in model.parameters():
        # FSDP shards contiguous memory only; the backbone's activations keep the layout of the input.
        parameter.data = parameter.data.contiguous()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm):
            module.keep_weights = False
    for block in fsdp_units(model) if isinstance(model, DETR) else []:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gathered_model(
    model: nn.Module, build: Callable[[], nn.Module], averages: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a model that this rank can run alone; a collective call.

    With DDP it is the wrapped model. With FSDP, where every forward pass is a collective although ranks evaluate
    different numbers of batches, it is a new one from `build`, with a full copy of the weights (166 MB for a
    ResNet-50). With `averages` (sharded like the model's parameters) it is always a copy, with these in place of the
    parameters.
    """
    bare = unwrap(model)
    if averages is None and not isinstance(bare, FSDPModule):
        return bare
    copy = build()
    weights = get_model_state_dict(bare, options=StateDictOptions(full_state_dict=True))
    for name, value in (averages or {}).items():
        weights[name] = value.full_tensor() if isinstance(value, DTensor) else value
    copy.load_state_dict(weights)
    return copy


@contextmanager
def gradient_sync(model: nn.Module, *, now: bool) -> Iterator[None]:
    """Average gradients over ranks in the backward pass inside the block if `now`; otherwise accumulate locally.

    The last pass of a step averages the accumulated gradients of all its passes.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    accumulate = isinstance(model, DistributedDataParallel) and not now
    with model.no_sync() if accumulate else nullcontext():  # type: ignore[operator]
        yield


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> Tensor:
    """Scale the gradients down to a total norm of at most `norm`; return the norm before, over all ranks' shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # By itself torch takes them one by one if FSDP shards them: two kernels for each of some 160.
    total = nn.utils.clip_grad_norm_(parameters, norm, foreach=True)
    return total.full_tensor() if isinstance(total, DTensor) else total


def _replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Apply DDP without sending buffers at each step.

    The buffers of a frozen batch norm are constants (53,000 floats for a ResNet-50). A trainable one is refused with
    several workers, since each would normalise by its own images.
    """
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # torch 2.15 renamed the flag; 2.11 knows only the old name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DistributedDataParallel(model, device_ids=devices, **options)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a DDP wrapper, whose parameter names have no prefix."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that FSDP divides, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

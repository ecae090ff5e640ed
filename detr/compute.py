"""Compute options: precision, order of sums, memory layout, activation checkpointing and compilation.

They change neither the model nor the names of its parameters. With fp32 the results are equal up to the order of sums;
bf16 rounds activations to 8 bits and keeps weights, boxes, costs and losses in fp32.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from detr.model import DETR

Precision = Literal["fp32", "bf16"]
Tf32 = Literal["auto", "yes", "no"]
Recompute = Literal["none", "encoder", "backbone", "both"]
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_CANVAS_SHAPES = 256  # maximum number of compiled canvas shapes; others run uncompiled


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context manager for the forward pass; losses are computed outside it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def arithmetic(tf32: Tf32, *, deterministic: bool) -> Iterator[None]:
    """Set for the block what fp32 means on a GPU, and whether its sums have the same order in each run.

    tf32: round the factors of fp32 products to 10 bits: `yes` all, `no` none, `auto` as torch is set, which is for
    convolutions alone. deterministic: an operation that has no such kernel raises `RuntimeError`.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    memory: Any = torch.utils.deterministic
    ordered, filling = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    warns, workspace = torch.is_deterministic_algorithms_warn_only_enabled(), os.environ.get(_WORKSPACE)
    try:
        if tf32 != "auto":
            cuda.allow_tf32 = cudnn.allow_tf32 = tf32 == "yes"
        if deterministic:
            os.environ.setdefault(_WORKSPACE, ":4096:8")  # read at the first product on the GPU
            cudnn.benchmark = False
            memory.fill_uninitialized_memory = False  # it only shows what reads memory that nothing wrote
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        memory.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(ordered, warn_only=warns)
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def set_channels_last(model: DETR) -> None:
    """Store the backbone's images and weights in the layout [B, height, width, channels].

    On a CPU, oneDNN's kernels are fastest with it; on a GPU, tensor cores need no transpose.
    """
    model.backbone.to(memory_format=torch.channels_last)
    model.backbone[0].body.channels_last = True  # type: ignore[union-attr]


def set_recompute(model: DETR, modules: Recompute) -> None:
    """Recompute activations of the encoder's layers or the backbone's blocks in the backward pass, to save memory."""
    model.transformer.encoder.recompute = modules in ("encoder", "both")
    model.backbone[0].body.recompute = modules in ("backbone", "both")  # type: ignore[union-attr]


def fsdp_units(model: DETR) -> list[list[nn.Module]]:
    """Return the modules to shard with FSDP, grouped: the blocks of each backbone stage, and each transformer layer.

    The groups are computed one after another and hold most of the weights.
    """
    body = model.backbone[0].body
    stages = [list(body.get_submodule(name).children()) for name in body.stages]  # type: ignore[union-attr]
    layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
    return [*stages, *([layer] for layer in layers)]


def compile_shapes(model: DETR) -> None:
    """Compile the forward and backward pass of each canvas shape on its first use.

    The model is changed in place and the names of parameters stay. Dynamic shapes are off, since they cost more in
    compilation than they save. Canvases up to 800 x 1333, rounded to multiples of 64, have about 100 shapes; without
    rounding, thousands.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _CANVAS_SHAPES)
    model.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[Any]:
    """Return a context manager in which a compiled model runs uncompiled."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]

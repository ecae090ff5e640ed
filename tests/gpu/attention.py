"""Attention backends on canvases that do not repeat, each in a process of its own: cuDNN builds a graph for each shape."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from detr.batch import normalise
from detr.compute import autocast, set_channels_last
from detr.config import LossConfig, TransformConfig
from detr.criterion import compute_losses
from tests.gpu.results import Results
from tests.gpu.work import Setting, batch_of, built

_VARIABLE = "TORCH_CUDNN_SDPA_DEPRIORITIZED"


def run(results: Results, setting: Setting) -> None:
    if _VARIABLE not in os.environ and setting.cuda:
        for value in ("0", "1"):
            command = [sys.executable, "-m", "tests.gpu", *sys.argv[1:]]
            subprocess.run(command, env=os.environ | {_VARIABLE: value}, cwd=Path.cwd(), check=True)
        return
    for precision in ("bf16", "fp32"):
        results.attempt(precision, lambda precision=precision: _measure(results, setting, precision))


def _measure(results: Results, setting: Setting, precision: str) -> None:
    generator = torch.Generator().manual_seed(3)
    device = torch.device(setting.device)
    model = built(setting.model).to(device)
    set_channels_last(model)
    batches = []
    for number in range(3 if setting.tiny else 24):
        height, width = (
            int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((449, 833), (769, 1334))
        )
        if setting.tiny:
            height, width = height // 8, width // 8
        batches.append(batch_of([(height, width), (height - 16, width - 16)], seed=number).to(device))

    def step(number: int) -> None:
        batch = batches[number]
        model.zero_grad(set_to_none=True)
        with autocast(device, precision):  # type: ignore[arg-type]
            outputs = model(normalise(batch, TransformConfig()), batch.padding)
        compute_losses(outputs, list(batch.targets), 14.0, LossConfig()).total.backward()

    warm = batch_of([(64, 96)]).to(device)
    model(normalise(warm, TransformConfig()), warm.padding).logits.sum().backward()
    rounds = [
        [setting.seconds(lambda n=n: step(n)) for n in range(len(batches))] for _ in range(2 if setting.tiny else 3)
    ]
    medians = [sorted(times)[len(times) // 2] * 1e3 for times in rounds]
    deprioritised = os.environ.get(_VARIABLE, "")
    results.put(
        precision, cudnn_last=deprioritised, first_ms=medians[0], last_ms=medians[-1], worst_ms=max(rounds[0]) * 1e3
    )

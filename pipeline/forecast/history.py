"""Times of the user's own earlier runs, from their tags in MLflow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from pipeline.config import RunConfig
from pipeline.forecast.prices import PRICED, Measured, Prices, costly_options, prices
from pipeline.tracking.mlflow_runs import runs_where
from pipeline.tracking.tags import TAG_TIMES, TAG_TRAIN_DIGEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_COMPARED = 5
"""Runs whose differences are the span of a forecast; the newest of them are its price."""
_LOOKED_AT = 200


def past_prices(
    client: MlflowClient,
    config: RunConfig,
    images: int,
    *,
    gpu: bool | None = None,
    device: str | None = None,
    digest: str = "",
) -> Prices | None:
    """Return the prices of the newest runs of the same recipe, model and workers, or None if there are none.

    gpu: whether the workers use GPUs. device: name of their device, or a piece of it. None takes what the newest run had.
    digest: that of the training data; runs on other data count only where there is none on these.
    """
    wanted = costly_options(config)
    found: list[tuple[Run, Measured]] = []
    condition = f"params.recipe = '{config.recipe or '-'}' and tags.`{TAG_TIMES}` != ''"
    for run in runs_where(client, condition, _LOOKED_AT):
        try:
            times = msgspec.json.decode(run.data.tags[TAG_TIMES], type=Measured)
        except msgspec.DecodeError:
            continue  # of another release
        if times.options == wanted and gpu in (None, times.gpu) and _fits(device, times.device):
            found.append((run, times))
    if not found:
        return None
    same_data = [entry for entry in found if entry[0].data.tags.get(TAG_TRAIN_DIGEST) == digest]
    chosen = [entry for entry in same_data or found if entry[1].device == (same_data or found)[0][1].device][:_COMPARED]
    names = ", ".join(dict.fromkeys(str(run.info.run_name) for run, _ in chosen))
    what = f"{len(chosen)} of your runs" if len(chosen) > 1 else "your run"
    if len(chosen) > PRICED:
        what = f"the median of the newest {PRICED} of {what}"
    other = "" if same_data or not digest else ", on other data"
    return prices([times for _, times in chosen], images, f"{what} of this recipe in MLflow ({names}){other}")


def _fits(wanted: str | None, name: str) -> bool:
    """Return True if a device has the wanted name, such as `H100` and `NVIDIA H100 80GB HBM3`.

    The name may be the value of a node's label, `nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3`.
    """
    return wanted is None or _words(wanted.rpartition("=")[2]) <= _words(name)


def _words(device: str) -> set[str]:
    return set(re.findall(r"[a-z0-9.]+", device.lower())) - {"nvidia", "tesla"}

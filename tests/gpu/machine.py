"""The machine: versions, memory, clocks, and the processes that hold the device."""

import os
import subprocess

import torch

from tests.gpu.results import Results
from tests.gpu.work import Setting

_CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode"


def run(results: Results, setting: Setting) -> None:
    import numpy
    import scipy
    import torchvision

    versions = {"torchvision": torchvision.__version__, "numpy": numpy.__version__, "scipy": scipy.__version__}
    results.put("host", cores=os.cpu_count(), threads=torch.get_num_threads(), **versions)
    if not setting.cuda:
        return
    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    results.put(
        "device",
        memory_gib=total / 2**30,
        free_gib=free / 2**30,
        capability=capability,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )
    results.put("clocks", line=_smi(f"--query-gpu={_CLOCKS}"))
    torch.ones(1, device="cuda")
    results.put("processes on the device", count=len(_smi("--query-compute-apps=pid").splitlines()))


def _smi(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except OSError as error:
        return str(error)

"""Load of this machine."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from pipeline.cluster.load.machine import Machine, gpu_load, machine_name


def test_a_sample_has_the_load_of_cpu_memory_disk_and_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path)
    counters = psutil.net_io_counters()
    more = SimpleNamespace(bytes_recv=counters.bytes_recv + 10**12, bytes_sent=counters.bytes_sent + 10**12)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: more)
    sample = machine.sample()
    assert 0 <= sample["cpu_utilization_percentage"] <= 100
    assert 0 < sample["system_memory_usage_percentage"] <= 100
    assert sample["system_memory_usage_megabytes"] * 1e6 < psutil.virtual_memory().total
    assert sample["disk_available_megabytes"] > 0
    assert sample["network_receive_megabytes_per_s"] > 100
    assert machine.sample()["network_transmit_megabytes_per_s"] == 0
    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    assert Machine(tmp_path).sample()["network_receive_megabytes_per_s"] == 0


@pytest.mark.parametrize("nvml", [True, False])
def test_a_gpu_is_measured_as_far_as_its_driver_is_asked(nvml: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(value: int) -> Callable[[Any], int]:
        def ask(_: Any) -> int:
            if not nvml:
                raise ModuleNotFoundError("pynvml does not seem to be installed")
            return value

        return ask

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "utilization", asked(93))
    monkeypatch.setattr(torch.cuda, "power_draw", asked(612000))
    expected = {"gpu_3_memory_usage_megabytes": 20000.0, "gpu_3_memory_usage_percentage": 25.0}
    if nvml:
        expected |= {"gpu_3_utilization_percentage": 93.0, "gpu_3_power_usage_watts": 612.0}
    assert gpu_load(torch.device("cuda"), "3") == expected


def test_the_machine_s_name_may_stand_in_a_metric_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["socket"], "gethostname", lambda: "nöde (1)/a.b-c_d")
    assert machine_name() == "n-de--1--a.b-c_d"

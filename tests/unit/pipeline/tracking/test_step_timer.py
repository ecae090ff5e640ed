import itertools
import mmap
import time

import pytest
import torch

from pipeline.tracking import step_timer
from pipeline.tracking.step_timer import PHASES, StepClock, memory_gib


def test_phases_add_up_to_the_total_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 10.5, 12.0, 20.0, 21.0, 30.0, 30.25])
    monkeypatch.setattr(step_timer._HostMarks, "mark", lambda _: next(times))
    clock = StepClock(torch.device("cpu"))
    clock.start()  # at 10
    clock.lap("data_wait")
    clock.lap("forward")
    clock.start()  # the time until 20 is not counted
    clock.lap("forward")
    assert clock.read() == dict.fromkeys(PHASES, 0.0) | {"data_wait": 0.5, "forward": 2.5}
    clock.lap("loss")  # from the last reading at 21 to 30
    clock.lap("backward")
    assert clock.read() == dict.fromkeys(PHASES, 0.0) | {"loss": 9.0, "backward": 0.25}


class Event:
    """Fake CUDA event; neither the host's clock nor a wait before reading may be used."""

    ticks = itertools.count()
    made = 0
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1
        self.at = -1

    def record(self) -> None:
        self.at = next(Event.ticks)

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, other: "Event") -> float:
        return 1000.0 * (other.at - self.at)


def test_on_a_gpu_phases_are_measured_by_reused_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for _ in range(3):
        for phase in ("data_wait", "forward", "forward", "backward"):
            clock.lap(phase)
        before = Event.waited
        seconds = clock.read()
        assert Event.waited == before + 1
        assert seconds == dict.fromkeys(PHASES, 0.0) | {"data_wait": 1.0, "forward": 2.0, "backward": 1.0}
    assert Event.made == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_phase_is_the_time_of_the_device() -> None:
    clock, big = StepClock(torch.device("cuda")), torch.rand(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    clock.start()
    start = time.perf_counter()
    for _ in range(20):
        big = big @ big
    clock.lap("forward")
    host_s = time.perf_counter() - start
    clock.lap("backward")
    seconds = clock.read()
    assert seconds["forward"] > 5 * host_s
    assert seconds["backward"] < seconds["forward"] / 100


def test_memory_on_a_cpu_is_the_resident_size() -> None:
    before = memory_gib(torch.device("cpu"))
    with mmap.mmap(-1, 2**28) as fresh:  # a tensor's memory may be what an earlier test has freed
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
        assert memory_gib(torch.device("cpu")) - before == pytest.approx(0.25, abs=0.05)

"""The lease of a run in a folder and in an S3 store: one driver, and dead ones found."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import s3fs

from pipeline.checkpoint import patience
from pipeline.checkpoint.location import Location, location
from pipeline.driver import lease as lease_module
from pipeline.driver.lease import Claims, Holder, Lease, this_process
from pipeline.driver.sole_driver import sole_driver
from pipeline.errors import BusyError
from shards.errors import ShardError
from tests.support.s3_server import S3Server

ELSEWHERE = Holder("elsewhere", 7)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    if request.param == "folder":
        yield tmp_path / "run"
        return
    server = S3Server(tmp_path, written=True)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # the store of an earlier test had another address
    yield location("s3://sets/run")
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def held(place: Location, holder: Holder | None = None) -> Lease:
    """Return an acquired lease that watches others for a few moments only."""
    lease = Lease(Claims(place), "it", holder, look_s=0.01, looks=3)
    lease.acquire()
    return lease


def test_a_second_driver_is_told_who_has_the_run(place: Location) -> None:
    first = held(place)
    with pytest.raises(BusyError, match=f"run it is being trained by {this_process()}; expected one driver: wait"):
        held(place)
    assert first.beat(), "the refused driver has left the holder's claim alone"
    first.release()
    assert held(place).dead == []


def test_a_driver_elsewhere_is_alive_while_it_renews_its_lease(place: Location) -> None:
    first = held(place, ELSEWHERE)
    with first.kept(lambda: None, heartbeat_s=0.005), pytest.raises(BusyError, match="process 7 on elsewhere"):
        Lease(Claims(place), "it", look_s=0.05, looks=50).acquire()


def test_a_driver_elsewhere_that_renews_no_more_is_dead(place: Location) -> None:
    first, second = held(place, ELSEWHERE), held(place)
    assert second.dead == [ELSEWHERE]
    lost = threading.Event()
    with first.kept(lost.set, heartbeat_s=0.01):  # it was only paused
        assert lost.wait(60)
    assert str(this_process()) in first.lost or first.lost == "removed by another driver"
    assert second.beat()


def test_a_killed_process_of_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from pipeline.driver.lease import Claims, Lease\n"
        "lease = Lease(Claims(pathlib.Path(sys.argv[1])), 'it')\n"
        "lease.acquire()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {process.pid} on"):
            Lease(Claims(tmp_path), "it").acquire()
    finally:
        process.send_signal(signal.SIGKILL)  # not waited for yet: a zombie is dead, too
    time.sleep(0.05)
    start = time.monotonic()
    lease = Lease(Claims(tmp_path), "it")
    lease.acquire()
    assert [holder.pid for holder in lease.dead] == [process.pid]
    assert time.monotonic() - start < 10, "nothing had to be watched"
    process.communicate()


def test_a_number_of_a_process_that_is_used_again_is_not_the_holder() -> None:
    assert this_process().state == "alive"
    assert msgspec.structs.replace(this_process(), started="1").state == "dead"
    assert msgspec.structs.replace(this_process(), system="another boot").state == "unknown"


def test_a_lease_survives_a_store_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease, away, beats = held(tmp_path), threading.Event(), threading.Semaphore(0)
    read = Claims.read

    def reading(claims: Claims) -> object:
        beats.release()
        if away.is_set():
            raise ShardError("away")
        return read(claims)

    monkeypatch.setattr(Claims, "read", reading)
    away.set()
    with lease.kept(lambda: pytest.fail("lost"), heartbeat_s=0.01):
        for _ in range(5):
            assert beats.acquire(timeout=60)
        away.clear()
        for _ in range(5):
            assert beats.acquire(timeout=60)
    # Leases of earlier tests may still be looking for stores that have gone.
    assert [record.message for record in caplog.records if ": away;" in record.message] == [
        "the lease of run it could not be renewed: away; tried again"
    ]
    assert lease.lost == ""


def test_a_holder_without_its_store_gives_up_when_the_workers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lease_module.PATIENCE_S == patience.PATIENCE_S
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.05)
    lease, lost = held(tmp_path), threading.Event()

    def away(_: Claims) -> None:
        raise ShardError("away")

    monkeypatch.setattr(Claims, "read", away)
    start = time.monotonic()
    with lease.kept(lost.set, heartbeat_s=0.01):
        assert lost.wait(60)
    assert time.monotonic() - start >= 0.05
    assert lease.lost.startswith("without its store for")


def test_a_lease_that_is_lost_before_the_workers_run_is_named(tmp_path: Path) -> None:
    def stopped(lost: str) -> None:
        with sole_driver(tmp_path, "it", print) as lease:
            lease.lost = lost
            raise KeyboardInterrupt

    with pytest.raises(BusyError, match="run it was taken over by process 7 on elsewhere; this process"):
        stopped("taken over by process 7 on elsewhere")
    with pytest.raises(KeyboardInterrupt):
        stopped("")


def test_a_file_that_is_renamed_while_claims_are_listed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held(tmp_path)
    (tmp_path / "lease" / ".claim.json.1.partial").write_text("{}")
    (tmp_path / "lease" / "gone.json").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(Path, "stat", lambda *_, **__: pytest.fail("looked at a file that may be gone"))
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    assert len(Claims(tmp_path).read()) == 1
    monkeypatch.undo()
    first.release()

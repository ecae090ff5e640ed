"""Requests to the loop, from the run's folder and from the hooks."""

import time
from pathlib import Path

from pipeline.run_folder import clear_notes, request_handover, request_stop
from pipeline.training.requests import LoopHooks, Request, RequestPoller


def test_the_poller_sees_a_stop_request(tmp_path: Path) -> None:
    poller = RequestPoller(tmp_path)
    assert not poller.poll().stop
    request_stop(tmp_path)
    while not poller.poll().stop:
        time.sleep(0.02)


def test_the_poller_sees_a_handover_request(tmp_path: Path) -> None:
    poller = RequestPoller(tmp_path)
    request_handover(tmp_path)
    assert poller.poll() == Request(stop=True)
    clear_notes(tmp_path)
    assert RequestPoller(tmp_path).poll() == Request()


def test_the_poller_passes_on_the_requests_of_the_hooks(tmp_path: Path) -> None:
    poller = RequestPoller(tmp_path, LoopHooks(request=lambda: Request(save=True)))
    assert poller.poll() == poller.poll() == Request(save=True)

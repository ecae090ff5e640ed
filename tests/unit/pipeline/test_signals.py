"""Stop signals of a process that its parent has told to ignore them."""

import signal
import subprocess
import sys
import time

import pytest

CODE = """
import time
from pipeline.signals import Signalled, hear_stops, raise_unheard
hear_stops()
raise_unheard()
try:
    print("hears", flush=True)
    time.sleep(30)
except Signalled as stop:
    print(stop, stop.number, flush=True)
try:
    time.sleep(0.3)  # the second of two signals that are one request does nothing
    raise_unheard()
except Signalled:
    print("unheard", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_heard_even_where_it_was_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)  # as in a process that a script has started with `&`
    try:
        process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(number, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "hears\n"
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert (output, process.returncode) == (f"{number.name} {number.value}\nunheard\n", 0)

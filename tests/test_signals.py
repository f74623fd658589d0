"""Tests that were started in the background, or under nohup, are those of a terminal."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from conftest import hear_signals

SHOWS = "import signal, sys; print(signal.getsignal(int(sys.argv[1])) is signal.SIG_IGN)"


def ignored_by_a_program(number: int) -> bool:
    shown = subprocess.run([sys.executable, "-c", SHOWS, str(int(number))], capture_output=True, text=True, check=True)
    return shown.stdout == "True\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_programs_hear_a_signal_that_tests_ignore(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert ignored_by_a_program(number)
        hear_signals()
        assert not ignored_by_a_program(number)
    finally:
        signal.signal(number, before)

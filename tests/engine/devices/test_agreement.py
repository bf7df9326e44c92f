import os
import signal
import threading
from contextlib import suppress

import psutil
import pytest

from engine.devices.agreement import EXIT_CODES, Agreement, Interrupted

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


@pytest.fixture
def exit_codes(monkeypatch):
    """Record the calls of os._exit instead of making them."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_each_signal_has_the_exit_code_of_a_shell():
    assert {signum: 128 + signum for signum in SIGNALS} == EXIT_CODES


@pytest.mark.parametrize("signum", SIGNALS)
def test_before_the_first_step_a_signal_raises_once(signum):
    expected = KeyboardInterrupt if signum == signal.SIGINT else Interrupted
    with Agreement():
        with pytest.raises(expected):
            signal.raise_signal(signum)
        for other in SIGNALS:  # does not disturb the cleaning up
            signal.raise_signal(other)


@pytest.mark.parametrize("signum", SIGNALS)
def test_during_the_run_a_signal_is_only_noted(signum):
    with Agreement() as agreement:
        agreement.begin()
        assert agreement.stop() == 0
        signal.raise_signal(signum)
        assert agreement.stop() == signum


def test_ctrl_c_after_sigterm_still_saves_and_a_second_one_exits(exit_codes):
    with Agreement() as agreement:
        agreement.begin()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert agreement.stop() == signal.SIGTERM
        assert exit_codes == []
        signal.raise_signal(signal.SIGINT)
        assert exit_codes == [130]


def test_ctrl_c_twice_exits_also_after_the_last_step(exit_codes):
    with Agreement() as agreement:
        agreement.begin()
        agreement.finish()
        signal.raise_signal(signal.SIGINT)
        assert exit_codes == []
        signal.raise_signal(signal.SIGINT)
        assert exit_codes == [130]


def test_an_inherited_ignored_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Agreement() as agreement:
            signal.raise_signal(signal.SIGHUP)
            agreement.begin()
            signal.raise_signal(signal.SIGHUP)
            assert agreement.stop() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate-launch", "a shell"])
def test_the_death_of_a_launcher_counts_as_sigterm_and_that_of_a_shell_does_not(launcher, monkeypatch):
    command = {
        "torchrun": "python torchrun main.py",
        "accelerate-launch": "python bin/accelerate-launch main.py",
        "a shell": "sh",
    }
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: command[launcher].split())
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Agreement() as agreement, suppress(Interrupted):
        agreement.begin()
        assert agreement.stop() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert agreement.stop() == (0 if launcher == "a shell" else signal.SIGTERM)


def test_a_single_process_that_hangs_after_its_last_step_ends_itself(monkeypatch, capsys):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set(), agreement._left.set()))
    with Agreement(timeout=0.2) as agreement:
        agreement.begin()
        assert not ended.wait(0.5)  # an update may take long
        agreement.finish()
        assert ended.wait(30)
    assert codes[0] == 1
    assert "error: no progress for 0.2 seconds (train.timeout)" in capsys.readouterr().err

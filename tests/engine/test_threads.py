"""OpenMP's threads don't spin for long, unless the user says so."""

import pytest

from tests.running import run_command

SHOWN = "import engine, torch; torch.ones(10)"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '5000'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
        ({"GOMP_SPINCOUNT": "7"}, "'7'"),
    ],
    ids=str,
)
def test_threads_that_wait_go_to_sleep_soon(chosen, expected, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    shown = run_command("python", "-c", SHOWN, OMP_DISPLAY_ENV="verbose", **chosen).stderr
    if "GOMP_" not in shown:
        pytest.skip("torch has another OpenMP")
    assert expected in shown
    assert ("GOMP_SPINCOUNT = '5000'" in shown) == (not chosen)

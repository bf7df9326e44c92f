import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import resource_sharer
from multiprocessing.connection import Client

import psutil
import pytest
import torch

from datasets.pipeline import workers
from datasets.pipeline.workers import Workers, WorkersFailed, read_in_workers


def double(n):
    return 2 * n


def test_workers_survive_the_signals_of_a_terminal_and_of_a_scheduler():
    results = read_in_workers(double, iter(range(20)), Workers(2, timeout=30))
    assert next(results) == 0
    for worker in multiprocessing.active_children():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, signum)
    assert list(results) == [2 * n for n in range(1, 20)]


def hang_up(key):
    """Let this worker hand over memory to one that hangs up, to one that takes it, and to one that asks for something else."""
    memory = resource_sharer.DupFd(1)  # starts the thread that hands over
    address, _ = memory._id
    authkey = multiprocessing.current_process().authkey
    Client(address, authkey=authkey).close()
    os.close(memory.detach())
    with Client(address, authkey=authkey) as connection:
        connection.send((key, os.getpid()))
    resource_sharer.stop(timeout=10)


def test_a_parent_that_is_interrupted_while_it_receives_memory_leaves_no_traceback(capfd):
    assert list(read_in_workers(hang_up, iter(["no such key"]), Workers(1, timeout=30))) == [None]
    printed = capfd.readouterr().err
    assert "KeyError: 'no such key'" in printed
    assert "EOFError" not in printed


def test_after_a_failed_start_no_worker_is_left(monkeypatch):
    before = set(multiprocessing.active_children())
    fork, started = os.fork, []

    def limited():
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(fork())
        return started[-1]

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(WorkersFailed, match="4 worker processes can't be started: Resource temporarily unavailable; fewer"):
        next(read_in_workers(double, iter(range(20)), Workers(4)))
    assert len(started) == 2
    assert set(multiprocessing.active_children()) == before
    assert not any(psutil.pid_exists(pid) for pid in started)


class Unsendable:
    def __reduce__(self):
        raise OSError(24, "Too many open files")


def test_a_batch_that_cannot_be_sent_is_a_failure_at_once(capfd):
    with pytest.raises(WorkersFailed, match="a worker can't hand over a batch: Too many open files"):
        next(read_in_workers(lambda n: Unsendable(), iter(range(4)), Workers(2, timeout=60)))
    assert "Traceback" not in capfd.readouterr().err


def end_at_five(n):
    if n == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


@pytest.mark.timeout(60)  # far below the limit for a batch
def test_a_killed_worker_is_reported_by_the_iterator_and_nowhere_else():
    results = read_in_workers(end_at_five, iter(range(20)), Workers(2, timeout=3600))
    assert [next(results), next(results)] == [0, 1]  # so that five has been asked for
    both = multiprocessing.active_children()
    while all(worker.is_alive() for worker in both):
        time.sleep(0.05)  # torch's handler of signals would raise here
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(results)


def test_without_shared_memory_the_error_says_how_much_was_needed(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)\nmore")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    normalize = type("", (), {"size": (20, 10)})
    request = type("", (), {"paths": range(100)})
    batches = workers.CroppedBatches(double, double, normalize, Workers(2), torch.device("cpu"))
    with pytest.raises(WorkersFailed, match=r"no shared memory for 5 batches, 0 MB \(/dev/shm\): unable .* \(28\); fewer"):
        next(batches(iter([request])))


@pytest.mark.skipif(not hasattr(os, "fork") or not os.path.exists("/proc"), reason="Linux ends a worker with its parent")
def test_a_worker_that_blocks_ends_with_its_killed_parent(tmp_path):
    def read(n):
        (tmp_path / str(os.getpid())).touch()
        threading.Event().wait()

    parent = os.fork()
    if parent == 0:
        next(read_in_workers(read, iter(range(4)), Workers(2)))
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail(f"{pids} outlive their parent")


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

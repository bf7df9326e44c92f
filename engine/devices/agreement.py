"""Agreement between ranks: about a failure on rank 0, a signal to stop, and a rank that hangs."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from engine.config.errors import ConfigError, RunError

T = TypeVar("T")

EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupted(Exception):
    """The run was asked to stop by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on rank 0, and return its result, or raise its failure, on every rank."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (ConfigError, RunError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        outcome[1].on_every_rank = True
        raise outcome[1]
    return outcome[0]


class Agreement:
    """Inside `with`, SIGINT and SIGTERM are only noted; `stop()` returns a noted signal, on every rank alike.

    The ranks' notes are combined by an all-reduce that starts at one call and is read at the next, on the CPU and in its own
    process group, so that no step waits for it. A second Ctrl-C ends the process at once. A launcher that dies without passing
    its signal on, as accelerate-launch does, counts as SIGTERM, and so do `time_limit` minutes. With several ranks, a rank that
    does not call `stop` for `timeout` seconds ends itself.
    """

    def __init__(self, timeout: float = 0.0, time_limit: float | None = None) -> None:
        self.noted = 0
        self.timeout = timeout
        self._deadline = time.monotonic() + 60 * time_limit if time_limit else math.inf
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if self._several else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}
        self._launcher = _accelerate_launch()
        self._last_call = time.monotonic()
        self._left = threading.Event()

    def __enter__(self) -> "Agreement":
        if threading.current_thread() is threading.main_thread():
            for signum in EXIT_CODES:
                self._before[signum] = signal.signal(signum, self._note)
        if self._several and self.timeout:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._pending is not None and exc[0] is None:
            self._pending[0].wait()

    def stop(self) -> int:
        """Return the signal that all ranks have agreed to stop for; 0 for none. Every rank must call it equally often."""
        self._last_call = time.monotonic()
        launcher_is_gone = self._launcher and os.getppid() != self._launcher
        if launcher_is_gone or self._last_call > self._deadline:
            self.noted = self.noted or signal.SIGTERM
        if not self._several:
            return self.noted
        agreed = 0
        if self._pending is not None:
            work, notes = self._pending
            work.wait()
            agreed = int(notes)
        notes = torch.tensor(self.noted)
        started: Any = dist.all_reduce(notes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (started, notes)
        return agreed

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.noted == signal.SIGINT and signum == signal.SIGINT:
            os._exit(EXIT_CODES[signal.SIGINT])
        self.noted = max(self.noted, signum)

    def _watch(self) -> None:
        while not self._left.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self._last_call > self.timeout:
                message = f"error on rank {dist.get_rank()}: no progress for {self.timeout:g} seconds (train.timeout)"
                print(message, file=sys.stderr, flush=True)
                os._exit(RunError.exit_code)


def _accelerate_launch() -> int:
    """Return the parent process id if the parent is accelerate-launch, otherwise 0."""
    try:
        command = " ".join(psutil.Process(os.getppid()).cmdline()[:4])
    except psutil.Error:
        return 0
    return os.getppid() if "accelerate" in command and "launch" in command else 0

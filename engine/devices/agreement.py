"""Agreement between ranks: about a failure on rank 0, a signal to stop, and a rank that hangs."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from engine.config.errors import ConfigError, RunError

T = TypeVar("T")

EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGHUP"):  # Windows has none
    EXIT_CODES[signal.SIGHUP] = 129


class Interrupted(BaseException):
    """The run was asked to stop by a signal. Not an Exception, like KeyboardInterrupt: handlers of failures must not catch it."""

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
    Agreement.last_progress = time.monotonic()
    if outcome[1] is not None:
        outcome[1].on_every_rank = True
        raise outcome[1]
    return outcome[0]


def all_ranks(accelerator: Accelerator, ok: bool) -> bool:
    """Whether `ok` is true on every rank. Each rank has to call it."""
    failures = torch.tensor(float(not ok), device=accelerator.device)
    return accelerator.reduce(failures, reduction="sum").item() == 0


class Agreement:
    """Handles signals, a lost launcher and hangs, from the start of a run, by `with`, to its end.

    - Starting: SIGINT raises KeyboardInterrupt and the others Interrupted, once: further ones don't disturb the cleaning up.
      With several ranks, one that makes no progress for `timeout` seconds, such as `on_main`, ends itself.
    - Between `begin` and `finish`: signals are only noted. `stop()` returns a noted signal, on every rank alike: the ranks' notes
      are combined by an all-reduce that starts at one call and is read at the next, on the CPU and in its own process group, so
      that no step waits for it. A launcher that has died without passing its signal on counts as SIGTERM, and so do `time_limit`
      minutes. Calling it is progress.
    - After `finish`: the training is done and saved, so signals no longer stop it. A single process ends itself, too, after
      `timeout` seconds without progress.

    From `begin` on, a second Ctrl-C ends the process at once. A signal that is ignored when the run starts, as SIGHUP by nohup,
    stays ignored.
    """

    last_progress = 0.0  # when this process last did something that shows that it doesn't hang

    def __init__(self, timeout: float = 0.0, time_limit: float | None = None) -> None:
        self.noted = 0
        self.timeout = timeout
        self._deadline = time.monotonic() + 60 * time_limit if time_limit else math.inf
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if self._several else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}
        self._launcher = _launcher()
        self._phase: Literal["starting", "running", "finishing"] = "starting"
        self._has_ctrl_c = False
        self._watcher: threading.Thread | None = None
        self._left = threading.Event()

    def __enter__(self) -> "Agreement":
        if threading.current_thread() is threading.main_thread():
            for signum in EXIT_CODES:
                if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._handle)
        self.progress()
        if self.timeout:  # started now: later, memory for a thread may be what is missing
            self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        if self._watcher is not None:
            self._watcher.join()  # a thread that wakes up while the interpreter ends would abort the process
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def begin(self) -> None:
        """From now on a checkpoint can be saved, so signals are only noted."""
        self._phase = "running"
        self.progress()

    def finish(self, *, failed: bool = False) -> None:
        """From now on the run can only end. Unless it has failed, every rank must call this."""
        if self._pending is not None and not failed:
            self._pending[0].wait()  # the process group must not end with work in flight
            self._pending = None
        self.progress()
        self._phase = "finishing"

    def progress(self) -> None:
        """Note that this process does not hang."""
        Agreement.last_progress = time.monotonic()

    def stop(self) -> int:
        """Return the signal that all ranks have agreed to stop for; 0 for none. Every rank must call it equally often."""
        self.progress()
        launcher_is_gone = self._launcher and os.getppid() != self._launcher
        if launcher_is_gone or self.last_progress > self._deadline:
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

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._phase == "starting":
            if self.noted:
                return
            self.noted = signum
            raise KeyboardInterrupt if signum == signal.SIGINT else Interrupted(signum)
        if signum == signal.SIGINT:
            if self._has_ctrl_c:
                os._exit(EXIT_CODES[signal.SIGINT])
            self._has_ctrl_c = True
        self.noted = max(self.noted, signum)

    def _watch(self) -> None:
        """End this process if it hangs. A single process is watched only after its last step: nobody else waits for it."""
        while not self._left.wait(min(1.0, self.timeout / 10)):
            is_watched = self._several or self._phase == "finishing"
            if is_watched and time.monotonic() - self.last_progress > self.timeout:
                rank = f" on rank {dist.get_rank()}" if self._several else ""
                message = f"error{rank}: no progress for {self.timeout:g} seconds (train.timeout)"
                print(message, file=sys.stderr, flush=True)
                os._exit(RunError.exit_code)


def _launcher() -> int:
    """Return the parent process id if the parent is torchrun or accelerate-launch, otherwise 0."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, whatever starts it
        return os.getppid()
    try:
        command = " ".join(psutil.Process(os.getppid()).cmdline()[:4])
    except psutil.Error:
        return 0
    return os.getppid() if "accelerate" in command and "launch" in command else 0

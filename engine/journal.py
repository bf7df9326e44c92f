"""What happens beside the updates: lines, metrics, pictures and checkpoints."""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from engine.build import Run
from engine.config.errors import RunError
from engine.devices.agreement import on_main
from engine.devices.sharding import gathered, load_weights, own_part
from engine.run.checkpoint import Checkpoint, Checkpoints
from engine.run.folder import RunFolder
from engine.run.metrics import Tracker
from engine.run.trackers import Trackers

log = logging.getLogger(__name__)

MOST_FAILED_SAVES = 3  # in a row


class Journal:
    """Rank 0 writes; every rank calls, since sums over ranks are taken here."""

    def __init__(
        self, run: Run, folder: RunFolder, checkpoints: Checkpoints | None, open_trackers: Callable[[], Trackers] | None = None
    ) -> None:
        self.run, self.folder, self.checkpoints = run, folder, checkpoints
        self.accelerator: Accelerator = run.accelerator
        self.tracker = Tracker(folder, run.state.step, run.state.metrics_bytes) if self.accelerator.is_main_process else None
        self.trackers = open_trackers() if open_trackers is not None and self.accelerator.is_main_process else None
        self.failed_saves = 0
        self.images = self.seconds = 0.0  # trained in this session, and the time that this took
        self._begin_window()
        self._last_tick = perf_counter()

    def _begin_window(self) -> None:
        self._window_begin, self._window_step = perf_counter(), self.run.state.step

    def progress_bar(self, first: int, last: int) -> tqdm:
        visible = self.accelerator.is_main_process and sys.stderr.isatty()
        return tqdm(total=last, initial=first, unit="step", dynamic_ncols=True, leave=False, disable=not visible)

    def profiled(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with a trace of some updates where train.profile asks for one."""
        run = self.run
        if not run.profile:
            return batches
        from engine.devices.profiler import profiled

        n_left = run.n_steps - run.state.step
        return profiled(
            batches, self.folder.path / "profile", rank=self.accelerator.process_index, n_updates=run.profile, n_left=n_left
        )

    def show_batch(self, batch: Any) -> None:
        """The first images as the model sees them."""
        if self.tracker is not None:
            from torchvision.utils import make_grid

            images = self.run.train_loader.normalize.undo(batch[0][:64]).cpu()
            self.tracker.images("train/images", make_grid(images, nrow=8, padding=1), step=0)
        self._begin_window()

    def training_metrics(self) -> dict[str, float]:
        """What was summed up since the last line, over all ranks; the sums begin anew."""
        state = self.run.state
        grad_norm = state.window.pop("grad_norm", None)
        sums, weight = {}, 0.0
        if names := sorted(state.window):  # empty when every update since the last line was left out
            added = self.accelerator.reduce(self._stack(names), reduction="sum").tolist()
            sums = dict(zip(names, added, strict=True))
            weight = sums.pop("weight")
        state.window.clear()

        images = (state.step - self._window_step) * self.run.batch_size
        seconds = perf_counter() - self._window_begin
        self.images, self.seconds = self.images + images, self.seconds + seconds
        metrics = {f"train/{name}": value / weight for name, value in sums.items()}
        group = state.optimizer.param_groups[0]
        metrics["train/lr"] = group["lr"] / group["lr_scale"]
        if grad_norm is not None:
            metrics["train/grad_norm"] = float(grad_norm)
        metrics["train/images_per_sec"] = round(images / seconds, 1)
        return metrics

    def close_line(self, stop: Callable[[], int]) -> bool:
        """Evaluate where that is due, and write the line of this step; true if it is the best so far."""
        state, run = self.run.state, self.run
        if state.open_line is None:
            return False
        metrics, averaged = {}, {}
        if run.is_due(run.eval_freq, state.step):
            metrics = run.evaluate("valid", stop)
            averaged = run.evaluate("valid", stop, averaged=True) if state.ema is not None else {}
        is_best = bool(metrics) and state.note_evaluation(metrics, f"valid/{run.task.monitor}")
        line, state.open_line = state.open_line | metrics | averaged, None
        self.write(line)
        return is_best

    def write(self, metrics: dict[str, float]) -> None:
        """One line everywhere; a loss that is no number ends the run."""
        state = self.run.state
        self._tick()
        if self.tracker is not None:
            times = {"epoch": round(state.step / self.run.steps_per_epoch, 4), "elapsed": round(state.elapsed, 3)}
            self.tracker.record(state.step, times | metrics)
            if self.trackers is not None:
                self.trackers.record(state.step, times | metrics)
            log.info("%s", self._line(metrics))
        for name, value in metrics.items():
            if name.endswith("/loss") and not math.isfinite(value):
                raise self._diverged(f"{name} is {value}")
        self._begin_window()

    def end_early(self) -> None:
        state, run = self.run.state, self.run
        log.info("step %d: %d evaluations without a better one (train.patience); the run ends", state.step, run.patience)
        self.save(must=True)

    def save(self, *, must: bool = False) -> None:
        """Commit a checkpoint of this step. One that would hold a NaN is not written; a dry run writes none.

        A disk that is full for a while is no reason to stop, unless this is the last chance.
        """
        if self.checkpoints is None:
            return
        if not self._weights_are_finite():
            raise self._diverged("a weight is no finite number")
        self._tick()
        must |= self.run.state.step == self.run.n_steps
        state = self.run.state
        weights, optimizer = gathered(state.model.state_dict()), gathered(state.optimizer.state_dict())
        on_main(self.accelerator, partial(self._commit, weights, optimizer, self._windows_of_all_ranks(), must))
        self._begin_window_after_pause()

    def _commit(self, weights: dict[str, Tensor], optimizer: dict[str, Any], windows: dict[str, Tensor], must: bool) -> None:
        state = self.run.state
        try:
            state.metrics_bytes = self.tracker.flush()
            ema_weights = state.ema.module.state_dict() if state.ema is not None else None
            self.checkpoints.save(state.step, weights, state.state_dict(optimizer, windows), state.best_step, ema_weights)
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            said = f"step {state.step} could not be saved: {error}"
            if must or self.failed_saves == MOST_FAILED_SAVES:
                times = "" if must else f", the {MOST_FAILED_SAVES}rd time in a row"
                raise RunError(f"{said}{times}; {self._last_good()}") from error
            log.warning("%s; training goes on, %s", said, self._last_good())

    def _last_good(self) -> str:
        last = self.folder.path / "ckpt" / "latest"
        return f"the last good checkpoint is {last.resolve()}" if last.exists() else "there is no checkpoint yet"

    def write_hyperparameters(self, config: dict[str, Any]) -> None:
        """For TensorBoard's table of runs: the config beside the best metric."""
        state, monitor = self.run.state, self.run.task.monitor
        if state.best_metrics:
            self.tracker.hyperparameters(config, {f"hparam/{monitor}": state.best_metrics[f"valid/{monitor}"]}, state.step)

    def close(self, status: str = "completed") -> None:
        if self.tracker is not None:
            self.tracker.close()
        if self.trackers is not None:
            self.trackers.close(status)

    def _weights_are_finite(self) -> bool:
        """On every rank alike: buffers such as BatchNorm's may differ between them."""
        tensors = [own_part(t) for t in self.run.state.model.state_dict().values() if t.is_floating_point()]
        n_bad = torch.stack([t.isfinite().logical_not().any() for t in tensors]).sum().float()
        return self.accelerator.reduce(n_bad, reduction="sum").item() == 0

    def _begin_window_after_pause(self) -> None:
        """The time of a save is no training time."""
        self._window_begin += perf_counter() - self._last_tick

    def _tick(self) -> None:
        now = perf_counter()
        self.run.state.elapsed += now - self._last_tick
        self._last_tick = now

    def _windows_of_all_ranks(self) -> dict[str, Tensor]:
        window = self.run.state.window
        names = sorted(name for name in window if name != "grad_norm")
        if not names:
            return {}
        every = self.accelerator.gather(self._stack(names).unsqueeze(0)).cpu()
        return {name: every[:, i].clone() for i, name in enumerate(names)}

    def _stack(self, names: list[str]) -> Tensor:
        """The window's sums as one tensor on the device, for one transfer."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.stack([self.run.state.window[name].to(device, dtype) for name in names])

    def _diverged(self, why: str) -> RunError:
        step, advice = self.run.state.step, "A lower train.optim.lr or a warm-up may help"
        error = RunError(f"the training diverged at step {step}: {why}; {self._last_good()}. {advice}")
        error.is_of_all_ranks = True
        return error

    def _line(self, metrics: dict[str, float]) -> str:
        state, run = self.run.state, self.run
        n_epochs = run.n_steps / run.steps_per_epoch
        words = [f"epoch {state.step / run.steps_per_epoch:.4g}/{n_epochs:.4g}", f"step {state.step}/{run.n_steps}"]
        for part in dict.fromkeys(name.partition("/")[0] for name in metrics):
            own = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{part}/")}
            shown = ("loss", *run.task.shown, "lr", "grad_norm")
            words.append(" ".join([part, *(self._say(name, own[name]) for name in shown if name in own)]))
        if "train/images_per_sec" in metrics:
            words.append(f"{metrics['train/images_per_sec']:.0f} images/s")
        if state.best_step == state.step and any(name.startswith("valid/") for name in metrics):
            words.append("best")
        return " | ".join(words)

    def _say(self, name: str, value: float) -> str:
        return f"{name} {100 * value:.2f} %" if name in self.run.task.shown else f"{name} {value:.4g}"


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a verified checkpoint into the run."""
    try:
        load_weights(run.state.model, checkpoint.weights)
        if run.state.ema is not None:  # an average that is asked for only now begins with the weights as they are
            run.state.ema.module.load_state_dict(checkpoint.ema_weights or checkpoint.weights)
        run.state.load_state_dict(checkpoint.train_state, run.accelerator.process_index, run.accelerator.num_processes)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"{checkpoint.path} doesn't fit the config: {str(error).splitlines()[0]}") from error

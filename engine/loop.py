"""The training loop."""

from dataclasses import dataclass

from engine.agreement import Agreement
from engine.builder import Run
from engine.journal import Journal


@dataclass
class Interrupted(Exception):
    """The run was asked to stop, and has been saved."""

    signum: int


def fit(run: Run, journal: Journal) -> None:
    """Train from the state's step to the last one; log, evaluate and save where that is due."""
    state = run.state
    with Agreement() as agreement, journal.progress_bar(state.step, run.n_steps) as progress:
        run.model.train()
        for batch in run.train_batches(first=state.step):
            if state.step == 0:
                journal.show_batch(batch)
            log_due, eval_due, save_due = (
                run.is_due(freq, state.step + 1) for freq in (run.print_freq, run.eval_freq, run.save_freq)
            )
            run.update(state, batch, measure=log_due)
            progress.update()

            line = {}
            if log_due:
                line |= journal.training_metrics()
            if eval_due:
                metrics = run.evaluate("valid")
                line |= metrics
                save_due |= state.note_evaluation(metrics, f"valid/{run.task.monitor}")
            if line:
                journal.write(line)

            signum = agreement.stop()
            if save_due or signum:
                journal.save()
            if signum:
                raise Interrupted(signum)

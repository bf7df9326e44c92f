"""The training loop."""

from engine.build import Run
from engine.devices.agreement import Agreement, Interrupted
from engine.journal import Journal


def fit(run: Run, journal: Journal, agreement: Agreement) -> None:
    """Train from the state's step to the last one; log, evaluate and save where that is due."""
    state = run.state
    with journal.progress_bar(state.step, run.n_steps) as progress:
        run.model.train()
        if state.step == 0 and run.eval_first and not state.last_metrics:
            state.open_line = {}
        if state.open_line is not None:  # or a signal came before the evaluation of this step was through
            _close_line(journal, agreement, save_due=False)
        for batch in journal.profiled(run.train_batches(first=state.step)):
            if run.is_over():
                break
            if state.step == 0:
                journal.show_batch(batch)
            log_due = run.is_due(run.print_freq, state.step + 1)
            run.update(state, batch, measure=log_due)
            progress.update()
            if log_due or run.is_due(run.eval_freq, state.step):
                state.open_line = journal.training_metrics() if log_due else {}
            _close_line(journal, agreement, save_due=run.is_due(run.save_freq, state.step))
        if run.is_over():
            journal.end_early()


def _close_line(journal: Journal, agreement: Agreement, *, save_due: bool) -> None:
    """Evaluate, log and save. A signal on any rank cuts it short: what was not done is done first when the run goes on."""
    try:
        if signum := agreement.stop():
            raise Interrupted(signum)
        is_best = journal.close_line(agreement.stop)
    except Interrupted:
        journal.save(must=True)
        raise
    if save_due or is_best:
        journal.save()

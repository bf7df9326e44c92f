"""What differs between runs: in their configs, the versions and machines that they were trained with, and their results."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.schema import flatten
from tools.comparison.runs import RunRecord
from tools.tables import plain

ABSENT = "-"
NOT_OF_THE_MACHINE = ("command", "earlier_sessions")  # in environment.json


def differences(of_each: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys under which not all have the same, with what each has."""
    keys = dict.fromkeys(key for values in of_each for key in values)
    written = {key: [_written(values.get(key, ABSENT)) for values in of_each] for key in keys}
    return {key: values for key, values in written.items() if len(set(values)) > 1}


def _written(value: Any) -> str:
    """As in a YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)


def differing_machines(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Their versions, too."""
    return differences([_of_machine(run) for run in runs])


def say_differences(a: RunRecord, b: RunRecord) -> str:
    parts = {
        "config": differences([a.config, b.config]),
        "versions and machine": differing_machines([a, b]),
        "results": differences([_results(run) for run in (a, b)]),
    }
    said = []
    for title, different in parts.items():
        if different:
            said.append(plain([(title, a.name, b.name), *((key, *values) for key, values in different.items())]))
        else:
            said.append(f"{title}: no difference")
    return "\n\n".join(said)


def _of_machine(run: RunRecord) -> dict[str, Any]:
    return flatten({key: value for key, value in run.environment.items() if key not in NOT_OF_THE_MACHINE})


def _results(run: RunRecord) -> dict[str, Any]:
    return {"status": run.said_status, **flatten({key: value for key, value in run.results.items() if key != "status"})}

"""Quality gates (`--fail-under`): which metrics they mean, and which results miss them. Knows results; knows no model."""

from collections.abc import Sequence

from llmctl.core.config.evaluate import EvaluateConfig
from llmctl.core.errors import UsageError
from llmctl.core.evals.events import Scored
from llmctl.core.evals.metrics import TEXT_METRICS
from llmctl.core.evals.task import Task


def check_gates(config: EvaluateConfig, results: Sequence[Scored]) -> list[str]:
    """The gates that were not met, as sentences. Raises UsageError for a metric that no result has.

    "acc" is looked for in every result; "hellaswag.acc" in that task's alone. With several texts, a bare name means all
    of them and their total.
    """
    failures = []
    for gate in config.gates:
        found = 0
        for result in results:
            for metric in result.metrics:
                if gate.metric not in (metric.name, f"{result.name}.{metric.name}"):
                    continue
                found += 1
                worse = metric.value < gate.bound if metric.higher_is_better else metric.value > gate.bound
                if worse:
                    wanted = "at least" if metric.higher_is_better else "at most"
                    failures.append(f"{result.name}.{metric.name} is {metric.value:.6g}, {wanted} {gate.bound:g} is wanted")
        if not found:
            names = sorted({f"{result.name}.{metric.name}" for result in results for metric in result.metrics})
            raise UsageError(f"--fail-under {gate.metric}: no such metric here; there are {', '.join(names)}")
    return failures


def check_gate_names(config: EvaluateConfig, tasks: Sequence[Task]) -> None:
    """Raise UsageError for a gate on a metric that nothing will give, before anything is computed."""
    known = {name for task in tasks for name in task.metrics} | {f"{task.name}.{name}" for task in tasks for name in task.metrics}
    if config.texts:
        known |= set(TEXT_METRICS)
    for gate in config.gates:
        if gate.metric not in known and not (config.texts and gate.metric.rpartition(".")[2] in TEXT_METRICS):
            raise UsageError(f"--fail-under {gate.metric}: no such metric here; there are {', '.join(sorted(known))}")

"""Any way of scoring a model, behind one function."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qdist.data.source import DataSource
from qdist.evaluate.builtin import (
    DatasetEvaluation,
    Outputs,
    Runner,
    evaluate_on,
    float_outputs,
)
from qdist.evaluate.command import CommandEvaluation
from qdist.evaluate.function import Executor, FunctionEvaluation
from qdist.evaluate.report import EvalReport
from qdist.model.session import Execution

Evaluation = DatasetEvaluation | CommandEvaluation | FunctionEvaluation


@dataclass(slots=True, kw_only=True)
class Scorer:
    """Scores models with one evaluation. Keeps the float model's outputs between models.

    ``float_model``: the model as the user gave it. ``scratch``: where commands get their working
    folders. ``batch_size``, ``iteration`` and ``dataset`` are handed to a user's function.
    """

    evaluation: Evaluation
    float_model: Path
    scratch: Path
    execution: Execution
    batch_size: int = 1
    iteration: int | None = None
    dataset: str | None = None
    _reference: list[Outputs] | None = field(default=None, repr=False)

    def score(self, model: Path) -> EvalReport:
        """Score a model on disk. Raises `EvaluationError`, `DataError`, QD205."""
        if isinstance(self.evaluation, CommandEvaluation):
            return self.evaluation.run(model, self.scratch)
        runner = Runner(model, self.execution)
        if isinstance(self.evaluation, FunctionEvaluation):
            return self.evaluation.run(
                Executor(
                    run=runner.run,
                    input_nodes=[spec.name for spec in runner.inputs],
                    output_nodes=runner.output_names,
                    model_path=model,
                    iteration=self.iteration,
                    batch_size=self.batch_size,
                    dataset=self.dataset,
                )
            )
        return evaluate_on(runner, self.evaluation, self.reference())

    def reference(self) -> list[Outputs] | None:
        """The float model's outputs; None for evaluations that bring their own data."""
        if not isinstance(self.evaluation, DatasetEvaluation):
            return None
        if self._reference is None:
            self._reference = float_outputs(
                Runner(self.float_model, self.execution), self.evaluation
            )
        return self._reference

    def source(self) -> DataSource | None:
        """The evaluation's own data, where it is a data set."""
        if isinstance(self.evaluation, DatasetEvaluation):
            return self.evaluation.source
        return None

"""Any way of scoring a model, behind one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from qdist.data.executor import Shapes, layer_names
from qdist.data.source import DataSource
from qdist.evaluate.builtin import DatasetEvaluation, Runner, evaluate_on
from qdist.evaluate.command import CommandEvaluation
from qdist.evaluate.custom_metric import ClassEvaluation
from qdist.evaluate.early import Incumbent
from qdist.evaluate.function import Executor, FunctionEvaluation
from qdist.evaluate.metrics.batch import Parts
from qdist.evaluate.reference import append_outputs, read_outputs
from qdist.evaluate.report import EvalReport
from qdist.files import make_folder, replacing
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import Execution

Evaluation = DatasetEvaluation | CommandEvaluation | FunctionEvaluation | ClassEvaluation


@dataclass(slots=True, kw_only=True)
class Scorer:
    """Scores models with one evaluation; a context manager.

    Where the evaluation is a data set, the float model runs once: its outputs are kept in a file
    below ``scratch`` until the block is left, and read run by run beside those of other models.

    ``float_model``: the model as the user gave it. ``scratch``: where commands get their working
    folders. ``reference``: the file that another scorer, which outlives this one, keeps the float
    model's outputs in; None until the float model ran. ``batch_size``, ``iteration`` and
    ``dataset`` are handed to a user's function.
    """

    evaluation: Evaluation
    float_model: Path
    scratch: Path
    execution: Execution
    reference: Path | None = None
    batch_size: int = 1
    iteration: int | None = None
    dataset: str | None = None
    _named: tuple[dict[str, str], Shapes] | None = field(default=None, repr=False)
    _folder: TemporaryDirectory[str] | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = self.reference = None

    def score(self, model: Path, incumbent: Incumbent | None = None) -> EvalReport:
        """Score a model on disk. ``incumbent``: what it has to beat, where the evaluation gives
        per-sample scores (`FunctionEvaluation.incumbent`); it may then stop early.

        Raises `EvaluationError`, `DataError`, QD205, QD603.
        """
        if isinstance(self.evaluation, CommandEvaluation):
            return self.evaluation.run(model, self.scratch)
        if isinstance(self.evaluation, FunctionEvaluation):
            return self._call(self.evaluation, model, incumbent)
        if isinstance(self.evaluation, ClassEvaluation):
            return self.evaluation.run(Runner(model, self.execution), self.scratch)
        return self._on_data(self.evaluation, model, None)

    def score_samples(self, model: Path) -> tuple[EvalReport, Parts | None]:
        """`score`, and numerators and denominators of every sample's score, float64 [n] each, for
        `qdist.evaluate.paired`; None where the evaluation does not give them."""
        if not isinstance(self.evaluation, DatasetEvaluation):
            return self.score(model), None
        found: list[Parts] = []
        report = self._on_data(self.evaluation, model, found.append)
        return report, found[-1]

    def source(self) -> DataSource | None:
        """The evaluation's own data, where it is a data set."""
        if isinstance(self.evaluation, DatasetEvaluation | ClassEvaluation):
            return self.evaluation.source
        return None

    def _call(
        self, evaluation: FunctionEvaluation, model: Path, incumbent: Incumbent | None
    ) -> EvalReport:
        runner = Runner(model, self.execution)
        return evaluation.run(
            Executor(
                run=runner.run,
                input_nodes=[spec.name for spec in runner.inputs],
                output_nodes=runner.output_names,
                model_path=model,
                iteration=self.iteration,
                batch_size=self.batch_size,
                dataset=self.dataset,
                describe=self._layers,
            ),
            incumbent,
        )

    def _layers(self) -> tuple[dict[str, str], Shapes]:
        """Of the float model, whose tensor names the quantized one keeps."""
        if self._named is None:
            frozen = freeze(load_model(self.float_model), self.execution)
            self._named = layer_names(Graph(frozen, self.execution))
        return self._named

    def _on_data(
        self,
        evaluation: DatasetEvaluation,
        model: Path,
        on_parts: Callable[[Parts], None] | None,
    ) -> EvalReport:
        reference = self.reference
        if reference is None:
            report, reference = self._score_float(evaluation, on_parts)
            if model == self.float_model:
                return report
        runner = Runner(model, self.execution)
        return evaluate_on(runner, evaluation, read_outputs(reference), on_parts=on_parts)

    def _score_float(
        self, evaluation: DatasetEvaluation, on_parts: Callable[[Parts], None] | None
    ) -> tuple[EvalReport, Path]:
        """One pass over the data: the float model's score, and its outputs into the file."""
        runner = Runner(self.float_model, self.execution)
        if self._folder is None:
            self._folder = TemporaryDirectory(
                prefix="qdist-reference-", dir=make_folder(self.scratch), ignore_cleanup_errors=True
            )
        path = Path(self._folder.name) / "outputs.npy"
        with replacing(path) as temporary, temporary.open("wb") as file:
            report = evaluate_on(
                runner, evaluation, keep=partial(append_outputs, file), on_parts=on_parts
            )
        self.reference = path
        return report, path

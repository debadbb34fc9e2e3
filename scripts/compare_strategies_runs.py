"""The searches that are compared: what is typed for each, and what it leaves."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from score_models import MODELS

from qdist.cli import domain
from qdist.cli.compose import validated
from qdist.cli.schema import TuneSettings
from qdist.evaluate.builtin import DatasetEvaluation, Outputs, Runner, batches
from qdist.evaluate.metrics import find_metric
from qdist.evaluate.metrics.batch import Parts
from qdist.evaluate.report import EvalReport
from qdist.search.trial import Candidate, Trial, best_of

OURS = "pareto"
COST = "bit_operations"
"""Of `qdist.search.costs.UNITS`: what all plans are compared by."""

LADDERS: dict[str, tuple[str, ...]] = {
    "int8, w4a8, w8a16": (),
    "int8, bf16, fp16, tf32": ("search.precisions=[bf16,fp16,tf32]",),
    "int8, int16": ("search.precisions=[int16]", "search.granularities=[tensor]"),
}
"""What layers may become -> the words for it; the first is what ``qdist tune`` offers by itself."""
DEFAULT, ICRAFT, SLIMAI = LADDERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A strategy as it is typed. ``ladder``: of `LADDERS`."""

    words: tuple[str, ...]
    ladder: str = DEFAULT


FIFTHS = {"squeezenet1.1": 8, "cifar10_vit": 12, "kws": 25, "stories260K": 6, "yolox_nano": 6}
"""The models that are compared -> a fifth of their calibration samples: Knight's iterations are of
one batch and of five."""

MORE = {"yolox_nano": ("compare.samples=4", "compare.batch=4")}
"""Words of one model alone: comparing all of its layers would take longer than a search."""

CONTENDERS: dict[str, Contender] = {
    **{
        OURS if ladder == DEFAULT else f"{OURS} ({ladder})": Contender(
            words=("search=pareto",), ladder=ladder
        )
        for ladder in LADDERS
    },
    "greedy": Contender(words=("search=greedy",)),
    **{
        f"icraft {priority}": Contender(
            words=(
                "search=icraft",
                "search.options={chip: zhuge, priority: "
                + priority
                + (", threshold_level: 3" if priority == "accuracy" else "")
                + ", cos_targetvalue: 0.99999}",
            ),
            ladder=ICRAFT,
        )
        for priority in ("accuracy", "tradeoff", "performance")
    },
    "slimai": Contender(
        words=(
            "search=smart_search",
            "search.options={accuracy_level: '0,1,2', range: '97:99'}",
        ),
        ladder=SLIMAI,
    ),
    "knight": Contender(
        words=(
            "search=knight",
            "search.options={modes: [all], iterations: [1,5], batch_size: {fifth}}",
        )
    ),
    "optuna": Contender(words=("search=optuna",)),
}
"""What is shown -> how it is typed."""


def rival_of(name: str) -> str:
    """Our search over the ladder of another one."""
    ladder = CONTENDERS[name].ladder
    return OURS if ladder == DEFAULT else f"{OURS} ({ladder})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A trial. ``cost``: of its plan, in `COST`; ``plan``: digest of the plan, by which equal ones
    are known, empty where the target refused it."""

    trial: Trial
    cost: float
    plan: str

    @property
    def number(self) -> int:
        """Counted from 0."""
        return self.trial.candidate.number

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        report = self.trial.report
        return {
            "number": self.number,
            "label": self.trial.candidate.label,
            "n_bytes": self.trial.n_bytes,
            "costs": {f"cost_{COST}": self.cost},
            "plan": self.plan,
            "report": None if report is None else report.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From `to_json`, or a ``trial.json``."""
        report = value["report"]
        cost = float(value["costs"][f"cost_{COST}"])
        trial = Trial(
            candidate=Candidate(number=int(value["number"]), label=str(value["label"]), choices={}),
            report=None if report is None else EvalReport.from_json(report),
            n_bytes=int(value["n_bytes"]),
            cost=cost,
        )
        return cls(trial=trial, cost=cost, plan=str(value["plan"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search of one model. ``seconds``: of the whole command, start-up included."""

    model: str
    name: str
    tried: tuple[Tried, ...]
    seconds: float

    def best(self, n_trials: int | None = None, cost: float = float("inf")) -> Tried | None:
        """The best of the first ``n_trials`` on what the search saw, as the command chooses it,
        among those that cost at most so much; None without any."""
        by_number = {t.number: t for t in self.tried[:n_trials] if t.cost <= cost * (1 + 1e-9)}
        plain_cost = self.tried[0].cost if self.tried else None
        found = best_of(replace(t.trial, plain_cost=plain_cost) for t in by_number.values())
        return None if found is None else by_number[found.candidate.number]

    def n_to_reach(self, score: float, cost: float = float("inf")) -> int | None:
        """How many trials it took to verify a plan of at least this score that costs at most so
        much; None where none did."""
        for n, entry in enumerate(self.tried, 1):
            report = entry.trial.report
            if report is None or entry.cost > cost * (1 + 1e-9):
                continue
            if report.score >= score if report.higher_is_better else report.score <= score:
                return n
        return None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "model": self.model,
            "name": self.name,
            "seconds": self.seconds,
            "tried": [entry.to_json() for entry in self.tried],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From `to_json`."""
        return cls(
            model=value["model"],
            name=value["name"],
            tried=tuple(map(Tried.from_json, value["tried"])),
            seconds=value["seconds"],
        )


def words_of(model: str, name: str, n_trials: int, n_samples: int) -> list[str]:
    """What is typed after ``qdist tune``, but for where results go."""
    case, contender = MODELS[model], CONTENDERS[name]
    return [
        f"model.path={case.model}",
        f"model.name={model}",
        *case.data,
        *case.evaluation,
        "evaluation.search_share=0.5",
        *(word.replace("{fifth}", str(FIFTHS[model])) for word in contender.words),
        *LADDERS[contender.ladder],
        *MORE.get(model, ()),
        f"search.cost={COST}",
        f"search.max_trials={n_trials}",
        f"search.sensitivity_samples={n_samples}",
    ]


def run_search(
    model: str, name: str, assets: Path, folder: Path, n_trials: int, n_samples: int
) -> Search:
    """Run one search below ``folder``, or go on with one that is there. Raises
    `subprocess.CalledProcessError`."""
    words = words_of(model, name, n_trials, n_samples)
    print(f"$ qdist tune {shlex.join(words)}", file=sys.stderr, flush=True)
    place = place_of(folder, model, name)
    own = [f"output.folder={place}", f"store.path={folder / model}.zarr", "tracking=none"]
    begin = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "qdist.cli", "tune"),
            *(word.replace("{assets}", str(assets.absolute())) for word in words),
            *own,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - begin
    files = sorted((place / "trials").glob("trial-*/trial.json"))
    tried = [Tried.from_json(json.loads(file.read_text("utf-8"))) for file in files]
    return Search(model=model, name=name, tried=tuple(tried), seconds=seconds)


def place_of(folder: Path, model: str, name: str) -> Path:
    """Where a search leaves its files."""
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return folder / model / plain


class Unseen:
    """The samples that no search of a model saw: scores of plans on them, sample by sample."""

    def __init__(self, place: Path) -> None:
        """``place``: of any search of the model."""
        config = json.loads((place / "tune.config.json").read_text("utf-8"))
        settings = validated(OmegaConf.create(config), TuneSettings)
        assert isinstance(settings, TuneSettings)
        evaluation = domain.evaluation(settings.evaluation, settings.data, "report")
        assert isinstance(evaluation, DatasetEvaluation)
        self._evaluation = evaluation
        self._execution = domain.execution(settings.model)
        runner = Runner(domain.absolute(settings.model.path), self._execution)
        self._reference = self._outputs(runner)
        self.float_parts = self._parts(self._reference)

    def parts(self, model: Path) -> Parts:
        """Numerators and denominators of the metric, float64 [samples] each."""
        return self._parts(self._outputs(Runner(model, self._execution)))

    def _outputs(self, runner: Runner) -> list[Outputs]:
        evaluation = self._evaluation
        found = batches(evaluation.source, runner.inputs, evaluation.batch)
        self._batches = list(found)
        return [runner.run(batch.feeds) for batch in self._batches]

    def _parts(self, outputs: list[Outputs]) -> Parts:
        evaluation = self._evaluation
        found = find_metric(evaluation.metric).make(token_input=evaluation.token_input)
        for batch, made, expected in zip(self._batches, outputs, self._reference, strict=True):
            found.update(made, batch.feeds, batch.labels, expected)
        return found.parts()

#!/usr/bin/env python3
"""Search strategies side by side on real models, with equal numbers of trials.

    scripts/compare_strategies.py --assets FOLDER [NAME ...] [--trials N] [--json FILE]

Every row is one ``qdist tune`` as a user would type it, printed before it runs; all of a model
share one calibration. The search sees half of the evaluation samples; beside the score on these
stands that on the other half, on which nothing was chosen. Names are those of score_models.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from score_models import MODELS

STRATEGIES: dict[str, tuple[str, ...]] = {
    "pareto": ("search=pareto",),
    "greedy": ("search=greedy",),
    **{
        f"icraft {priority}": (
            "search=icraft",
            "search.precisions=[bf16,fp16,tf32]",
            "search.options={chip: zhuge, priority: " + priority + ", cos_targetvalue: 0.99999}",
        )
        for priority in ("accuracy", "tradeoff", "performance")
    },
    "slimai": (
        "search=smart_search",
        "search.precisions=[int16]",
        "search.granularities=[tensor]",
        "search.options={accuracy_level: '0,1,2', range: '97:99'}",
    ),
    "knight": ("search=knight", "search.options={modes: [all], iterations: [1,5], batch_size: 10}"),
    "optuna": ("search=optuna",),
}
"""What is shown -> the words of the command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One search. ``n_to_best``: trials up to and with the one that was kept. ``seconds``: of the
    whole command, start-up included."""

    model: str
    strategy: str
    metric: str
    float_score: float
    seen: float
    unseen: float
    n_bytes: int
    n_trials: int
    n_to_best: int
    seconds: float


def main() -> int:
    """Run all searches; exit status of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--assets", type=Path, required=True, help="folder of models and data")
    parser.add_argument("--trials", type=int, default=12, help="of each search (default 12)")
    parser.add_argument(
        "--strategy", action="append", choices=list(STRATEGIES), help="this one; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="qdist-strategies-") as folder:
        for name in options.names or MODELS:
            for strategy in options.strategy or STRATEGIES:
                place = Path(folder) / strategy.replace(" ", "-")
                begin = time.perf_counter()
                status = _tune(name, strategy, options, place, Path(folder))
                if status:
                    return status
                seconds = time.perf_counter() - begin
                rows.append(_row(name, strategy, place / name, seconds))
                print(_line(rows[-1]), file=sys.stderr, flush=True)
            if options.json is not None:
                text = json.dumps([asdict(row) for row in rows], indent=2)
                options.json.write_text(text + "\n", encoding="utf-8")
    print("| model | strategy | seen | unseen (float) | bytes | trials (to the best) | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(_line(row))
    return 0


def _tune(name: str, strategy: str, options: argparse.Namespace, place: Path, folder: Path) -> int:
    case = MODELS[name]
    words = [
        f"model.path={case.model}",
        f"model.name={name}",
        *case.data,
        f"evaluation={case.evaluation}",
        "evaluation.search_share=0.5",
        *STRATEGIES[strategy],
        f"search.max_trials={options.trials}",
    ]
    print(f"$ qdist tune {shlex.join(words)}", file=sys.stderr, flush=True)
    filled = [word.replace("{assets}", str(options.assets.absolute())) for word in words]
    own = [f"output.root={place}", f"store.path={folder / name}.zarr", "tracking=none"]
    return subprocess.run(
        [sys.executable, "-m", "qdist.cli", "tune", *filled, *own],
        check=False,
        stdout=subprocess.DEVNULL,
    ).returncode


def _row(name: str, strategy: str, place: Path, seconds: float) -> Row:
    def read(path: Path) -> dict[str, object]:
        return dict(json.loads(path.read_text(encoding="utf-8")))

    unseen, best = read(place / "unseen.json"), read(place / "trials" / "best.json")
    n_trials = len(list((place / "trials").glob("trial-*")))
    report, after, before = best["report"], unseen["quantized"], unseen["float"]
    assert isinstance(report, dict)
    assert isinstance(after, dict)
    assert isinstance(before, dict)
    return Row(
        model=name,
        strategy=strategy,
        metric=str(after["metric"]),
        float_score=float(before["score"]),
        seen=float(report["score"]),
        unseen=float(after["score"]),
        n_bytes=int(str(best["n_bytes"])),
        n_trials=n_trials,
        n_to_best=int(str(best["number"])) + 1,
        seconds=seconds,
    )


def _line(row: Row) -> str:
    return (
        f"| {row.model} | {row.strategy} | {row.seen:.4f} "
        f"| {row.unseen:.4f} ({row.float_score:.4f}) "
        f"| {row.n_bytes:,} | {row.n_trials} ({row.n_to_best}) | {row.seconds:.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Search strategies side by side on real models: score, cost, trials and time.

    scripts/compare_strategies.py --assets FOLDER [NAME ...] [--trials N] [--json FOLDER]

Every search is one ``qdist tune`` as a user would type it, printed before it runs; all of a model
share one calibration. The search sees half of the evaluation samples; what is reported is measured
on the other half, on which nothing was chosen. What is in the folder of ``--json``, one file a
model, is not run again, so that a comparison that was stopped goes on, and models can be run beside
each other. docs/strategies.md reads the tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from compare_strategies_runs import CONTENDERS, FIFTHS, Search, Unseen, place_of, run_search
from compare_strategies_table import FLOAT, ModelRuns, markdown, reported

from qdist.evaluate.metrics.batch import Parts
from qdist.files import make_folder, write_json


class Book:
    """The searches and unseen scores of a model so far, in a file where there is one."""

    def __init__(self, model: str, path: Path | None, about: dict[str, Any]) -> None:
        """``about``: what all searches share. Raises SystemExit for a file with other settings."""
        self._path = path
        self._about = about
        self._searches: dict[str, Search] = {}
        self._unseen: dict[str, Parts] = {}
        self.runs = ModelRuns(name=model, searches=self._searches, unseen=self._unseen)
        if path is None or not path.exists():
            return
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["about"] != about:
            raise SystemExit(f"{path} has searches with {held['about']}, not {about}")
        for search in map(Search.from_json, held["searches"]):
            self._searches[search.name] = search
        for plan, parts in held["unseen"].items():
            self._unseen[plan] = _arrays(parts)

    def keep(self, search: Search) -> None:
        """Add a search, or put it in the place of the same one."""
        self._searches[search.name] = search
        self._save()

    def keep_unseen(self, plan: str, parts: Parts) -> None:
        """Add a plan's score on the samples that no search saw."""
        self._unseen[plan] = parts
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        about = {
            "about": self._about,
            "searches": [search.to_json() for search in self._searches.values()],
            "unseen": {
                plan: [part.tolist() for part in parts] for plan, parts in self._unseen.items()
            },
        }
        write_json(self._path, about)


def main() -> int:
    """Run what is missing and print the tables; exit status of the first command that fails, else
    0."""
    options = _options()
    about = {"trials": options.trials, "sensitivity_samples": options.sensitivity_samples}
    found: list[ModelRuns] = []
    with tempfile.TemporaryDirectory(prefix="qdist-strategies-") as temporary:
        folder = Path(temporary) if options.folder is None else options.folder.absolute()
        for model in options.names:
            path = None if options.json is None else make_folder(options.json) / f"{model}.json"
            book = Book(model, path, about)
            try:
                _complete(book, folder, options)
            except subprocess.CalledProcessError as error:
                return error.returncode
            found.append(book.runs)
    print(markdown(found))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIFTHS)}")
    parser.add_argument("--assets", type=Path, required=True, help="folder of models and data")
    parser.add_argument("--trials", type=int, default=12, help="of each search (default 12)")
    parser.add_argument(
        "--sensitivity-samples", type=int, default=16, help="to measure layers on (default 16)"
    )
    parser.add_argument(
        "--strategy", action="append", choices=list(CONTENDERS), help="this one; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="folder to keep searches and scores in")
    parser.add_argument("--folder", type=Path, help="keep the searches' own files here")
    options = parser.parse_args()
    options.names = options.names or list(FIFTHS)
    unknown = [name for name in options.names if name not in FIFTHS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(FIFTHS)}")
    return options


def _complete(book: Book, folder: Path, options: argparse.Namespace) -> None:
    """Run the searches of a model that are missing, and score what the tables report."""
    runs = book.runs

    def run(name: str) -> None:
        search = run_search(
            runs.name, name, options.assets, folder, options.trials, options.sensitivity_samples
        )
        book.keep(search)
        print(f"{runs.name}, {name}: {search.seconds:.0f} s", file=sys.stderr, flush=True)

    for name in options.strategy or CONTENDERS:
        if name not in runs.searches:
            run(name)
    unseen: Unseen | None = None
    for plan, search in reported(runs).items():
        if plan in runs.unseen:
            continue
        place = place_of(folder, runs.name, search.name)
        if not place.exists():
            # The scores came without the models that they are of.
            run(search.name)
        unseen = unseen or Unseen(place)
        book.keep_unseen(FLOAT, unseen.float_parts)
        number = next(entry.number for entry in search.tried if entry.plan == plan)
        artifact = place / "trials" / f"trial-{number:03d}" / "model.onnx"
        book.keep_unseen(plan, unseen.parts(artifact))


def _arrays(parts: list[list[float]]) -> Parts:
    numerators, denominators = (np.array(part, np.float64) for part in parts)
    return numerators, denominators


if __name__ == "__main__":
    sys.exit(main())

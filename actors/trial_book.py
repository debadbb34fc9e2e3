"""What a search has found so far, on disk: whatever is killed, the same search goes on from it.

trials/search.json     what makes it this search: model, statistics, target, evaluation, data
trials/journal.jsonl   a line for every set of choices that was tried: its key, its plan
trials/plans/DIGEST/   plan, artifact and result of every plan, whoever asked for it
trials/trial-NNN/      the trial's own: plan and artifact (links to the above), and trial.json
trials/best.json       the best trial so far
trials/statistics/     what candidates with statistics of their own have their ranges from
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from actors.plan_folder import PlanFolder, drop_artifact
from qdist.digest import digest_json
from qdist.files import make_folder, unwritable, write_json
from qdist.search.results import PlanResult
from qdist.search.trial import EVALUATION, Trial

_SEARCH = "search.json"
_JOURNAL = "journal.jsonl"
BEST = "best.json"
TRIAL = "trial.json"


class TrialBook:
    """The folder of a search, owned by its driver. Make one with `open_book`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans = folder / "plans"
        self.statistics = folder / "statistics"
        self.session = uuid.uuid4().hex
        self._by_key: dict[str, str] = {}
        self._by_digest: dict[str, PlanResult] = {}
        self._digest_of: dict[int, str] = {}
        self._best_rank: tuple[float, ...] | None = None
        self.n_known = 0
        """How many sets of choices earlier runs of this search have tried."""

    def plan_folder(self, digest: str) -> PlanFolder:
        """Where the files of a plan are."""
        return PlanFolder(path=self.plans / digest[:32], session=self.session)

    def by_key(self, key: str) -> PlanResult | None:
        """What is known of these choices."""
        return self._by_digest.get(self._by_key.get(key, ""))

    def by_digest(self, digest: str) -> PlanResult | None:
        """What is known of this plan."""
        return self._by_digest.get(digest)

    def add(self, key: str, result: PlanResult) -> None:
        """Remember a result that a worker has already written; its line goes into the journal.
        One without a plan is not kept: whether a target takes it costs nothing to find out."""
        if not result.digest:
            return
        self._by_digest[result.digest] = result
        if self._by_key.get(key) == result.digest:
            return
        self._by_key[key] = result.digest
        self._append({"key": key, "digest": result.digest})

    def finish(self, trial: Trial, digest: str, costs: Mapping[str, float] | None = None) -> None:
        """Give a finished trial its folder, and note it if it is the best so far. ``costs``: of its
        plan, by name. Raises QD603."""
        place = make_folder(trial_folder(self.folder, trial.candidate.number))
        self._digest_of[trial.candidate.number] = digest
        if digest:
            self.plan_folder(digest).link_into(place)
        shown = trial_json(trial, digest, costs or {})
        write_json(place / TRIAL, shown)
        if trial.report is not None and (self._best_rank is None or trial.rank > self._best_rank):
            self._best_rank = trial.rank
            write_json(self.folder / BEST, shown)

    def prune(self, kept: Collection[int]) -> None:
        """Let go of the artifacts of all trials but ``kept`` (their numbers), of plans that were
        run ahead too. Plans and results stay: no plan is scored again, and an artifact can be
        written again from its plan. Raises QD603."""
        wanted = {self._digest_of.get(number, "")[:32] for number in kept}
        for folder in self.plans.iterdir():
            if folder.name not in wanted:
                drop_artifact(folder)
        for number in self._digest_of:
            if number not in kept:
                drop_artifact(trial_folder(self.folder, number))

    def _append(self, line: Mapping[str, Any]) -> None:
        path = self.folder / _JOURNAL
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(path, error, "a file that this user can write") from error

    def read(self) -> None:
        """Take in what earlier runs have left, and clear away what belongs to them alone."""
        for claim in self.plans.glob("*/claim"):
            claim.unlink(missing_ok=True)
        journal = self.folder / _JOURNAL
        if journal.exists() and journal.read_bytes()[-1:] not in (b"", b"\n"):
            # A line that was cut off must not spoil the next one.
            with journal.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in _lines(journal):
            result = self.plan_folder(line["digest"]).result()
            if result is not None and result.digest == line["digest"]:
                self._by_key[line["key"]] = result.digest
                self._by_digest[result.digest] = result
        self.n_known = len(self._by_key)
        # Trials get their folders again as the strategy asks for them.
        for old in self.folder.glob("trial-*"):
            shutil.rmtree(old, ignore_errors=True)


def open_book(folder: Path, identity: Mapping[str, Any]) -> TrialBook:
    """The book of the search in ``folder``: the one there, where it is of the same ``identity``
    (JSON); an older one is kept under another name, trials-1, trials-2, ... Raises QD603."""
    known = _stored(folder / _SEARCH)
    if folder.exists() and (known is None or digest_json(known) != digest_json(dict(identity))):
        _set_aside(folder)
    make_folder(folder / "plans")
    write_json(folder / _SEARCH, dict(identity))
    book = TrialBook(folder)
    book.read()
    return book


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial's files are."""
    return folder / f"trial-{number:03d}"


def trial_json(trial: Trial, digest: str, costs: Mapping[str, float]) -> dict[str, Any]:
    """A trial as JSON: where it comes from, what it changes and costs, how its evaluation went
    (None where it did not get so far), and what that gave."""
    candidate, evaluation = trial.candidate, trial.evaluation
    changed = {name: candidate.choices[name].to_json() for name in candidate.changed}
    return {
        "number": candidate.number,
        "round": candidate.round,
        "label": candidate.label,
        "predicted": candidate.predicted,
        "changed": changed,
        "plan": digest,
        "n_bytes": trial.n_bytes,
        "costs": dict(costs),
        "reason": trial.reason,
        "evaluation": None if evaluation is None else evaluation.to_json(),
        "report": None if trial.report is None else trial.report.to_json(),
        "details": {name: value for name, value in trial.details.items() if name != EVALUATION},
    }


def _stored(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def _lines(path: Path) -> list[dict[str, str]]:
    """The whole lines; of one that was cut off by a kill there is nothing to be had."""
    found: list[dict[str, str]] = []
    if not path.exists():
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            found.append({"key": str(line["key"]), "digest": str(line["digest"])})
        except (KeyError, TypeError, ValueError):
            continue
    return found


def _set_aside(folder: Path) -> None:
    n = 1
    while (old := folder.with_name(f"{folder.name}-{n}")).exists():
        n += 1
    folder.rename(old)

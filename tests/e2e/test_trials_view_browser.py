"""The saved view of trials, opened in the page of a real MLflow server."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from qdist.cli.commands.trial_models import TrialModels
from qdist.cli.commands.tune_log import TrialLog
from qdist.cli.tracking import open_tracker
from qdist.cli.tracking.trials_view import KEY, NAME
from qdist.evaluate.report import EvalReport
from qdist.search.trial import Candidate, Trial
from tests.e2e.mlflow_server import mlflow_server
from tests.e2e.test_front_browser import ARGUMENTS, CHROMIUM
from tests.e2e.tracked import client_for, spec

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is not installed"),
]


def trial(number: int, score: float) -> Trial:
    report = EvalReport(
        score=score,
        metric="top1",
        higher_is_better=True,
        metrics={"top1": score},
        n_samples=5,
        seconds=1.0,
    )
    candidate = Candidate(number=number, label=f"plan {number}", choices={})
    return Trial(candidate=candidate, report=report, n_bytes=1000)


def test_trials_stand_side_by_side_with_their_numbers(tmp_path: Path) -> None:
    with mlflow_server(tmp_path / "server") as server:
        with open_tracker(spec(server.url), spool_folder=tmp_path) as tracker:
            parent = tracker.start_run("search", command="tune", config={})
            with TrialLog(parent, TrialModels(folder=tmp_path / "trials"), "net", "none") as log:
                for number, score in enumerate((0.5, 0.75)):
                    log.add(trial(number, score))
        experiment = client_for(server.url).get_experiment_by_name("digits").experiment_id
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
            try:
                page = browser.new_page(viewport={"width": 1900, "height": 900})
                page.set_default_timeout(60_000)
                page.goto(f"{server.url}/#/experiments/{experiment}/runs?viewStateShareKey={KEY}")
                best, plain = (page.get_by_text(f"trial-00{i} plan {i}").first for i in (1, 0))
                for found in (best, plain):
                    found.wait_for()
                above, below = best.bounding_box(), plain.bounding_box()
                assert above is not None
                assert below is not None
                assert above["y"] < below["y"], "the highest score comes first"
                for column in ("score", "artifact_mb"):
                    assert page.get_by_role("columnheader", name=column).count() >= 1
                assert page.get_by_text("0.75", exact=True).count() >= 1
                assert page.get_by_role("button", name=NAME).count() >= 1
                assert page.get_by_text("could not be opened").count() == 0
            finally:
                browser.close()

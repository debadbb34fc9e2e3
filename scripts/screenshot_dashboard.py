"""Photograph a search's trials in MLflow: parallel coordinates, table of runs, chart of the front.

Opens the dashboard that a user would open: a real ``mlflow server`` over the SQLite database
(or the server at an http URI), in headless Chromium::

    python scripts/screenshot_dashboard.py --tracking-uri sqlite:///mlruns/mlflow.db \
        --experiment digits --out docs/trials.png --metrics size_bytes,score

``--view parallel`` (the default): each line is one child run of the newest parent run that has
children; the last metric gives the colour. ``--view trials``: the experiment's saved view of
trials, as a table. ``--view front``: the chart among the parent run's files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mlflow_serving import found_at
from playwright.sync_api import Page, sync_playwright

from qdist.cli.tracking.trials_view import KEY

RENDER_TIMEOUT_MS = 60_000
N_AXES = 4
VIEWS = ("parallel", "trials", "front")
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# The assistant's panel opens by itself on the first visit and covers a quarter of the page.
CLOSE_ASSISTANT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One child run: its id, its parameters and the last value of each metric."""

    run_id: str
    params: dict[str, str]
    metrics: dict[str, float]


def main() -> None:
    """Read the command line, find the trials, and write the picture."""
    arguments = _arguments()
    with found_at(arguments.tracking_uri) as url:
        experiment_id, parent, trials = _trials(url, arguments.experiment, arguments.parent)
        size = (arguments.width, arguments.height)
        if arguments.view != "parallel":
            _photograph_page(url, experiment_id, parent, arguments.view, arguments.out, size)
            print(f"{arguments.out}: {len(trials)} trials")
            return
        params = arguments.params or _varying([trial.params for trial in trials])[:N_AXES]
        metrics = arguments.metrics or _default_metrics(trials)
        _check("param", params, [set(trial.params) for trial in trials])
        _check("metric", metrics, [set(trial.metrics) for trial in trials])
        page = f"{url}/#/compare-runs?runs={_query([trial.run_id for trial in trials])}"
        page += f"&experiments={_query([experiment_id])}"
        _photograph(page, params, metrics, arguments.out, size)
    print(f"{arguments.out}: {len(trials)} trials, {', '.join([*params, *metrics])}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tracking-uri", required=True, help="sqlite:///PATH or http(s)://SERVER")
    parser.add_argument("--experiment", required=True, help="name of the experiment")
    parser.add_argument("--out", required=True, type=Path, help="the PNG to write")
    parser.add_argument("--view", choices=VIEWS, default=VIEWS[0])
    parser.add_argument("--parent", help="id of the parent run (default: newest with children)")
    parser.add_argument(
        "--params", type=_names, help="axes, comma-separated (default: those that vary, up to 4)"
    )
    parser.add_argument(
        "--metrics", type=_names, help="axes; the last one colours (default: up to 2, then score)"
    )
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--height", type=int, default=1000)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _query(values: Sequence[str]) -> str:
    return quote(json.dumps(list(values)))


def _varying(values: Sequence[dict[str, str]]) -> list[str]:
    """Keys that every run has and that are not the same everywhere: axes worth drawing."""
    shared = sorted(set.intersection(*(set(each) for each in values)))
    return [key for key in shared if len({each[key] for each in values}) > 1]


def _check(what: str, names: Sequence[str], known: Sequence[set[str]]) -> None:
    """Refuse axes that some trial has no value for; the page would wait for them in vain."""
    shared = set.intersection(*known)
    unknown = [name for name in names if name not in shared]
    if unknown:
        raise SystemExit(f"no {what} {unknown} in every trial; there are: {sorted(shared)}")


def _default_metrics(trials: Sequence[Trial]) -> list[str]:
    texts = [{key: repr(value) for key, value in trial.metrics.items()} for trial in trials]
    others = [key for key in _varying(texts) if key != "score"]
    has_score = all("score" in trial.metrics for trial in trials)
    return [*others[:2], "score"] if has_score else others[:3]


def _trials(url: str, experiment: str, parent: str | None) -> tuple[str, str, list[Trial]]:
    """The ids of the experiment and of ``parent`` (default: the newest run that has children), and
    its children."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=url)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise SystemExit(f"no experiment {experiment!r} at {url}")
    runs = client.search_runs(
        [found.experiment_id], order_by=["attributes.start_time DESC"], max_results=1000
    )
    parents = [run.data.tags.get("mlflow.parentRunId") for run in runs]
    chosen = parent or next((each for each in parents if each), None)
    children = [run for run, each in zip(runs, parents, strict=True) if each and each == chosen]
    trials = [
        Trial(run_id=run.info.run_id, params=run.data.params, metrics=run.data.metrics)
        for run in children
        if run.data.metrics  # a failed trial has no place on the score's axis
    ]
    if not trials:
        raise SystemExit(f"experiment {experiment!r} has no child runs with metrics to compare")
    return str(found.experiment_id), str(chosen), trials


def _photograph(
    url: str, params: Sequence[str], metrics: Sequence[str], out: Path, size: tuple[int, int]
) -> None:
    """Open ``url``, choose the axes, and write the page as a PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.set_default_timeout(RENDER_TIMEOUT_MS)
            page.add_init_script(CLOSE_ASSISTANT)
            page.goto(url)
            page.wait_for_selector(".parcoords-line-layers, .js-plotly-plot .parcoords")
            page.get_by_role("button", name="Clear All").click()
            for place, names in enumerate((params, metrics)):
                _choose(page, place, names)
            _wait_for_axes(page, [*params, *metrics])
            page.mouse.move(0, 0)
            page.wait_for_timeout(1500)  # the lines fade in after the axes
            out.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(out))
        finally:
            browser.close()


def _photograph_page(
    url: str, experiment: str, parent: str, view: str, out: Path, size: tuple[int, int]
) -> None:
    """Write the table of trials, or the chart of the front, as a PNG."""
    place = f"{url}/#/experiments/{experiment}/runs"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.set_default_timeout(RENDER_TIMEOUT_MS)
            page.add_init_script(CLOSE_ASSISTANT)
            if view == "trials":
                page.goto(f"{place}?viewStateShareKey={KEY}")
                page.get_by_text("matching runs").wait_for()
                page.get_by_text("trial-000").first.wait_for()
            else:
                page.goto(f"{place}/{parent}/artifacts/front.html")
                page.frame_locator("iframe").locator("circle.best").hover()
                # Where the photographed files lie on this machine is nobody's business.
                page.get_by_text("Path: ").first.evaluate("e => { e.style.visibility = 'hidden'; }")
            page.wait_for_timeout(1500)  # rows and fonts come in after the first of them
            out.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(out))
        finally:
            browser.close()


def _choose(page: Page, place: int, names: Sequence[str]) -> None:
    """Pick ``names`` in the ``place``-th drop-down list (0: parameters, 1: metrics)."""
    box = page.locator("input[role=combobox]").nth(place)
    box.locator("xpath=ancestor::div[contains(@class, 'select-selector')]").click()
    for name in names:
        box.fill(name)  # the list is virtual: options out of sight do not exist
        page.locator(f'div[class*="item-option"][title={json.dumps(name)}]').click()
    page.keyboard.press("Escape")


def _wait_for_axes(page: Page, names: Sequence[str]) -> None:
    """Until the plot shows as many axes as were chosen (long titles are shortened there)."""
    page.wait_for_function(
        """(names) => {
            const shown = [...document.querySelectorAll(".parcoords .axis-title")]
                .map((title) => title.textContent.trim());
            return names.length === shown.length;
        }""",
        arg=list(names),
    )


if __name__ == "__main__":
    main()

"""The chart of the front in a browser, opened from a file without network."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from qdist.evaluate.report import EvalReport
from qdist.report.front_page import write_front_page
from qdist.report.values import TrialRow

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ATTACK = "</script><script>window.hurt = true</script>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is not installed"),
]


def row(number: int, score: float | None, n_bytes: int) -> TrialRow:
    return TrialRow(
        number=number,
        label=f"plan {number} {ATTACK}",
        score=score,
        metrics={} if score is None else {"top1": score, "sqnr_db": float("inf")},
        n_bytes=n_bytes,
        counts={"int8": 3},
        changed=("a",),
        status="failed" if score is None else "ok",
        reason="" if score is not None else "it failed",
        seconds=1.0,
        is_best=number == 2,
        is_baseline=number == 0,
    )


def test_the_chart_is_drawn_and_answers(tmp_path: Path) -> None:
    best = EvalReport(
        score=0.99,
        metric="top1",
        higher_is_better=True,
        metrics={"top1": 0.99},
        n_samples=5,
        seconds=1.0,
    )
    rows = [row(0, 0.95, 2_000_000), row(1, None, 0), row(2, 0.99, 3_000_000), row(3, 0.9, 2500000)]
    page_path = write_front_page(tmp_path / "front.html", rows, {0, 2}, best, 0.992)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        try:
            page = browser.new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(page_path.as_uri())
            assert page.locator("circle").count() == 3
            assert page.locator("circle.on").count() == 1
            assert page.locator("circle.best").count() == 1
            assert "float model" in (page.locator("#chart").text_content() or "")
            page.locator('circle[data-trial="2"]').focus()
            assert "plan 2" in page.locator("#about").inner_text()
            assert "(the best)" in page.locator("#about").inner_text()
            page.select_option("#x", "trial")
            assert page.locator("#chart text", has_text="trial").count() == 1
            page.check("#only")
            assert page.locator("circle").count() == 2
            assert page.evaluate("window.hurt") is None
            assert errors == []
        finally:
            browser.close()

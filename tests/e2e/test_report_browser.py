"""The report in a browser: opened from a file, without network, with real layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import qdist.demo
from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.evaluate.compare import LayerComparison, compare_layers
from qdist.model.freeze import freeze
from qdist.model.loading import load_model
from qdist.report.page import write_page
from qdist.report.values import Summary, TrialRow
from tests.onnx_models import EXECUTION, planner_for, projected

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ATTACK = "<script>window.hurt = true</script><img src=x onerror='window.hurt = true'>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is not installed"),
]


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerComparison, ...]:
    """The demo's vision transformer, quantized to int8, beside its float self."""
    folder = Path(qdist.demo.__file__).parent
    source = ArraySource(
        path=folder / "digits.npz",
        inputs={"images": "calibration_images"},
        limit=16,
        preprocess=Preprocess(scale=1 / 16, mean=(0.3,), std=(0.37,)),
    )
    frozen = freeze(load_model(folder / "digits_vit.onnx"))
    planner = planner_for(frozen, source, tmp_path_factory.mktemp("store"))
    return compare_layers(frozen, projected(planner), source, EXECUTION)


@pytest.fixture(scope="module")
def report(layers: tuple[LayerComparison, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page over these layers, one of which has a hostile name and no error at all."""
    exact = replace(layers[-1].in_place, sqnr_db=math.inf, relative_l2=0.0)
    rows = (*layers, replace(layers[-1], name=ATTACK, in_place=exact))
    summary = Summary(
        title=f"digits_vit {ATTACK}",
        model="digits_vit",
        float_score=0.985,
        quantized_score=0.9833,
        metric="top1",
        higher_is_better=True,
        n_samples=600,
        float_bytes=566_082,
        quantized_bytes=230_415,
        precision_counts={"int8": len(layers)},
        coverage="26 of 26 matmul- and conv-like layers, 81 activations",
        beside={"agreement": 0.995, "sqnr_db": 24.3, "cosine": 0.9981},
        worst_layers=layers[:3],
        places=(("plan", f"/runs/{ATTACK}/plan.json"),),
        notes=(ATTACK,),
        seconds=12.0,
    )
    trials = [
        _trial(0, 0.98, 240_000),
        _trial(1, None, 0),
        _trial(2, 0.99, 100_000),
        _trial(10, 0.97, 1_000_000),
    ]
    return write_page(tmp_path_factory.mktemp("page") / "report.html", summary, rows, trials)


def _trial(number: int, score: float | None, n_bytes: int) -> TrialRow:
    return TrialRow(
        number=number,
        label=f"{ATTACK} {number}",
        score=score,
        metrics={},
        n_bytes=n_bytes,
        counts={"int8": 73},
        changed=(ATTACK,),
        status="ok" if score is not None else "failed",
        reason="" if score is not None else ATTACK,
        seconds=1.0,
        is_best=number == 2,
        is_baseline=number == 0,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The opened report. What the console or the network saw fails the test at its end."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    seen: list[str] = []
    page.on("console", lambda message: seen.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on("request", lambda request: seen.append(f"request: {request.url}"))
    page.goto(report.as_uri())
    yield page
    page.close()
    allowed = (f"request: {report.as_uri()}", "request: data:")
    assert [line for line in seen if not line.startswith(allowed)] == []


def column(page: Page, table: str, index: int) -> list[str]:
    cells = page.locator(f"#{table} tbody tr:visible td:nth-child({index})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_shows_every_layer_worst_first(page: Page, layers: tuple[LayerComparison, ...]) -> None:
    assert column(page, "layer-table", 1) == [*(row.name for row in layers), ATTACK]
    drawn = page.locator("#layer-chart g.row")
    assert drawn.count() == min(30, len(layers) + 1)
    assert layers[0].name in drawn.first.locator("title").inner_html()


def test_sorts_by_number_in_both_directions(page: Page) -> None:
    before = column(page, "layer-table", 4)
    assert before[-1] == "exact"
    head = page.get_by_role("button", name="SQNR in place")
    head.click()
    assert column(page, "layer-table", 4) == before[::-1]
    assert head.locator("..").get_attribute("aria-sort") == "descending"
    head.click()
    assert column(page, "layer-table", 4) == before
    page.get_by_role("button", name="cosine").click()
    cosines = [float(cell) for cell in column(page, "layer-table", 5)]
    assert cosines == sorted(cosines)
    assert head.locator("..").get_attribute("aria-sort") == "none"


def test_sorts_by_name(page: Page) -> None:
    page.get_by_role("button", name="layer", exact=True).click()
    names = column(page, "layer-table", 1)
    blocks = [name for name in names if name.startswith("/blocks.")]
    assert len(blocks) > 10
    assert [name[8] for name in blocks] == sorted(name[8] for name in blocks)


def test_sorts_trials_with_missing_scores_last(page: Page) -> None:
    assert column(page, "trial-table", 1) == ["0", "1", "2", "10"]
    head = page.locator("#trial-table").get_by_role("button", name="score")
    head.click()
    assert column(page, "trial-table", 1) == ["10", "0", "2", "1"]
    head.click()
    assert column(page, "trial-table", 1) == ["2", "0", "10", "1"]
    page.locator("#trial-table").get_by_role("button", name="size").click()
    assert column(page, "trial-table", 1) == ["2", "0", "10", "1"]


def test_sorts_by_keyboard(page: Page) -> None:
    head = page.locator("#trial-table").get_by_role("button", name="trial")
    head.focus()
    page.keyboard.press("Enter")
    assert column(page, "trial-table", 1) == ["10", "2", "1", "0"]


def test_filters_layers(page: Page, layers: tuple[LayerComparison, ...]) -> None:
    page.get_by_label("Filter layers").fill("mlp matmul")
    wanted = [row.name for row in layers if "/mlp/" in row.name and row.op_type == "MatMul"]
    assert column(page, "layer-table", 1) == wanted
    page.get_by_label("Filter layers").fill("")
    assert len(column(page, "layer-table", 1)) == len(layers) + 1


def test_names_are_text(page: Page) -> None:
    assert page.evaluate("window.hurt") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert ATTACK in page.locator("h1").inner_text()


@pytest.mark.parametrize("width", [360, 1280])
def test_fits_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    for selector in (
        "h1",
        ".kicker",
        "p.lead",
        ".card .value",
        ".badge",
        "td.name",
        "thead button",
    ):
        ratio = page.locator(selector).first.evaluate(_CONTRAST)
        assert ratio >= 4.5, f"{selector}: {ratio:.2f}"


_CONTRAST = """element => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  let ground = element;
  const seen = node => parts(getComputedStyle(node).backgroundColor);
  while (ground.parentElement && seen(ground)[3] === 0) ground = ground.parentElement;
  const [a, b] = [light(parts(getComputedStyle(element).color)), light(seen(ground))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""

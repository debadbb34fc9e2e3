"""``qdist quantize --template`` in every form, as a user has it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from actors.session import RaySession
from qdist.demo import demo_file
from qdist.plan.dialects.forms import TEMPLATES
from qdist.plan.plan import QuantizationPlan, load_plan
from tests.command_line import check_error, here, succeed

STORE = "store.path=calibration.zarr"
MODEL = ("model=digits_cnn", "tracking=none", STORE)
SETTINGS = {"icraft": ("quantization.saturation=max", "quantization.symmetric=true")}


@pytest.fixture(scope="module")
def home(cluster: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed("calibrate", *MODEL, "data=digits")
    return folder


def numbers(plan: QuantizationPlan) -> list[object]:
    return [
        (layer.name, entry.tensor, entry.quantizer.key)
        for layer in plan.layers
        for entry in (*layer.activations, *layer.weights)
    ]


@pytest.mark.parametrize("form", sorted(TEMPLATES))
def test_a_template_is_written_and_read_back(
    form: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    settings = SETTINGS.get(form.split("_")[0], ("quantization.saturation=kl",))
    said = succeed("quantize", *MODEL, *settings, "--template", form, f"output.root={form}")
    line = next(line for line in said.splitlines() if line.startswith("when edited: "))
    path = Path(line.split("quantization.rules_file=")[1])
    assert path.suffix in TEMPLATES[form].suffix
    plans = []
    for name, rules in (("plain", ()), ("read", (f"quantization.rules_file={path}",))):
        succeed("quantize", *MODEL, *settings, *rules, f"output.root={form}-{name}")
        plans.append(load_plan(Path(f"{form}-{name}/digits_cnn/plan.json")))
    assert numbers(plans[0]) == numbers(plans[1])


def test_a_template_goes_into_a_networks_own_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    node = next(
        node.name
        for node in onnx.load(demo_file("digits_cnn.onnx")).graph.node
        if node.op_type == "Conv"
    )
    network = Path("net.prototxt")
    text = f"# mine\nlayer {{\n  name: {json.dumps(node)}  # {{\n  kept: 1\n}}\n"
    network.write_text(text)
    words = (*MODEL, "quantization.saturation=max", "--template", "sophgo", "output.root=into")
    said = succeed("quantize", *words, f"template_into={network}")
    assert "layers of the model are not in it" in said
    assert network.read_text() == text
    written = next(Path("into/digits_cnn").glob("*.prototxt")).read_text()
    assert written == text.replace("kept: 1\n", "kept: 1\n  th_strategy: USE_MAX\n")
    check_error(here("quantize", *words, "template_into=none.prototxt"), "QD508", "none.prototxt")
    knight = [word.replace("sophgo", "knight") for word in words]
    check_error(
        here("quantize", *knight, f"template_into={network}"), "QD508", "written as a whole"
    )
    check_error(here("quantize", *MODEL, f"template_into={network}"), "QD105", "template_into")

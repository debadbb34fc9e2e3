"""Rules of the configuration, vendors' files and pickers together, as commands apply them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from qdist.cli import schema
from qdist.cli.commands import steps
from qdist.cli.commands.mixing import check_data, mix_of, mixed
from qdist.cli.commands.quantize import _keep_edits
from qdist.cli.compose import spelled_out
from qdist.cli.context import Context
from qdist.errors import ArtifactError, ConfigError, PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.knight import template
from qdist.plan.dialects.knight_rules import violations
from qdist.plan.dialects.reading import Before
from qdist.plan.planner import Planner
from tests.onnx_models import ANY_TARGET, frozen_from, planner_for, samples_of
from tests.vendor_models import GOLDEN, block_model

NOBODY = cast(Context[Any], None)
"""Pickers that do not run the model have nothing to say."""


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    folder = tmp_path_factory.mktemp("steps")
    frozen = frozen_from(block_model(), folder / "block.onnx")
    return planner_for(frozen, samples_of("x", 3, 4, 4, n=8), folder / "store")


def config(**changes: Any) -> schema.QuantizationConfig:
    return schema.QuantizationConfig.model_validate(changes)


def test_files_come_first_then_options_then_rules(planner: Planner) -> None:
    settings = config(
        rules_file=[str(GOLDEN / "slimai_nodekind.yaml"), str(GOLDEN / "knight_mix.json")],
        fpfwd_outputs=["head"],
        layer_threshold=4.0,
        rules=[
            {"match": "left", "precision": "int8"},
            {"match": "prob", "precision": "int8"},
            {"match": "output:stem", "threshold": 2.0},
            {"match": "tensor:x", "bounds": [-1, 3]},
        ],
    )
    # By kind all convolutions have 16 bits, and the Knight file does not set this one back.
    with pytest.raises(PlanError, match=r"QD509.*knight_mix.json: got 8 bits for right and 16 for"):
        steps.make_choices(planner, settings)
    settings = settings.model_copy(update={"rules_file": str(GOLDEN / "slimai_nodekind.yaml")})
    found = steps.make_choices(planner, settings)
    assert {n: c.precision for n, c in found.choices.items() if c.precision != "int8"} == {
        **dict.fromkeys(["stem", "block/conv1", "block/conv2"], "int16"),
        **dict.fromkeys(["head", "bias"], "float32"),
    }
    plan = found.planner.plan(found.choices, found.why)
    layers = {layer.name: layer for layer in plan.layers}
    assert layers["stem"].why == "rule layer:stem (slimai_nodekind.yaml line 2)"
    assert layers["head"].why == "rule after:head (fpfwd_outputs)"
    assert layers["stem"].activations[0].quantizer.bounds == (-1.0, 3.0)
    assert layers["block/conv1"].activations[0].quantizer.bounds == (0.0, 2.0)
    assert layers["norm"].activations[0].quantizer.bounds == (-4.0, 4.0)


def test_bounds_are_two_numbers_of_a_tensor(planner: Planner) -> None:
    with pytest.raises(ConfigError, match=r"QD104.*quantization.rules: bounds"):
        steps.make_choices(planner, config(rules=[{"match": "tensor:x", "bounds": [1]}]))
    with pytest.raises(PlanError, match=r"QD507.*'bounds'"):
        steps.make_choices(planner, config(rules=[{"match": "stem", "bounds": [-1, 1]}]))


def test_a_template_is_a_key_in_other_words() -> None:
    assert spelled_out("quantize", ["a=1", "--template", "knight"]) == ["a=1", "template=knight"]
    assert spelled_out("quantize", ["--template=slimai"]) == ["template=slimai"]
    assert spelled_out("tune", ["--template", "knight"]) == ["--template", "knight"]
    with pytest.raises(ConfigError, match=r"QD105.*--template knight"):
        spelled_out("quantize", ["--template"])


def test_an_edited_template_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    assert _keep_edits(path, "new") == path
    assert _keep_edits(path, "new").read_text() == "new"
    path.write_text("edited")
    with pytest.raises(ArtifactError, match=r"QD603.*perhaps an edited template"):
        _keep_edits(path, "new")
    assert path.read_text() == "edited"


def mix(planner: Planner, rules: list[dict[str, Any]] | None = None, **settings: Any) -> Any:
    given = config(mix=settings, rules=rules or [], saturation="kl")
    chosen = steps.make_choices(planner, given)
    return mixed(NOBODY, chosen, given, ANY_TARGET, None)


def test_a_picker_raises_layers_that_no_rule_is_about(planner: Planner) -> None:
    found = mix(
        planner,
        [{"match": "stem", "saturation": "max"}],
        strategy="io_high",
        low_share=0.8,
        high_saturation="max",
    )
    assert found.choices["prob"] == LayerChoice(precision="int16", saturation="max")
    assert found.choices["stem"] == LayerChoice(saturation="max")
    assert found.why["prob"] == "io_high: near the outputs"
    assert found.notes[0] == "io_high raises 1 of 10 layers to int16"
    plan = found.planner.plan(found.choices)
    assert {layer.name: layer.why for layer in plan.layers}["prob"] == "io_high: near the outputs"


def test_a_pick_for_knight_passes_its_own_rules(planner: Planner) -> None:
    found = mix(planner, strategy="io_high", low_share=0.7, together="knight")
    index = planner.index
    bits = {
        x.name: 16 if found.choices[x.name].precision == "int16" else 8 for x in index.choosable
    }
    assert list(violations(index, bits)) == []
    assert '"bitwidth": 16' in template(Before(index=index, choices=found.choices))
    alone = mix(planner, strategy="io_high", low_share=0.7)
    assert sum(bits[n] == 16 for n in bits) > sum(
        c.precision == "int16" for c in alone.choices.values()
    )


def test_variance_needs_no_samples_and_cosine_does(planner: Planner) -> None:
    found = mix(planner, strategy=["variance", "lstm"], low_share=0.5)
    raised = [name for name, choice in found.choices.items() if choice.precision == "int16"]
    assert len(raised) == 5
    assert all(found.why[name].startswith("variance+lstm: variance ") for name in raised)
    picked = mix_of(config(mix={"strategy": "hawq"}))
    assert picked is not None
    with pytest.raises(ConfigError, match=r"QD105.*hawq"):
        check_data(picked[0], None)
    with pytest.raises(PlanError, match="QD501"):
        mix_of(config(mix={"strategy": "lstm", "high_saturation": "guess"}))
    assert mix_of(config()) is None

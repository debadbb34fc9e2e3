"""The calibration engine as a user meets it: one command after the other, on a real Ray."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from actors.session import RaySession
from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.calibration.blockwise import block_records
from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.data.random_source import RANDOM_WARNING
from qdist.data.subset import Limited
from qdist.demo import demo_file
from qdist.model.freeze import freeze
from qdist.model.loading import load_model
from qdist.plan.plan import load_plan
from qdist.stats.spec import GroupRequest, StatisticsSpec
from qdist.store.zarr_store import create_store, open_store
from qdist.threshold.clip import Levels
from qdist.threshold.registry import find_threshold
from tests.command_line import check_error, here, left_behind, succeed
from tests.onnx_models import EXECUTION
from tests.unit.test_data_decoder import VOCABULARY, decoder_model

CNN = ("model=digits_cnn", "data=digits", "tracking=none")
NOT_RUN = "all of it done before"
TOKENS = 9
GROUPS = "calibration.groups=[{match: '*Relu*', axis: 1, group_size: 1}]"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, with a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def calibrate(name: str, *words: str, data: tuple[str, ...] = CNN) -> str:
    return succeed("calibrate", *data, f"output.root={name}", *words)


def store_of(name: str) -> str:
    return f"{name}/digits_cnn/calibration.zarr"


def statistics(printed: str) -> str:
    found = re.search(r"statistics\s*│\s*([0-9a-f]{16})", printed)
    assert found is not None, printed
    return found.group(1)


def test_taps_samples_and_groups_that_are_added_later(cluster: RaySession, work: Path) -> None:
    first = calibrate("r", "data.max_samples=8", "calibration.taps=compute", GROUPS)
    assert "histograms per channel or group, of" in first
    assert first.index("histograms per channel") < first.index("calibrating:")
    more = calibrate("r", "data.max_samples=12", GROUPS)
    source = Limited(
        source=ArraySource(
            path=demo_file("digits.npz"),
            inputs={"images": "calibration_images"},
            preprocess=Preprocess(scale=0.0625, mean=(0.3,), std=(0.37,)),
        ),
        max_samples=12,
    )
    spec = StatisticsSpec(groups=(GroupRequest(match="*Relu*", axis=1, group_size=1),))
    frozen = freeze(load_model(demo_file("digits_cnn.onnx")))
    job = prepare(frozen, source, CalibrationSettings(statistics=spec), EXECUTION)
    expected = calibrate_here(job, source, create_store(work / "here", job.identity)).record
    assert statistics(more) == expected.digest[:16]
    store = open_store(store_of("r"))
    assert store.latest().record.digest == expected.digest
    # The taps of the first eight samples are in two sets; nothing was measured twice.
    n_values = sum(r.n_samples * len(r.tensors) for r in store.receipts())
    assert n_values == 12 * len(expected.tensors)
    assert "have histograms per channel or group too" in succeed(
        "show", store_of("r"), "--rows", "2"
    )
    # Back to what was there: no worker starts.
    back = calibrate("r", "data.max_samples=8", "calibration.taps=compute", GROUPS)
    assert NOT_RUN in back
    assert statistics(back) == statistics(first)
    assert "4 samples of earlier runs are left out" in back
    _carried_elsewhere(work)


def _carried_elsewhere(work: Path) -> None:
    """The same statistics, exported and gone on from."""
    every = calibrate("r", "data.max_samples=12", GROUPS)
    assert NOT_RUN in every
    succeed("store", "export", store_of("r"), "run.qdist")
    assert "put into" in succeed("store", "import", "run.qdist", "other.zarr")
    elsewhere = ("store.path=other.zarr", "output.root=q")
    succeed("quantize", "model=digits_cnn", "tracking=none", *elsewhere)
    succeed("quantize", "model=digits_cnn", "tracking=none", "output.root=r")
    plans = [load_plan(work / name / "digits_cnn" / "plan.json").digest for name in ("q", "r")]
    assert plans[0] == plans[1]
    again = succeed("calibrate", *CNN, GROUPS, "data.max_samples=12", *elsewhere)
    assert NOT_RUN in again
    assert statistics(again) == statistics(every)
    other = here("quantize", "model=digits_vit", "tracking=none", *elsewhere)
    check_error(other, "QD401", "digits_vit.onnx")
    check_error(here("store", "import", "run.qdist", "mine.zarr", "x"), "QD105", "FILE STORE")
    damaged = bytearray((work / "run.qdist").read_bytes())
    (work / "damaged.qdist").write_bytes(bytes(damaged[:-100]))
    check_error(here("store", "import", "damaged.qdist", "new.zarr"), "QD409", "damaged.qdist")
    assert not (work / "new.zarr").exists()
    assert "0 leftovers removed" in succeed("store", "sweep", "other.zarr")
    assert NOT_RUN in succeed("calibrate", *CNN, GROUPS, "data.max_samples=12", *elsewhere)


def test_representative_samples(cluster: RaySession, work: Path) -> None:
    few = calibrate("r", "data.max_samples=14", "data.select_num=5")
    listed = work / "r" / "digits_cnn" / "digits_auto.txt"
    assert "5 of 14 samples chosen" in few
    assert str(listed) in few
    keys = listed.read_text().split()
    assert len(keys) == 5
    record = open_store(store_of("r")).latest().record
    assert record.n_samples == 5
    again = calibrate("r", "data.max_samples=14", "data.select_num=5")
    # Neither sketched nor measured anew.
    assert again.count(NOT_RUN) == 2
    assert statistics(again) == statistics(few)
    # The list is what another calibration reads; and more than there are takes all of them.
    by_list = calibrate("r", f"data.calibration.listed={listed}", "data.select_num=50")
    assert "data.select_num=50: all 5 samples are taken" in by_list
    assert by_list.count(NOT_RUN) == 2
    assert statistics(by_list) == statistics(few)


BLOCKS = ("calibration.micro_batch=1", "calibration.blocks=4")
KNIGHT = """
import numpy as np

def infer_cls_model(executor):
    images = np.load({path!r})["calibration_images"].astype(np.float32) / 16
    for start in range(0, 24, executor.batch_size):
        executor.forward(images[start : start + executor.batch_size])
    return 0.5
"""


def test_a_users_own_inference_in_blocks(cluster: RaySession, work: Path) -> None:
    (work / "infer.py").write_text(KNIGHT.format(path=str(demo_file("digits.npz"))))
    data = (
        *("model=digits_cnn", "data=captured", "tracking=none"),
        "data.calibration.target=infer.py:infer_cls_model",
    )
    words = ("data.calibration.batch_size=5", "data.calibration.iteration=4")
    wrong = ("calibration.micro_batch=2", "calibration.blocks=3")
    refused = here("calibrate", *data, *words, *wrong, "output.root=r")
    check_error(refused, "QD311", "20 samples for 3 equal blocks")
    assert not (work / store_of("r")).exists()
    # With another micro-batch too: what was refused left nothing that it would not fit.
    printed = calibrate("r", *words, *BLOCKS, data=data)
    assert "20 samples from infer.py:infer_cls_model, captured by an earlier run" in printed
    store = open_store(store_of("r"))
    blocks = block_records(store, store.latest().name)
    assert [block.n_samples for block in blocks] == [5, 5, 5, 5]
    assert sum(receipt.n_samples for receipt in store.receipts()) == 20
    quantize = ("quantize", "model=digits_cnn", "tracking=none", "output.root=r")
    succeed(*quantize, "quantization.average_blocks=true", "quantization.saturation=max")
    plan = load_plan(work / "r" / "digits_cnn" / "plan.json")
    quantizer = next(
        entry.quantizer
        for layer in plan.layers
        for entry in layer.activations
        if entry.tensor == "images"
    )
    levels = Levels(low=-128, high=127, symmetric=False)
    each = [find_threshold(b.histogram("images").finite, levels, "max") for b in blocks]
    mean = sum(t.high - t.low for t in each) / len(each)
    assert quantizer.scales[0] == pytest.approx(mean / 255)
    assert NOT_RUN in calibrate("r", *words, *BLOCKS[:1], data=data)
    # The latest is still the same merge, whose blocks are known.
    succeed(*quantize, "quantization.average_blocks=true")
    for command in ("evaluate", "compare", "tune"):
        check_error(here(command, *data, "output.root=r"), "QD105", "data.evaluation")


def test_random_samples_until_they_tell_nothing_new(cluster: RaySession, work: Path) -> None:
    data = ("model=digits_cnn", "data=random", "tracking=none", "data.calibration.n_samples=64")
    stop = ("calibration.early_stop={tolerance: 0.9, patience: 1}", "calibration.micro_batch=2")
    printed = calibrate("r", *stop, "calibration.shard_samples=6", data=data)
    assert RANDOM_WARNING in printed
    assert "stopped early after 32 of 64 samples" in printed
    assert "note: stopped early" in printed
    again = calibrate("r", *stop, "cluster.workers=1", "calibration.shard_samples=4", data=data)
    assert statistics(again) == statistics(printed)
    assert NOT_RUN in again
    assert "-" not in re.findall(r"calibrating: .*", again)[-1]
    record = open_store(store_of("r")).latest().record
    assert record.n_samples == 32
    written = succeed("quantize", "model=digits_cnn", "tracking=none", "output.root=r")
    assert RANDOM_WARNING in written
    for command in ("evaluate", "compare", "tune"):
        check_error(here(command, *data, "output.root=r"), "QD105", "data.evaluation")


@pytest.mark.parametrize(
    ("word", "code", "part"),
    [
        ("calibration.taps=nope", "QD208", "nope"),
        ("calibration.taps=[images, 'nope*']", "QD208", "nope*"),
        ("calibration.taps=[]", "QD105", "calibration.taps"),
        ("calibration.memory_budget=100MB", "QD211", "weight "),
        ("calibration.memory_budget=much", "QD104", "calibration.memory_budget"),
        ("calibration.memory_budget=1e999GB", "QD104", "calibration.memory_budget"),
        ("calibration.memory_budget=0", "QD104", "calibration.memory_budget"),
        ("calibration.blocks=7", "QD311", "160 samples for 7"),
        ("calibration.groups=[{match: 'no*', axis: 1, group_size: 1}]", "QD208", "no*"),
        ("calibration.groups=[{match: images, axis: 1}]", "QD104", "group_size"),
        ("data.calibration.exclude=[no_such_sample]", "QD104", "no_such_sample"),
        ("data.calibration.listed=missing.txt", "QD301", "missing.txt"),
        ("data.calibration.mask_input=mask", "QD307", "images"),
        ("data.calibration.length_buckets=[4, 8]", "QD105", "mask_input"),
        ("data.calibration.pad_values={images: 0}", "QD105", "data.calibration.pad_values"),
        ("calibration.sequence_axes={images: [1]}", "QD105", "calibration.sequence_axes"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_leave_nothing(
    word: str, code: str, part: str, work: Path
) -> None:
    check_error(here("calibrate", *CNN, "output.root=r", word), code, part)
    assert left_behind(work) == []


@pytest.mark.parametrize("steps", [TOKENS, TOKENS + 3])
def test_decoders_whose_samples_are_too_short_leave_nothing(steps: int, work: Path) -> None:
    """So that fewer steps can be asked for in the same place."""
    inputs = work / "inputs"
    inputs.mkdir()
    (inputs / "decoder.onnx").write_bytes(decoder_model())
    np.savez(inputs / "tokens.npz", input_ids=np.arange(2 * TOKENS).reshape(2, TOKENS) % VOCABULARY)
    words = (
        *("model.path=inputs/decoder.onnx", "data=arrays", "data.path=inputs/tokens.npz"),
        *("data.calibration.inputs={input_ids: input_ids}", "tracking=none", "output.root=r"),
    )
    refused = here("calibrate", *words, f"data.calibration.decode_steps={steps}")
    assert "error: QD303" in refused.err
    assert "decode_steps" in refused.err
    assert left_behind(work / "r") == []


def test_settings_that_contradict_each_other_leave_nothing(work: Path) -> None:
    both = ("calibration.blocks=2", "calibration.early_stop={}")
    check_error(here("calibrate", *CNN, "output.root=r", *both), "QD107", "calibration.blocks=2")
    names = ("data.select_num=5", "calibration.taps=nope")
    check_error(here("calibrate", *CNN, "output.root=r", *names), "QD208", "nope")
    assert left_behind(work) == []

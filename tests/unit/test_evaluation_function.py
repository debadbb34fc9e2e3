"""User functions: loading them, calling them, and what they may return."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdist.errors import ConfigError, DataError, EvaluationError
from qdist.evaluate.function import Executor, FunctionEvaluation
from qdist.targets import load_target


@pytest.fixture(autouse=True)
def _clean_imports(tmp_path: Path) -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    # Of what came meanwhile, the user's modules alone: others' classes must stay what they are.
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def executor(**changes: Any) -> Executor:
    """The model y = a + 2 b, z = a."""

    def run(feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return [feeds["a"] + 2 * feeds["b"], feeds["a"]]

    fields: dict[str, Any] = {
        "run": run,
        "input_nodes": ["a", "b"],
        "output_nodes": ["y", "z"],
        "model_path": Path("model.onnx"),
        "iteration": 3,
        "batch_size": 2,
        "dataset": "somewhere",
    }
    return Executor(**{**fields, **changes})


def evaluate(path: Path, text: str, **settings: Any) -> Any:
    write(path, text)
    evaluation = FunctionEvaluation(target=f"{path}:f", **{"higher_is_better": True, **settings})
    return evaluation.run(executor())


def test_a_function_in_knights_style(tmp_path: Path) -> None:
    report = evaluate(
        tmp_path / "script.py",
        """
import numpy as np

def f(executor):
    total = 0
    for i in range(100):
        a = np.full((executor.batch_size, 4), i, np.float32)
        y, z = executor.forward(a, np.ones_like(a))
        assert (z == a).all() and executor.dataset == "somewhere"
        total += y.mean()
        if i + 1 == executor.iteration:
            break
        if executor.early_stop_flag == True:
            break
    return total / executor.iteration
""",
    )
    assert (report.score, report.metric, report.metrics) == (3.0, "score", {"score": 3.0})
    assert report.higher_is_better
    assert report.mode == "artifact-exact"
    assert report.seconds >= 0


def test_named_numbers_and_arguments(tmp_path: Path) -> None:
    text = "def f(executor, scale): return {'map': scale, 'map50': 2 * scale, 'note': 'x'}"
    path = tmp_path / "script.py"
    report = evaluate(path, text, metric="map50", arguments={"scale": 0.25})
    assert (report.score, report.metrics) == (0.5, {"map": 0.25, "map50": 0.5})
    with pytest.raises(EvaluationError, match=r"QD704 .*several metrics: map, map50"):
        evaluate(path, text, arguments={"scale": 0.25})
    with pytest.raises(EvaluationError, match=r"QD704 .*no metric 'top1' among map, map50"):
        evaluate(path, text, metric="top1", arguments={"scale": 0.25})


@pytest.mark.parametrize("result", ["None", "'0.5'", "float('nan')", "float('-inf')", "[0.5]", "{}",
                                    "True", "{'a': float('nan')}"])  # fmt: skip
def test_unusable_results(tmp_path: Path, result: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(tmp_path / "script.py", f"def f(executor): return {result}")
    assert caught.value.code == "QD704"


@pytest.mark.parametrize("result", ["np.float32(0.5)", "np.array(0.5)", "np.array([0.5])"])
def test_numpy_scalars_are_numbers(tmp_path: Path, result: str) -> None:
    text = f"import numpy as np\ndef f(executor): return {result}"
    assert evaluate(tmp_path / "script.py", text).score == 0.5


def test_an_error_is_placed_in_the_users_file(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    text = """
import json

def inner():
    json.loads("{")

def f(executor):
    inner()
"""
    with pytest.raises(EvaluationError) as caught:
        evaluate(path, text)
    assert caught.value.code == "QD705"
    assert caught.value.where == f"{path}:5"
    assert caught.value.got.startswith("JSONDecodeError: Expecting property name")


def test_exit_and_wrong_arguments_are_errors_of_the_function(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"QD705 .*SystemExit: 3"):
        evaluate(tmp_path / "script.py", "import sys\ndef f(executor): sys.exit(3)")
    with pytest.raises(EvaluationError, match=r"QD705 .*unexpected keyword argument 'x'"):
        evaluate(tmp_path / "script.py", "def f(executor): return 1", arguments={"x": 1})


def test_a_wrong_number_of_inputs_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(tmp_path / "script.py", "def f(executor): executor.forward([1.0])")
    assert caught.value.code == "QD307"
    assert "a, b" in caught.value.expected


def test_forward_feeds_in_the_models_order() -> None:
    y, z = executor().forward(np.array([1.0]), np.array([10.0]))
    assert (y.tolist(), z.tolist()) == ([21.0], [1.0])


def test_modules_are_imported_by_name() -> None:
    assert load_target("math:sqrt") is math.sqrt
    assert load_target("pathlib:Path.cwd")() == Path.cwd()


def test_files_of_one_name_do_not_collide_and_edits_are_read(tmp_path: Path) -> None:
    a = write(tmp_path / "a" / "script.py", "def f(): return 'a'")
    b = write(tmp_path / "b" / "script.py", "def f(): return 'b'")
    assert (load_target(f"{a}:f")(), load_target(f"{b}:f")()) == ("a", "b")
    assert load_target(f"{a}:f") is load_target(f"{a}:f")
    write(a, "def f(): return 'c'")  # same size, same second
    assert load_target(f"{a}:f")() == "c"


def test_a_file_finds_the_modules_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "qdist_test_early.py", "VALUE = 1")
    write(tmp_path / "qdist_test_late.py", "VALUE = 2")
    path = write(
        tmp_path / "script.py",
        "from qdist_test_early import VALUE\n"
        "def f():\n    import qdist_test_late\n    return VALUE, qdist_test_late.VALUE",
    )
    first = sys.path[0]
    assert load_target(f"{path}:f")() == (1, 2)
    assert sys.path[0] == first


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("no_colon", "expected module:function or file.py:function"),
        ("math:", "expected module:function or file.py:function"),
        ("math:sqrt()", "expected module:function or file.py:function"),
        ("qdist_no_such_module:f", "ModuleNotFoundError"),
        ("math:no_such", "got no 'no_such' there"),
        ("math:pi", "got a float"),
        ("missing.py:f", "No such file"),
        ("broken.py:f", "SyntaxError"),
        ("raising.py:f", "KeyError: 'weights'"),
        ("exiting.py:f", "SystemExit: 2"),
        ("script.py:g", "expected one of the functions f, Model;"),
    ],
)
def test_targets_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "broken.py", "def f(:")
    write(tmp_path / "raising.py", "{}['weights']")
    write(tmp_path / "exiting.py", "raise SystemExit(2)")
    write(
        tmp_path / "script.py",
        "from math import sqrt\ndef f(): pass\ndef _g(): pass\nclass Model: pass\nX = 1",
    )
    modules = set(sys.modules)
    with pytest.raises(ConfigError) as caught:
        load_target(target)
    assert caught.value.code == "QD108"
    assert complaint in str(caught.value)
    if target != "script.py:g":
        assert {name for name in set(sys.modules) - modules if "_qdist_target" in name} == set()

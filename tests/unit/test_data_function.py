from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdist.data.function import FunctionSource
from qdist.errors import ConfigError, DataError, QdistError
from qdist.targets import load_target

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np

@dataclass
class Lazy:
    n: int
    asked: int = 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.asked += 1
        if i == 3:
            raise OSError("cannot fetch\\nsample three")
        return {"x": np.full(2, i, np.float32)}

def lazy(n):
    return Lazy(n)

def generator(n, dtype="float32"):
    for i in range(n):
        yield {"x": np.full(2, i, dtype), "s": i}, [i, i]

def fails():
    raise ValueError("first line\\nthe last line")

def fails_while_iterating():
    yield {"x": 1}
    raise KeyError("late")

def number():
    return 3

def odd(what):
    return [{"list": [1], "empty": {}, "text": {"x": "a"}, "ragged": {"x": [[1], [1, 2]]},
             "label": ({"x": 1}, 0.5), "none": {"x": None}}[what]]

def _private():
    return []
"""


@pytest.fixture(autouse=True)
def _clean_path() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MODULE)
    return str(tmp_path / "mine.py")


def test_an_iterable_of_pairs_is_materialised(mine: str) -> None:
    source = FunctionSource(target=f"{mine}:generator", arguments={"n": 3, "dtype": "int8"})
    assert source.keys() == ["000000", "000001", "000002"]
    feeds = source.load("000002")
    np.testing.assert_array_equal(feeds["x"], np.full(2, 2, np.int8), strict=True)
    assert feeds["s"].shape == ()
    np.testing.assert_array_equal(source.label("000001"), [1, 1])
    assert source.content_digest("000001") != source.content_digest("000002")


def test_a_sequence_is_asked_one_sample_at_a_time(mine: str) -> None:
    source = FunctionSource(target=f"{mine}:lazy", arguments={"n": 1000})
    assert len(source.keys()) == 1000
    assert source._samples.asked == 0  # type: ignore[attr-defined]
    assert source.load("000999")["x"][0] == 999
    assert source.label("000999") is None
    with pytest.raises(DataError, match=r"QD306.*sample 000003.*OSError: sample three"):
        source.load("000003")


def test_a_module_on_the_path_and_arguments_survive_pickling(
    mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(mine).parent))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    source = FunctionSource(target="mine:generator", arguments={"n": 2})
    assert len(source.keys()) == 2
    other = pickle.loads(pickle.dumps(source))
    assert other == source
    assert other.content_digest("000001") == source.content_digest("000001")
    monkeypatch.delitem(sys.modules, "mine")


def test_a_changed_file_is_loaded_anew(mine: str) -> None:
    first = load_target(f"{mine}:number")
    assert load_target(f"{mine}:number") is first
    Path(mine).write_text(MODULE.replace("return 3", "return 4"))
    assert load_target(f"{mine}:number")() == 4


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("fails", {}, "ValueError: the last line"),
        ("fails_while_iterating", {}, "KeyError: 'late'"),
        ("number", {}, "returned int"),
        ("generator", {"m": 1}, "TypeError: .*unexpected keyword"),
        ("sampels", {}, "fails, fails_while_iterating, generator, lazy, number, odd"),
        ("Missing:", {}, "no module or no function|no function"),
    ],
)
def test_functions_that_fail(mine: str, name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"QD108.*({says})"):
        FunctionSource(target=f"{mine}:{name}", arguments=arguments).keys()


def test_places_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no licence')\n")
    cases = {
        f"{tmp_path}/none.py:f": "No such file",
        f"{tmp_path}/broken.py:f": "SyntaxError",
        f"{tmp_path}/raises.py:f": "RuntimeError: no licence",
        "no_such_module_anywhere:f": "ModuleNotFoundError",
        "just_a_name": "no module or no function name",
    }
    for target, says in cases.items():
        with pytest.raises(ConfigError, match=f"QD108.*{says}"):
            FunctionSource(target=target).keys()
    assert not [name for name in sys.modules if name.startswith("_qdist_target_raises")]


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("list", "QD306"),
        ("empty", "QD306"),
        ("text", "QD306"),
        ("ragged", "QD306"),
        ("none", "QD306"),
        ("label", "QD308"),
    ],
)
def test_samples_that_are_none(mine: str, what: str, code: str) -> None:
    source = FunctionSource(target=f"{mine}:odd", arguments={"what": what})
    with pytest.raises(QdistError, match=f"{code}.*sample 000000"):
        source.load("000000")


def test_no_samples_and_no_such_sample(mine: str) -> None:
    with pytest.raises(DataError, match="QD302"):
        FunctionSource(target=f"{mine}:_private").keys()
    with pytest.raises(DataError, match="QD306"):
        FunctionSource(target=f"{mine}:generator", arguments={"n": 2}).load("000002")

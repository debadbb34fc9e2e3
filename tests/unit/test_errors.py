"""The tree of errors, its codes, and files that are whole or absent."""

from __future__ import annotations

import ast
import pickle
import re
from functools import partial
from pathlib import Path

import pytest

from qdist import errors
from qdist.errors import CODES, QdistError
from qdist.files import make_folder, replacing, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
SUBCLASSES = {
    "1": errors.ConfigError,
    "2": errors.ModelError,
    "3": errors.DataError,
    "4": errors.StoreError,
    "5": errors.PlanError,
    "6": errors.ArtifactError,
    "7": errors.EvaluationError,
    "8": errors.ClusterError,
    "9": errors.TrackingError,
}
SOURCES = sorted(
    path
    for folder in ("qdist", "actors")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "qdist" / "errors.py"
)


def make(kind: type[QdistError], code: str) -> QdistError:
    return kind(code, where="layer a", got="x", expected="y", mend="do z")


def strings_in(path: Path) -> list[str]:
    """The string constants of a module that are not docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]


def codes_in_source() -> set[str]:
    return {
        text for path in SOURCES for text in strings_in(path) if re.fullmatch(r"QD\d{3,}", text)
    }


def test_every_code_that_the_source_uses_is_known() -> None:
    assert codes_in_source() - set(CODES) == set()


def test_every_code_is_used() -> None:
    assert set(CODES) - codes_in_source() == set()


def test_the_table_of_errors_lists_every_code() -> None:
    table = (ROOT / "docs" / "errors.md").read_text("utf-8")
    assert dict(re.findall(r"^\| (QD\d+) \| (.*?) \|$", table, re.M)) == CODES


def test_every_code_in_prose_is_known() -> None:
    texts = {path: path.read_text("utf-8") for path in SOURCES}
    named = {(path, code) for path, text in texts.items() for code in re.findall(r"QD\d{3,}", text)}
    assert {(path.name, code) for path, code in named if code not in CODES} == set()


def test_an_error_is_raised_with_a_code_of_its_own_class() -> None:
    """``PlanError("QD5..")``: the class and the first digit belong together."""
    digit_of = {kind.__name__: digit for digit, kind in SUBCLASSES.items()}
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            first = node.args[0]
            digit = digit_of.get(node.func.id)
            if digit and isinstance(first, ast.Constant) and str(first.value)[2:3] != digit:
                wrong.append((path.name, node.func.id, first.value))
    assert wrong == []


@pytest.mark.parametrize("code", CODES)
def test_an_error_survives_pickling_and_is_one_line(code: str) -> None:
    kind = SUBCLASSES[code[2]]
    error = kind(code, where="a\nfile", got="two\r\nlines", expected="one\tline", mend=" do  z ")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    for name in ("code", "where", "got", "expected", "mend"):
        assert getattr(again, name) == getattr(error, name)
    assert str(again) == str(error)
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith(f"{code} {CODES[code]}: a file: got two lines; expected one line")
    assert str(error).endswith("to mend it: do z")


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(KeyError, match="QD999"):
        make(errors.PlanError, "QD999")


def test_codes_are_named_once_each_and_in_order() -> None:
    assert list(CODES) == sorted(CODES)
    assert len(set(CODES.values())) == len(CODES)


def test_every_subclass_is_caught_as_the_built_in_error_that_it_is() -> None:
    assert set(SUBCLASSES.values()) == set(QdistError.__subclasses__())
    for kind in SUBCLASSES.values():
        built_in = kind.__mro__[2]
        assert built_in in (ValueError, OSError, RuntimeError)


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert path.read_text() == '{\n  "x": 1\n}\n'
    write_text(path, "over\u00e9")
    assert path.read_text("utf-8") == "over\u00e9"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "before")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_with_a_code_passes_through_a_block_that_writes(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a.onnx"):
            raise make(errors.ArtifactError, "QD601")

    with pytest.raises(errors.ArtifactError) as caught:
        fail()
    assert caught.value.code == "QD601"


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    file = write_text(tmp_path / "file", "")
    attempts = partial(make_folder, file / "x"), partial(write_text, file / "x" / "y", "")
    for attempt in attempts:
        with pytest.raises(errors.ArtifactError) as caught:
            attempt()
        assert caught.value.code == "QD603"
        assert caught.value.where == str(file / "x")


def test_a_file_in_the_place_of_a_folder_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(errors.ArtifactError) as caught:
        write_text(tmp_path / "taken", "x")
    assert caught.value.code == "QD603"
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]

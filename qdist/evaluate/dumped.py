"""A metric class by itself, over the blobs that ``qdist compare compare.dump=1`` or more wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qdist.errors import DataError
from qdist.evaluate.custom_metric import ClassEvaluation
from qdist.evaluate.report import EvalReport


def score_dumped(evaluation: ClassEvaluation, folder: Path) -> dict[str, EvalReport]:
    """Folder of blobs below ``folder`` -> the report of the class, the float model's first.

    ``evaluation.replace_output`` names outputs as the model has them, or as files have them.
    Raises `DataError` QD306 for a folder that is no such dump, and as `ClassEvaluation.score`.
    """
    try:
        names = json.loads((folder / "names.json").read_text("utf-8"))
        line = (folder / "output_control.octrl").read_text("utf-8").partition("]")[0]
        parts = line.lstrip("[").split()
        samples = dict(names["samples"])
        outputs = {part: str(names["outputs"][part]) for part in parts}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_dump(folder, f"{type(error).__name__}: {error}") from error
    asked = tuple(outputs.get(name, name) for name in evaluation.replace_output)
    part_of = {name: part for part, name in outputs.items()}
    wanted = [
        part_of[name] for name in replace(evaluation, replace_output=asked).ordered(list(part_of))
    ]
    first = f"{next(iter(samples), '')}_{next(iter(parts), '')}.blob"
    places = sorted(
        (place for place in folder.iterdir() if (place / first).is_file()),
        key=lambda place: (not place.name.endswith("_ref"), place.name),
    )
    if not places:
        raise _no_dump(folder, f"no folder with {first}")
    return {
        place.name: evaluation.score(place, list(samples), wanted, list(samples.values()))
        for place in places
    }


def _no_dump(folder: Path, got: str) -> DataError:
    return DataError(
        "QD306",
        where=str(folder),
        got=got,
        expected="a folder that qdist compare compare.dump=1 or more wrote",
        mend="dump a comparison, and give its folder as evaluation.dumped",
    )

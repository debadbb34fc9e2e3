"""Text files beside a folder of images: which of them, in which order, with which labels."""

from __future__ import annotations

import csv
from pathlib import Path

from qdist.data.stored import not_found, read_lines, unreadable
from qdist.errors import DataError


def read_list(folder: Path, list_file: Path) -> list[str]:
    """The list file's paths in order. Raises QD301 (a file is not there), QD306 (named twice)."""
    found: dict[str, int] = {}
    for number, line in enumerate(read_lines(list_file), start=1):
        if not (name := line.strip()):
            continue
        key = Path(name).as_posix()
        if key in found:
            raise unreadable(
                f"{list_file}, line {number}",
                f"{key} for the second time, after line {found[key]}",
                "every file once",
                "remove one of the two lines",
            )
        if not (folder / key).is_file():
            raise not_found(folder / key, f"the file that {list_file}, line {number} names")
        found[key] = number
    return list(found)


def read_labels(path: Path) -> dict[str, int]:
    """File -> label. Raises QD301, QD306, QD308 (a row that cannot be understood)."""
    labels: dict[str, int] = {}
    for number, row in enumerate(csv.reader(read_lines(path)), start=1):
        if not row:
            continue
        value = row[1].strip() if len(row) == 2 else ""
        is_number = value.removeprefix("-").isdecimal()
        if number == 1 and len(row) == 2 and not is_number and not Path(row[0]).suffix:
            continue  # a header such as "file,label"
        key = Path(row[0].strip()).as_posix()
        if not is_number or labels.get(key, int(value)) != int(value):
            raise DataError(
                "QD308",
                where=f"{path}, line {number}",
                got=f"{','.join(row)!r}" + (" beside another label for it" if is_number else ""),
                expected="rows 'file,label' with an integer label, one per file",
                mend="correct the row",
            )
        labels[key] = int(value)
    return labels

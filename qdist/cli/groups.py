"""Where the configuration groups are, and which choices each has."""

from __future__ import annotations

import os
from pathlib import Path

from qdist.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """The folder of groups: ``QDIST_CONFIG`` if set, a checkout's ``conf``, or the wheel's own."""
    named = os.environ.get("QDIST_CONFIG")
    places = [Path(named)] if named else [_PACKAGE.parent / "conf", _PACKAGE / "_conf"]
    for place in places:
        if (place / "calibrate.yaml").is_file():
            return place.absolute()
    raise ConfigError(
        "QD106",
        where=", ".join(str(place) for place in places),
        got="no configuration there",
        expected="a folder with calibrate.yaml and the groups beside it",
        mend="unset QDIST_CONFIG, or install qdist again",
    )


def choices(group: str, extra: Path | None = None) -> dict[str, str]:
    """Choice -> its description (first comment line), of one group; ``extra``: --config-dir."""
    found: dict[str, str] = {}
    for root in (config_folder(), extra):
        folder = root / group if root is not None else None
        if folder is None or not folder.is_dir():
            continue
        for path in sorted(folder.glob("*.yaml")):
            found[path.stem] = _first_comment(path)
    return found


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        return line.lstrip("# ").strip() if line.startswith("#") else ""
    return ""

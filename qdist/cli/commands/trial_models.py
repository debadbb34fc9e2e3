"""The models of a search's trials: those in its folder, and those that it has let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

MODEL, PLAN = "model.onnx", "plan.json"
"""Files of a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialModels:
    """``folder``: the search's own, with a folder for each trial. ``write(plan, model)`` writes the
    model of a plan's file, as the trial did; None: what is gone stays gone."""

    folder: Path
    write: Callable[[Path, Path], object] | None = None

    def place(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / f"trial-{number:03d}"

    @contextmanager
    def at(self, number: int) -> Iterator[Path | None]:
        """A folder that has the trial's `MODEL`: its own, or one for this block where an earlier
        search let the model go (``search.artifacts``). None where there was never any. Raises what
        ``write`` raises."""
        place = self.place(number)
        if (place / MODEL).exists():
            yield place
        elif self.write is None or not (place / PLAN).exists():
            yield None
        else:
            with TemporaryDirectory(prefix="qdist-model-", dir=self.folder) as again:
                self.write(place / PLAN, Path(again) / MODEL)
                yield Path(again)

"""Where the files of scored plans are: one folder a plan, named by what the plan comes to.

Workers write here, and the driver links what belongs to a trial into the trial's own folder. Who
makes the claim of a plan scores it; everyone else learns who that is.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from qdist.errors import QdistError
from qdist.files import make_folder, unwritable, write_json
from qdist.search.results import PlanResult

ARTIFACT = "model.onnx"
PLAN = "plan.json"
_RESULT = "result.json"
_CLAIM = "claim"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFolder:
    """The folder of one plan. ``session``: of the search that runs now."""

    path: Path
    session: str

    def claimed_by(self, owner: str) -> str:
        """Claim the plan for the task ``owner``; who has it then, ``owner`` or another.

        A claim of an earlier session counts for nothing. Raises QD603.
        """
        make_folder(self.path)
        claim = self.path / _CLAIM
        mine = json.dumps([self.session, owner])
        draft = self.path / f".{_CLAIM}.{uuid.uuid4().hex}"
        try:
            draft.write_text(mine, encoding="utf-8")
            while True:
                try:
                    # A link appears whole or not at all, and fails where there is one.
                    os.link(draft, claim)
                    return owner
                except FileExistsError:
                    holder = self._holder(claim)
                    if holder is not None:
                        return holder
                    os.replace(draft, claim)
                    return owner
        except QdistError:
            raise
        except PermissionError:
            # Some file systems have no links; the plan may then be scored twice.
            return owner
        except OSError as error:
            raise unwritable(claim, error, "a folder that this user can write") from error
        finally:
            draft.unlink(missing_ok=True)

    def _holder(self, claim: Path) -> str | None:
        try:
            session, owner = json.loads(claim.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return str(owner) if session == self.session else None

    def release(self) -> None:
        """Let anyone claim the plan again."""
        (self.path / _CLAIM).unlink(missing_ok=True)

    def save(self, result: PlanResult) -> None:
        """Keep what scoring gave, whole or not at all. Raises QD603."""
        write_json(self.path / _RESULT, {"session": self.session, **result.to_json()})

    def result(self) -> PlanResult | None:
        """What scoring gave; None where nothing did, or what did failed in an earlier session:
        what a script failed for may have been mended since."""
        try:
            value = json.loads((self.path / _RESULT).read_text(encoding="utf-8"))
            found = PlanResult.from_json(value)
            is_ours = value["session"] == self.session
        except (OSError, KeyError, TypeError, ValueError, QdistError):
            return None
        return found if found.report is not None or is_ours else None

    def link_into(self, folder: Path) -> None:
        """Let ``folder`` hold the plan and the artifact too. Raises QD603."""
        try:
            for source in sorted([*self.path.glob(PLAN), *self.path.glob(f"{ARTIFACT}*")]):
                place = folder / source.name
                place.unlink(missing_ok=True)
                try:
                    os.link(source, place)
                except OSError:
                    shutil.copy2(source, place)
        except OSError as error:
            raise unwritable(folder, error, "a folder that this user can write") from error


def drop_artifact(folder: Path) -> None:
    """Delete the artifact in ``folder``, its data file included, if there is one. Raises QD603."""
    for path in folder.glob(f"{ARTIFACT}*"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(path, error, "a folder that this user can write") from error

"""A user's evaluation commands, and what is expected of their failures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qdist.errors import EvaluationError
from qdist.evaluate.command import CommandError, CommandEvaluation


def command(*argv: str, **settings: Any) -> CommandEvaluation:
    return CommandEvaluation(
        command=argv, **{"timeout_s": 60.0, "higher_is_better": True, **settings}
    )


def python(text: str, *arguments: str, **settings: Any) -> CommandEvaluation:
    return command(sys.executable, "-c", text, *arguments, **settings)


def failure(evaluation: CommandEvaluation, model: Path, scratch: Path) -> CommandError:
    with pytest.raises(CommandError) as caught:
        evaluation.run(model, scratch)
    assert list(scratch.iterdir()) == [], "the scratch folder was left"
    assert isinstance(caught.value, EvaluationError)
    return caught.value

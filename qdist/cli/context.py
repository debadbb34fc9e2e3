"""What every command starts with: a console, the settings, the model, a tracker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from qdist.cli import domain
from qdist.cli.progress import bar
from qdist.cli.schema import CommandSettings
from qdist.cli.tracking import Run, open_tracker
from qdist.files import make_folder
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.model.session import Execution, check_provider

SettingsT = TypeVar("SettingsT", bound=CommandSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(Generic[SettingsT]):
    """One run of one command. ``config``: the resolved configuration, as JSON."""

    command: str
    settings: SettingsT
    config: Mapping[str, Any]
    console: Console
    begin: float

    @property
    def folder(self) -> Path:
        """The output folder, absolute."""
        return domain.absolute(self.settings.output.folder)

    @property
    def execution(self) -> Execution:
        """How models are run."""
        return domain.execution(self.settings.model)

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self.begin

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def notes(self, notes: tuple[str, ...] | list[str]) -> None:
        """What the user should know, one line each."""
        for note in notes:
            self.say(f"note: {note}")

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Say what is going on: a spinner on a terminal, a plain line elsewhere."""
        if not self.console.is_terminal:
            self.say(f"{what} ...")
            yield
            return
        with self.console.status(what):
            yield

    def make_folder(self) -> Path:
        """The output folder, created and proven writable. Raises QD603."""
        return make_folder(self.folder)

    def frozen_model(self) -> FrozenModel:
        """Read, fingerprint and freeze the model, with progress for large ones."""
        check_provider(self.settings.model.provider)
        path = domain.absolute(self.settings.model.path)
        with bar(self.console, f"reading {path.name}", "MB") as reading:
            model = load_model(
                path, on_progress=lambda done, total: reading.update(done >> 20, total >> 20)
            )
        return freeze(model, self.execution)

    @contextmanager
    def tracked(
        self, *, params: Mapping[str, Any], model_digest: str, resume: str | None = None
    ) -> Iterator[Run]:
        """An MLflow run for this command; failures and Ctrl-C end it as such. ``resume``: the id
        of a run to go on with, if MLflow has it."""
        spec = domain.tracking(self.settings.tracking)
        with open_tracker(spec, spool_folder=self.folder, warn=self.say) as tracker:
            with tracker.start_run(
                f"{self.command} {self.settings.model.name}",
                command=self.command,
                config=self.config,
                params={"model": self.settings.model.name, **params},
                model_digest=model_digest,
                resume=resume,
            ) as run:
                yield run
            if tracker.n_spooled:
                tracker.catch_up()
            if tracker.n_spooled:
                self.say(
                    f"note: {tracker.n_spooled} MLflow records wait in {self.folder}; "
                    "the server did not take them. The next command with this output folder "
                    "sends them"
                )

"""The experiment that takes the runs, found by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdist.cli.tracking.trials_view import add_trials_view
from qdist.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def find_experiment(client: MlflowClient, name: str, *, location: str | None) -> str:
    """The id of experiment ``name``, created if missing, with its view of trials. Raises QD104 if
    it was deleted.

    ``location`` is where a new one keeps its artifacts; None leaves that to the server.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            made = str(client.create_experiment(name, artifact_location=location))
            add_trials_view(client, made, {})
            return made
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another driver was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            "QD104",
            where="tracking.experiment",
            got=f"{name!r}, which was deleted",
            expected="an active experiment",
            mend=f"choose another name, or: mlflow experiments restore -x {found.experiment_id}",
        )
    add_trials_view(client, str(found.experiment_id), found.tags)
    return str(found.experiment_id)

"""Runs, trials and artifacts in MLflow: the one package that writes to it.

``spec``         where runs are recorded, and which of their files.
``address``      the addresses of servers, databases and experiments.
``opening``      `open_tracker`: proves that MLflow can be used before anything expensive starts.
``database``     the SQLite database and its first migration.
``experiment``   the experiment, found or created by its name.
``run``          `Tracker` and `Run`, which callers hold.
``names``        names that MLflow accepts, and values cut to what it takes.
``values``       values as text and as JSON.
``sink``         where records go; ``mlflow_sink`` MLflow; ``spool`` a file of what waits for it.
``records``      what a record does to a run.
``client_call``  MLflow's variables and silence around each call.

Once it is open, tracking never ends a run: what MLflow does not take is appended to
``mlflow-spool.jsonl``, a file of self-contained records ``{"run", "kind", "payload", "error"}``,
and the run goes on. When MLflow answers again, in this run or at the start of the next with the
same output folder, the records are sent in their order and the file goes.

One process, the driver, owns all writes. Only `MlflowClient` is used, never the fluent API,
and MLflow's variables are set around each call alone, so nothing leaks into the processes
that the driver starts. MLflow is imported inside functions: the import takes 2-3 seconds,
which ``qdist --help`` should not pay.
"""

from qdist.cli.tracking.opening import open_tracker
from qdist.cli.tracking.run import Run, Tracker
from qdist.cli.tracking.spec import TrackingSpec
from qdist.cli.tracking.spool import SPOOL_NAME

__all__ = ["SPOOL_NAME", "Run", "Tracker", "TrackingSpec", "open_tracker"]

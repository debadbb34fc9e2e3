"""What distributes qdist over a Ray cluster: sessions, pools and controllers.

``session``    starts a local Ray or connects to one, and checks that it has the resources.
``retry``      what to do after a task or a worker failed; a pure policy that knows no Ray.
``stragglers`` when a late task is started a second time; ``outage`` when a store is tried again.
``pool``       a pool of actors, each around one plain worker; the driver owns the queue.
``events``     what a pool tells its caller, and what it asks of a worker.
``crew``       the pool's workers: started, replaced, retired; ``seat`` the place of one of them.
``job_queue``  which job goes to which worker next.
``answers``    what the workers answer, and what becomes of each task then.
``nodes``      how much every node of the cluster has done.
``host``       the class that Ray makes actors of.
``failures``   the errors of a pool; ``fingerprints`` that all workers get the same bits.
``calibrate``  the controller that spreads the shards of a calibration over a pool.
``worker``     what its workers do; ``merging`` when workers are started to merge alone.
``pipeline``   the same with a pool for each stage of the model; ``stage`` the worker of one.
``select``     the controller that has samples sketched, and chooses the representative ones.
``tune``       the controller that spreads the trials of a search over a pool.
``trial_worker`` what its workers do; ``plan_folder`` where their files are.
``trial_book`` what a search has found, on disk; ``outcome`` its limits, and what it leaves.

The workers are plain classes of the library and are tested without Ray. The driver keeps the
queue and Ray retries nothing: a policy decides, the pool executes, the caller sees every retry
and every lost worker as an event. Nothing here knows Hydra, MLflow or the command line.
"""

import os

# Ray reads these when it is first imported, and every module of this package is imported after
# this one. The first stops Ray from rebuilding the environment of ``uv run`` in every worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

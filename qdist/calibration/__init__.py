"""A whole calibration, in one process: what the Ray actors run is made of the same parts.

``settings``    what a user decides about measuring.
``feeds``       from a micro-batch of samples to what the model is fed.
``measuring``   from a graph and its taps to what a worker needs to measure them.
``job``         everything that is fixed before the first sample runs; ``prepare`` fixes it.
``estimate``    what histograms per channel will take.
``work``        what a store lacks for a job: shards to measure, and with which taps.
``measure``     one shard measured and committed.
``tree``        which records are merged with which first, where there are many.
``reading``     a record, or a group of them merged into an inner node of the tree and kept.
``merge``       what was committed, as one record; what was merged before, recalled.
``notes``       what a record shows that a user should hear of.
``run``         measures and merges until nothing is missing.
``here``        all of it in this process, without Ray.
``converge``    no more samples than the thresholds need: early stopping.
``prefix``      statistics of the first samples alone.
``blockwise``   statistics of equal blocks of the samples (Icraft's ``batch``).
``smoothed``    the rows that SmoothQuant changes, measured anew, beside the others.
``stage``       some segments of a model as one stage of a pipeline.
``boundary``    tensors on their way from one stage to the next, in the store's place.
"""

from qdist.calibration.feeds import first_feeds, input_specs, load_batch, load_phases
from qdist.calibration.here import calibrate_here
from qdist.calibration.job import CalibrationJob, identify, prepare
from qdist.calibration.measure import run_shard
from qdist.calibration.merge import Merged, finish, recall
from qdist.calibration.reading import NodeAnswer, merge_node
from qdist.calibration.run import complete
from qdist.calibration.settings import CalibrationSettings
from qdist.calibration.tree import MergeNode
from qdist.calibration.work import ShardTask, Work, open_shards, open_work

__all__ = [
    "CalibrationJob",
    "CalibrationSettings",
    "MergeNode",
    "Merged",
    "NodeAnswer",
    "ShardTask",
    "Work",
    "calibrate_here",
    "complete",
    "finish",
    "first_feeds",
    "identify",
    "input_specs",
    "load_batch",
    "load_phases",
    "merge_node",
    "open_shards",
    "open_work",
    "prepare",
    "recall",
    "run_shard",
]

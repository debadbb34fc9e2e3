"""Distributed, data-parallel post-training-quantization calibration for ONNX models.

The packages, in the order in which data flows through them:

``model``      loads an ONNX graph, freezes it, and says which tensors to measure.
``data``       names the calibration samples by content and cuts them into shards.
``stats``      turns one shard into a record of statistics; records merge exactly.
``store``      keeps the records in a folder or bucket, each written once or not at all.
``threshold``  finds clipping ranges from histograms, and says when they have stopped moving.
``calibration``  a whole calibration, of the parts above.
``selection``  the samples that stand for a larger set.
``plan``       decides how each layer is quantized and with which numbers.
``simulate``   writes the quantized graph that is scored.
``emit``       writes the artifact that ships, and checks it.
``evaluate``   scores a model and compares it layer by layer with the float one.
``search``     proposes plans to try; pure strategies that are asked and told.
``report``     tables and pages for people.

None of these knows Ray, Hydra or MLflow: a whole calibration runs in one process. ``actors``
distributes it; ``qdist.cli`` is the command line.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qdist")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]

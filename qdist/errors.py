"""One tree of errors that users can act on.

Every error says what it concerns, what was found, what was expected and how to mend it, and
carries a code that stays the same between releases. ``str(error)`` is one line.
"""

from __future__ import annotations

from typing import Any

CODES: dict[str, str] = {
    # 1xx: configuration and command line
    "QD101": "unknown command",
    "QD102": "unknown configuration key",
    "QD103": "unknown choice of a configuration group",
    "QD104": "a value of the wrong type or out of range",
    "QD105": "a required value is missing",
    "QD106": "the configuration cannot be read",
    "QD107": "two settings contradict each other",
    "QD108": "a user's function cannot be loaded",
    # 2xx: models
    "QD201": "model file not found",
    "QD202": "not an ONNX model",
    "QD203": "the ONNX model is truncated or damaged",
    "QD204": "external data of the model is missing or too short",
    "QD205": "ONNX Runtime refuses the model",
    "QD206": "the model cannot be converted to the needed opset",
    "QD207": "a change to the graph altered the float result",
    "QD208": "unknown tensor or layer name",
    "QD209": "nothing in the model can be measured or quantized",
    "QD210": "execution provider not available",
    "QD211": "the model does not fit the memory budget",
    "QD212": "the model cannot be smoothed",
    # 3xx: data
    "QD301": "data file or folder not found",
    "QD302": "the calibration set is empty",
    "QD303": "a sample has the wrong shape",
    "QD304": "a sample has the wrong data type",
    "QD305": "a sample holds NaN or infinity",
    "QD306": "a sample cannot be read",
    "QD307": "inputs of the model and of the data set differ",
    "QD308": "labels are missing or do not fit the samples",
    "QD309": "an activation is NaN",
    "QD310": "the user's inference function failed",
    "QD311": "the number of samples does not fit",
    # 4xx: store and statistics
    "QD401": "the store belongs to another calibration",
    "QD402": "no finished calibration in the store",
    "QD403": "a stored record is damaged",
    "QD404": "the store cannot be written",
    "QD405": "the store has a schema that this version does not read",
    "QD406": "the store holds no statistics for a tensor",
    "QD407": "workers of different execution fingerprints",
    "QD408": "the store cannot be reached",
    "QD409": "a statistics file cannot be used",
    # 5xx: thresholds and plans
    "QD501": "unknown threshold method",
    "QD502": "a threshold method got a parameter that it does not take",
    "QD503": "a rule matches no layer",
    "QD504": "the plan file cannot be read",
    "QD505": "the plan belongs to another model",
    "QD506": "unknown precision",
    "QD507": "the target does not support what the plan asks for",
    "QD508": "a file of rules cannot be used",
    "QD509": "neighbouring layers must agree",
    "QD511": "the latency table cannot be used",
    "QD512": "the latency table lacks a layer",
    # 6xx: artifacts
    "QD601": "the artifact does not pass the ONNX checker",
    "QD602": "ONNX Runtime does not load the artifact",
    "QD603": "the output folder cannot be written",
    "QD604": "artifact not found",
    # 7xx: evaluation and search
    "QD701": "unknown metric",
    "QD702": "the evaluation command failed",
    "QD703": "the evaluation command ran out of time",
    "QD704": "the evaluation gave no usable metric",
    "QD705": "the evaluation function failed",
    "QD706": "every trial of the search failed",
    "QD707": "the evaluation command cannot be started",
    # 8xx: the Ray cluster
    "QD801": "the Ray cluster cannot be reached",
    "QD802": "the cluster lacks the resources asked for",
    "QD803": "a task failed on every attempt",
    "QD804": "every worker died",
    # 9xx: tracking and environment
    "QD901": "the MLflow server cannot be reached",
    "QD902": "the MLflow database cannot be used",
}
"""Code -> what it means, in a few words. Codes are never reused."""


class QdistError(Exception):
    """An error a user can mend.

    Fields (all ``str``): ``code`` (a key of `CODES`), ``where`` (file, layer, tensor or key it
    concerns), ``got``, ``expected``, ``mend``. Survives pickling, so it crosses processes whole.
    """

    def __init__(self, code: str, *, where: str, got: str, expected: str, mend: str) -> None:
        if code not in CODES:
            raise KeyError(f"unknown error code {code!r}")
        self.code = code
        self.where = where
        self.got = got
        self.expected = expected
        self.mend = mend
        super().__init__(str(self))

    def __str__(self) -> str:
        text = (
            f"{self.code} {CODES[self.code]}: {self.where}: got {self.got}; "
            f"expected {self.expected}; to mend it: {self.mend}"
        )
        return " ".join(text.split())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            type(self),
            self.code,
            {
                "where": self.where,
                "got": self.got,
                "expected": self.expected,
                "mend": self.mend,
            },
        )


def _rebuild(kind: type[QdistError], code: str, fields: dict[str, str]) -> QdistError:
    return kind(code, **fields)


class ConfigError(QdistError, ValueError):
    """1xx: what the user configured cannot be run."""


class ModelError(QdistError, ValueError):
    """2xx: the model cannot be read, run or rewritten."""


class DataError(QdistError, ValueError):
    """3xx: the calibration or evaluation data cannot be used."""


class StoreError(QdistError, OSError):
    """4xx: the calibration store cannot be used."""


class PlanError(QdistError, ValueError):
    """5xx: thresholds, rules and plans."""


class ArtifactError(QdistError, OSError):
    """6xx: the artifact cannot be written or is not valid."""


class EvaluationError(QdistError, RuntimeError):
    """7xx: the user's evaluation failed."""


class ClusterError(QdistError, RuntimeError):
    """8xx: Ray, its nodes and its workers."""


class TrackingError(QdistError, RuntimeError):
    """9xx: MLflow and the environment."""

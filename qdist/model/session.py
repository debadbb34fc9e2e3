"""ONNX Runtime sessions, with the settings the project's laws ask for.

Two kinds. A *measuring* session runs a frozen graph with graph optimization off, since with it
on, one more tap changes which operators fuse and so the bits of other tensors (law 1). A
*scoring* session runs a model exactly as written: ``session.disable_quant_qdq`` keeps ONNX
Runtime from replacing Q/DQ pairs with integer kernels whose results depend on the processor.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from qdist.digest import digest_json
from qdist.errors import ModelError
from qdist.model.precision import mentions

ORT_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
"""What ONNX Runtime raises: it has no common base below `Exception`."""

_FLAGS_THAT_MATTER = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    # ARM
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a model is run: ONNX Runtime provider and intra-op threads."""

    provider: str = "CPUExecutionProvider"
    n_threads: int = 1

    def __post_init__(self) -> None:
        if self.n_threads < 1:
            raise ValueError(f"n_threads must be at least 1, got {self.n_threads}")


def check_provider(provider: str) -> None:
    """Raise QD210 unless this machine's ONNX Runtime has the provider."""
    available = ort.get_available_providers()
    if provider not in available:
        raise ModelError(
            "QD210",
            where=f"model.provider={provider}",
            got="a provider that this ONNX Runtime lacks",
            expected=f"one of {', '.join(available)}",
            mend="choose one of these, or install the ONNX Runtime build that has it",
        )


def fingerprint(execution: Execution) -> dict[str, Any]:
    """What can change the last bit of a float result, as JSON.

    Part of a calibration's identity: records made under different fingerprints are not merged
    silently.
    """
    return {
        "onnxruntime": ort.__version__,
        "provider": execution.provider,
        "machine": platform.machine(),
        "cpu_flags": _cpu_flags(),
        "n_threads": execution.n_threads,
    }


def fingerprint_digest(execution: Execution) -> str:
    """Hex SHA-256 of `fingerprint`."""
    return digest_json(fingerprint(execution))


def measuring_session(
    model: bytes | Path, data_folder: Path | None, execution: Execution
) -> ort.InferenceSession:
    """A session with graph optimization off, for a frozen or tapped graph.

    ``data_folder`` is where external data lies when ``model`` is bytes. Raises QD205.
    """
    return open_session(model, data_folder, execution, measuring_options(execution))


def scoring_session(
    model: bytes | Path, execution: Execution, data_folder: Path | None = None
) -> ort.InferenceSession:
    """A session that computes the model as it is written, for float and quantized models.

    Raises QD205.
    """
    options = session_options(execution)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return open_session(model, data_folder, execution, options)


def folding_session(model: Path, execution: Execution) -> ort.InferenceSession:
    """A session that computes what depends on constants alone once, when it is made, and every
    other node as it is written, in the order in which it is written. Dequantized weights are held
    then, and not made again in every run. Float operators may be fused. Raises QD205."""
    options = measuring_options(execution)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Planning which tensor may lie where another one was takes time that grows with the square of
    # the number of nodes: 40 s for 11 thousand. The arena gives freed memory out again without it.
    options.enable_mem_reuse = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return open_session(model, None, execution, options)


def deployed_session(model: Path, execution: Execution) -> ort.InferenceSession:
    """A session with ONNX Runtime's defaults: what a user's application would get on this CPU."""
    return open_session(model, None, execution, session_options(execution))


def run(
    session: ort.InferenceSession, outputs: list[str] | None, feeds: dict[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Run a session. Raises QD205 with ONNX Runtime's own words when it fails."""
    try:
        return list(session.run(outputs, feeds))
    except (*ORT_ERRORS, RuntimeError, ValueError) as error:
        raise ModelError(
            "QD205",
            where="running the model",
            got=_first_line(error),
            expected="a run without error on inputs "
            + ", ".join(f"{name}{list(array.shape)}" for name, array in feeds.items()),
            mend="check that the sample's shapes are ones the model was exported for; where memory "
            "ran out, lower calibration.micro_batch, evaluation.batch or compare.batch",
        ) from error


def measuring_options(execution: Execution) -> ort.SessionOptions:
    """What all measuring sessions have in common: no graph optimization, and nodes run in the order
    in which they are written. ONNX Runtime's own order computes all that depends on constants alone
    first and keeps it: of 128 MiB of weights in float16, all in float32 at once (392 MiB in place
    of 152)."""
    options = session_options(execution)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return options


def session_options(execution: Execution) -> ort.SessionOptions:
    """What all sessions of this library have in common: threads, and no spinning."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = execution.n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    model: bytes | Path,
    data_folder: Path | None,
    execution: Execution,
    options: ort.SessionOptions,
) -> ort.InferenceSession:
    """A session with these options. ``data_folder``: where external data of a model given as bytes
    lies. Raises QD205 where ONNX Runtime refuses the model, QD210 for an unknown provider."""
    check_provider(execution.provider)
    where = str(model) if isinstance(model, Path) else "the rewritten graph"
    if data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_folder)
        )
    try:
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            sess_options=options,
            providers=[execution.provider],
        )
    except ORT_ERRORS as error:
        raise ModelError(
            "QD205",
            where=where,
            got=_first_line(error),
            expected="a model that ONNX Runtime can load",
            mend=_mend(model),
        ) from error


def _mend(model: bytes | Path) -> str:
    if _speaks_of_bfloat16(model):
        return (
            "export the model in float32, or keep only its weights in bfloat16, with a Cast to "
            "float32 behind each: ONNX Runtime lacks this operator in bfloat16"
        )
    return "check the model with onnx.checker and export it again"


def _speaks_of_bfloat16(model: bytes | Path) -> bool:
    try:
        if isinstance(model, Path):
            proto = onnx.load(model, load_external_data=False)
        else:
            proto = onnx.ModelProto.FromString(model)
    except (OSError, DecodeError):
        return False
    return mentions(proto, {onnx.TensorProto.BFLOAT16})


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__


def _cpu_flags() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    present = set(line.split(":", 1)[1].split())
                    return [flag for flag in _FLAGS_THAT_MATTER if flag in present]
    except OSError:
        return [platform.processor()]
    return [platform.processor()]


def as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """A float tensor as float32, without a copy where it already is one."""
    return array.astype(np.float32, copy=False)

"""Scoring by a class of the user's own, after the contract of SlimAI's custom metrics.

The class NAME stands in NAME.py in a plugin folder and inherits `custom_metric_base`::

    from file_utils import blob_file_reader
    from metric import metric_register, custom_metric_base

    class NAME(custom_metric_base):
        def init_params(self, metric_input): ...
        def load_and_analysis(self, blobsfile, imglist): ...
        def accumulate_results(self, result): ...

The vendor documents the four members and what they are for, not what they are called with. Our
reading: ``init_params`` gets ``metric_input`` as it is written. ``load_and_analysis`` is called
once, with the paths of two text files that have a line for each sample: the paths of its blobs,
with spaces between, in the order of ``replace_output``; and its name. It returns the score, or
several numbers of which the first is the score. ``accumulate_results`` gets that, and what it
returns, if anything, takes its place. ``blob_file_reader(path)`` gives dequantized
``float32[N, C, H, W]``.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import DataSource
from qdist.errors import ConfigError, QdistError
from qdist.evaluate.blob import as_nchw, file_names, read_blob, sample_names, write_blob
from qdist.evaluate.builtin import Runner, batches
from qdist.evaluate.report import EvalReport, named_numbers, unusable
from qdist.evaluate.user_code import code_failed
from qdist.files import make_folder, write_text
from qdist.targets import load_module

_MEMBERS = ("init_params", "load_and_analysis", "accumulate_results")


class custom_metric_base(ABC):  # noqa: N801 (the vendor's name)
    """What a metric class inherits."""

    @abstractmethod
    def init_params(self, metric_input: str) -> None:
        """Read the parameters of the configuration."""

    @abstractmethod
    def load_and_analysis(self, blobsfile: str, imglist: str) -> Any:
        """The score in [0, 1], larger is better; or several numbers, the score first."""

    @abstractmethod
    def accumulate_results(self, result: Any) -> Any:
        """What takes the place of the result; None for nothing."""


def blob_file_reader(path: str) -> NDArray[np.float32]:
    """The values of a blob, dequantized, ``float32[N, C, H, W]``. Raises QD306."""
    coefficient, values = read_blob(Path(path))
    return (values / np.float32(coefficient)).astype(np.float32)


def metric_register(found: Any) -> Any:
    """A decorator, bare or with a name; the class is found by its name in any case."""
    return found if isinstance(found, type) else lambda kind: kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassEvaluation:
    """A class that scores the outputs for a data set.

    source: the samples; labels are the class's own business.
    metric_cls, metric_input: of the vendor's configuration.
    folders: where ``<metric_cls>.py`` is looked for, in this order.
    replace_output: the outputs that the class gets, in its order; empty: the model's.
    batch: samples a run.
    """

    source: DataSource
    metric_cls: str
    folders: tuple[Path, ...]
    metric_input: str = ""
    replace_output: tuple[str, ...] = ()
    batch: int = 8

    def run(self, runner: Runner, scratch: Path) -> EvalReport:
        """Run a model, write its outputs as blobs below ``scratch``, and let the class score them.

        Raises `ConfigError` QD104 (no such output) and QD108, `EvaluationError` QD704 and QD705,
        `DataError`, QD205, QD603.
        """
        outputs = self.ordered(runner.output_names)
        parts = file_names(outputs)
        keys = self.source.keys()
        samples = sample_names(keys, [list(parts.values())])
        begin = time.perf_counter()
        with TemporaryDirectory(prefix="qdist-class-", dir=make_folder(scratch)) as name:
            folder = Path(name)
            for run in batches(self.source, runner.inputs, self.batch):
                values = dict(zip(runner.output_names, runner.run(run.feeds), strict=True))
                for i, key in enumerate(run.keys):
                    for output in outputs:
                        path = folder / f"{samples[key]}_{parts[output]}.blob"
                        write_blob(
                            path, as_nchw(_sample(values[output], i, run.keys), is_output=True)
                        )
            return self.score(
                folder, [samples[key] for key in keys], list(parts.values()), keys, begin=begin
            )

    def score(
        self,
        folder: Path,
        samples: Sequence[str],
        outputs: Sequence[str],
        names: Sequence[str],
        *,
        begin: float | None = None,
    ) -> EvalReport:
        """Let the class score the blobs ``<sample>_<output>.blob`` of ``folder``.

        ``names``: of the samples, as the class is told them. Raises QD108, QD704, QD705.
        """
        begin = time.perf_counter() if begin is None else begin
        kind = load_class(self.metric_cls, self.folders)
        with TemporaryDirectory(prefix="qdist-class-") as lists:
            place = _without_spaces(folder, Path(lists))
            blobs = (
                " ".join(str(place / f"{sample}_{output}.blob") for output in outputs)
                for sample in samples
            )
            blobs_file = write_text(Path(lists) / "blobs.txt", "".join(f"{b}\n" for b in blobs))
            names_file = write_text(Path(lists) / "images.txt", "".join(f"{n}\n" for n in names))
            try:
                metric = kind()
                metric.init_params(self.metric_input)
                result = metric.load_and_analysis(str(blobs_file), str(names_file))
                accumulated = metric.accumulate_results(result)
            except QdistError:
                raise
            except (Exception, SystemExit) as error:
                raise code_failed(error, self.metric_cls, kind) from error
        numbers = self._numbers(result if accumulated is None else accumulated)
        return EvalReport(
            score=numbers[self.metric_cls],
            metric=self.metric_cls,
            higher_is_better=True,
            metrics=numbers,
            n_samples=len(samples),
            seconds=time.perf_counter() - begin,
        )

    def ordered(self, outputs: Sequence[str]) -> list[str]:
        """The outputs that the class gets. Raises QD104 for one that there is not."""
        for name in self.replace_output:
            if name not in outputs:
                raise ConfigError(
                    "QD104",
                    where="evaluation.replace_output",
                    got=repr(name),
                    expected=f"some of {', '.join(outputs)}",
                    mend="name outputs of the model",
                )
        return list(self.replace_output or outputs)

    def _numbers(self, result: Any) -> dict[str, float]:
        """The named numbers of a result, the score under the class's name."""
        values = list(result) if isinstance(result, tuple | list) else [result]
        found = [next(iter(named_numbers(value).values()), None) for value in values]
        score = found[0] if found else None
        if score is None or not 0 <= score <= 1:
            raise unusable(
                self.metric_cls,
                got=f"{result!r:.200}",
                expected="a score from 0 to 1, larger is better; first, where there are several",
                mend="scale what load_and_analysis returns to this range",
            )
        rest = {f"{self.metric_cls}_{i}": v for i, v in enumerate(found) if i and v is not None}
        return {self.metric_cls: score, **rest}


def load_class(name: str, folders: Sequence[Path]) -> type[Any]:
    """The class ``name`` of ``name``.py in the first of ``folders`` that has it. Raises QD108."""
    file = next((f / f"{name}.py" for f in folders if (f / f"{name}.py").is_file()), None)
    if file is None:
        raise _unloadable(
            name,
            f"no {name}.py in {', '.join(map(str, folders))}",
            f"the file {name}.py with the class {name}",
            "put it there, or correct evaluation.folder or CUSTOM_METRIC_PATH",
        )
    with _vendor_modules():
        found = vars(load_module(file)).get(name)
    lacking = [member for member in _MEMBERS if not callable(getattr(found, member, None))]
    if not isinstance(found, type) or lacking:
        raise _unloadable(
            str(file),
            f"no class {name}"
            if not isinstance(found, type)
            else f"{name} without {', '.join(lacking)}",
            f"a class {name} with {', '.join(_MEMBERS)}",
            "define it there, as a subclass of custom_metric_base",
        )
    return found


def _without_spaces(folder: Path, links: Path) -> Path:
    """A path of ``folder`` that can be told from its neighbours in a line: a link in ``links``
    where its own has spaces."""
    if not any(letter.isspace() for letter in str(folder)):
        return folder
    link = links / "blobs"
    link.symlink_to(folder.absolute(), target_is_directory=True)
    return link


def _unloadable(where: str, got: str, expected: str, mend: str) -> ConfigError:
    return ConfigError("QD108", where=where, got=got, expected=expected, mend=mend)


def _sample(values: NDArray[Any], i: int, keys: Sequence[str]) -> NDArray[Any]:
    """Sample ``i`` of a run's output, with a sample axis of 1; one sample's is all of it."""
    if len(keys) == 1:
        return values
    if values.ndim == 0 or values.shape[0] != len(keys):
        raise unusable(
            f"samples {keys[0]} to {keys[-1]}",
            got=f"an output of shape {list(values.shape)}",
            expected=f"axis 0 of {len(keys)}, the samples",
            mend="evaluate one sample at a time (evaluation.batch=1)",
        )
    return values[i : i + 1]


@contextmanager
def _vendor_modules() -> Iterator[None]:
    """The two modules that the vendor has classes import, while one is loaded."""
    modules = {"file_utils": ModuleType("file_utils"), "metric": ModuleType("metric")}
    vars(modules["file_utils"])["blob_file_reader"] = blob_file_reader
    vars(modules["metric"]).update(
        metric_register=metric_register, custom_metric_base=custom_metric_base
    )
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module

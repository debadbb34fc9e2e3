"""What a user decides about measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qdist.stats.spec import StatisticsSpec

LIGHT_BYTES = 256 << 20
"""Weights of a model that runs a sample in a fraction of a second, as a rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """``micro_batch``: samples per run of the model, at most. ``shard_samples``: samples per shard
    (a shard is whole micro-batches); None lets `samples_per_shard` choose. ``taps``: ``all``,
    ``compute``, or names and patterns of tensors. ``on_nan``: ``error`` or ``report``.
    ``memory_budget_bytes``: what one worker may hold; None runs the model in one piece.
    ``n_blocks``: equal blocks of the samples whose statistics are kept apart too (Icraft's
    ``batch``); 1 keeps none apart. ``mask_input``: the input that is zero where a position is
    padding, which then counts nowhere; ``sequence_axes``: of tensors where the user knows better
    than their shapes tell. ``bucketed``: micro-batches gather samples of one length from anywhere
    in a generation. ``n_workers``: how many will share the work, so that each gets some.
    """

    micro_batch: int = 4
    shard_samples: int | None = None
    taps: str | tuple[str, ...] = "all"
    on_nan: str = "error"
    statistics: StatisticsSpec = field(default_factory=StatisticsSpec)
    memory_budget_bytes: int | None = None
    n_blocks: int = 1
    mask_input: str | None = None
    sequence_axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bucketed: bool = False
    n_workers: int = 1

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or (self.shard_samples is not None and self.shard_samples < 1):
            raise ValueError("micro_batch and shard_samples must be at least 1")
        if self.n_blocks < 1 or self.n_workers < 1:
            raise ValueError("n_blocks and n_workers must be at least 1")

    def samples_per_shard(
        self, n_samples: int, *, n_segments: int = 1, weight_bytes: int | None = None
    ) -> int:
        """Samples per shard of ``n_samples`` in all. It changes no result, only the speed.

        Left to us: 16, few enough that no worker waits long for the last one, but never so few that
        there are more than 512 records to write and to merge. A model in segments reads all its
        weights once a shard, which 64 samples are to share; a model of few ``weight_bytes`` (None:
        unknown) is through 64 in seconds, in which a record would cost as much as a few of them.
        Where there are several workers, each gets four shards if that leaves 16 samples to each
        shard, 32 of a light model, so that the last one to finish is not far behind; and one at
        least.
        """
        is_light = weight_bytes is not None and weight_bytes <= LIGHT_BYTES
        wanted = max(64 if n_segments > 1 or is_light else 16, math.ceil(n_samples / 512))
        if self.n_workers > 1:
            share = math.ceil(n_samples / self.n_workers)
            quarter = math.ceil(share / 4) if n_segments == 1 else share
            wanted = min(wanted, max(quarter, min(32 if is_light else 16, share)))
        return self.shard_samples or wanted

"""What the configuration group ``search`` may hold."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qdist.cli.data_schema import Group


class SearchConfig(Group):
    """How the search goes."""

    strategy: str = Field(
        "pareto", description="pareto, greedy, or a class of your own, FILE.py:Class"
    )
    max_trials: int = Field(12, ge=1, description="the plain plan included")
    time_limit_s: float | None = Field(
        None, gt=0, description="end the search after so long, with the best so far; null: never"
    )
    stop_score: float | None = Field(
        None,
        description="a limit: end after the round in which a trial scores as well; null: never. "
        "What is looked for stays the same, see search.target",
    )
    low: str | None = Field("w4a8", description="precision to lower insensitive layers to")
    high: str | None = Field("w8a16", description="precision to raise sensitive layers to")
    saturations: list[str] = Field(description="threshold methods to try")
    first_share: float = Field(
        0.5, gt=0, le=1, description="share of layers that greedy moves at first"
    )
    sensitivity_samples: int = Field(32, ge=1, description="samples to measure layers on")
    precisions: list[str] = Field(
        [], description="precisions to choose from; []: quantization.precision, low and high"
    )
    granularities: list[str] = Field(
        [], description="of weights, beside quantization.granularity: tensor, channel, block=N, ..."
    )
    activation_granularities: list[str] = Field(
        [], description="of activations, beside the plain one: tensor, channel, token"
    )
    weight_range_bits: list[int] = Field([], description="so many of a weight's bits, beside all")
    activation_range_bits: list[int] = Field(
        [], description="so many of an activation's bits, beside all"
    )
    end_to_end: Literal["relative", "kl"] | None = Field(
        None,
        description="measure what each group does to the model's outputs too: squared relative "
        "error, or KL of logits; null: its own outputs alone",
    )
    pairs: int = Field(
        0, ge=0, description="neighbouring groups to measure together, with search.end_to_end"
    )
    together: Literal["none", "groups", "knight"] = Field(
        "groups",
        description="what changes together: concats, residual sums and Q/K/V, or by Knight's rules",
    )
    cost: Literal["bytes", "bit_operations", "latency"] = Field(
        "bit_operations",
        description="what plans cost: bit operations, bytes of weights, or search.latency",
    )
    latency: str | None = Field(None, description="a CSV file of operator,dtype,us")
    budget: float | str | None = Field(
        None, description="largest cost of the answer, or 60% of the plain plan's; null: any"
    )
    target: float | None = Field(
        None,
        description="what is looked for: the cheapest plan of this score; null: the best score. It "
        "ends no search early, see search.stop_score",
    )
    trials_per_round: int = Field(4, ge=1, description="plans that pareto verifies at a time")
    n_budgets: int = Field(40, ge=2, description="points of the front that pareto predicts")
    patience: int = Field(2, ge=1, description="rounds without a better front that end pareto")
    clipping: list[str] = Field(
        ["percentile:99.9", "percentile:99.5", "percentile:99", "percentile:99.97"],
        description="threshold methods that pareto tries on whole plans, as all layers of one "
        "width have them; the first of each kind first, its neighbours where it helps",
    )
    include_greedy: bool = Field(
        False, description="run greedy beside pareto, with as many trials more"
    )
    artifacts: Literal["all", "front", "best"] = Field(
        "all",
        description="whose models stay in the folder trials/ once the search has ended; plans and "
        "results of all do",
    )
    options: dict[str, Any] = Field(
        {}, description="of a vendor's strategy (docs/search-vendors.md), or for one of your own"
    )

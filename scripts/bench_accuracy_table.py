"""The accuracy benchmark's figures as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Model = dict[str, Any]
Row = dict[str, Any]
SIGNS = {False: "asymmetric", True: "symmetric"}


def markdown(results: dict[str, Any]) -> str:
    """All tables: the summary, our default against ONNX Runtime's best, scores and coverage, every
    method, 16 bits, pickers, and every row of each model."""
    models = {n: m for n, m in results["models"].items() if "rows" in m}
    about = results["about"]
    lines = [
        f"{about['machine']['processor']}; {about['total_s'] / 60:.0f} minutes with --jobs "
        f"{about['jobs']}, {about.get('cpu_s', 0) / 60:.0f} of processor time, "
        f"{about['peak_memory_mb'] / 1024:.1f} GB a process at most.",
        *(f"{name}: not finished." for name, m in models.items() if "unfinished" in m),
        "",
        "### Our default, and the best of ONNX Runtime's",
        "",
        *_against(models),
        "",
        "### Scores of the default, and coverage",
        "",
        *_defaults(models),
        "",
        "### Methods: agreement / SQNR in dB",
        "",
        *_overview(models),
        "",
        "### 16 bits",
        "",
        *_wide(models),
        "",
        "### Mixed precision",
        "",
        *_mixed(models),
    ]
    for name, model in models.items():
        lines += ["", f"### {name}", "", *_methods(model)]
    return "\n".join(lines)


def _against(models: dict[str, Model]) -> Iterable[str]:
    head = ["model", "activations", "metric", "ours", "theirs", "best of theirs", "ours - theirs"]
    head += ["right alone, ours : theirs"]
    rows = [
        [
            name,
            SIGNS[entry["symmetric"]],
            entry["metric"],
            _number(entry["ours"]),
            _number(entry["theirs"]),
            entry["best"],
            _interval(entry),
            _apart(entry["discordant"]),
        ]
        for name, model in models.items()
        for entry in model["against_ort"]
    ]
    return table(head, rows)


def _overview(models: dict[str, Model]) -> Iterable[str]:
    """One row for each method, granularity and symmetry, one column for each model."""
    found: dict[tuple[str, str, str, bool], dict[str, str]] = {}
    for name, model in models.items():
        for row in model["rows"]:
            if row["precision"] != "int8":
                continue
            key = (row["tool"], row["method"], row["granularity"], row["symmetric"])
            values = "-" if "error" in row else f"{row['agreement']:.3f} / {row['sqnr_db']:.1f}"
            found.setdefault(key, {})[name] = values
    head = ["tool", "method", "weights", "activations", *models]
    rows = [
        [tool, method, f"per {grain}", SIGNS[symmetric], *(cells.get(name, "") for name in models)]
        for (tool, method, grain, symmetric), cells in sorted(
            found.items(), key=lambda e: (e[0][3], e[0][2])
        )
    ]
    return table(head, rows)


def _defaults(models: dict[str, Model]) -> Iterable[str]:
    """The score in each precision, and what is quantized by either side where it is int8."""
    head = ["model", "metric", "float", "weights", "activations", "int8", "matmuls and convs"]
    head += ["quantized activations: ours", "theirs"]
    rows = []
    for name, model in models.items():
        own = "" if model["float"] is None else _number(model["float"])
        for row in model["rows"]:
            if row["precision"] != "int8" or row["method"] != "auto":
                continue
            theirs = {
                str(other["n_activations"])
                for other in model["rows"]
                if other["tool"] != row["tool"]
                and other["symmetric"] == row["symmetric"]
                and "error" not in other
            }
            first = [name, model["metric"], own, f"per {row['granularity']}"]
            rows.append(
                [
                    *first,
                    SIGNS[row["symmetric"]],
                    _number(row["score"]),
                    f"{row['coverage']:.0%} of {row['n_compute']}",
                    str(row["n_activations"]),
                    ", ".join(sorted(theirs)),
                ]
            )
    return table(head, rows)


def _wide(models: dict[str, Model]) -> Iterable[str]:
    head = ["model", "precision", "metric", "less the float model's score"]
    rows = [
        [name, entry["precision"], model["metric"], _interval(entry)]
        for name, model in models.items()
        for entry in model["wide_against_float"]
    ]
    return table(head, rows)


def _mixed(models: dict[str, Model]) -> Iterable[str]:
    head = ["model", "activations", "picker", "raised", "score", "agreement", "gap closed"]
    rows = []
    for name, model in models.items():
        for row in model["mixed"]:
            raised = f"{row['n_raised']} of {row['n_layers']}"
            if "error" in row:
                found = [row["error"], "", ""]
            else:
                found = [_number(row["score"]), _number(row["agreement"]), f"{row['closed']:.0%}"]
            rows.append([name, SIGNS[row["symmetric"]], row["picker"], raised, *found])
    return table(head, rows)


def _methods(model: Model) -> Iterable[str]:
    own = "-" if model["float"] is None else _number(model["float"])
    yield (
        f"{model['metric']}, float {own}; {model['n_calibration']} samples calibrate, "
        f"{model['n_evaluation']} score."
    )
    yield ""
    head = ["tool", "method", "precision", "weights", "activations", model["metric"], "agreement"]
    head += ["SQNR dB", "matmuls, convs", "quantized activations"]
    rows = []
    for row in model["rows"]:
        first = [row["tool"], row["method"], row["precision"], f"per {row['granularity']}"]
        first.append("float" if row["precision"] in ("bf16", "fp16") else SIGNS[row["symmetric"]])
        if "error" in row:
            rows.append([*first, row["error"].replace("|", "/"), "", "", "", ""])
            continue
        rows.append(
            [
                *first,
                _number(row["score"]),
                _number(row["agreement"]),
                f"{row['sqnr_db']:.2f}",
                f"{row['coverage']:.0%} of {row['n_compute']}",
                str(row["n_activations"]),
            ]
        )
    yield from table(head, rows)


def _interval(entry: Row) -> str:
    worse = " **worse**" if entry["is_worse"] else ""
    return f"{entry['difference']:+.4f} ({entry['low']:+.4f} .. {entry['high']:+.4f}){worse}"


def _apart(entry: Row | None) -> str:
    return "" if entry is None else f"{entry['ours']} : {entry['theirs']} (p = {entry['p']:.2f})"


def _number(value: float) -> str:
    return f"{value:.4f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """The lines of a table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"

"""What ``--help`` prints: for people, and quickly, without composing a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from qdist.cli.groups import choices
from qdist.cli.keys import keys_of
from qdist.cli.schema import COMMANDS, CommandSettings

EXAMPLES = {
    "calibrate": "qdist calibrate model=digits_vit data=digits cluster.workers=2",
    "quantize": "qdist quantize model=digits_vit quantization.saturation=kl",
    "evaluate": "qdist evaluate model=digits_vit data=digits evaluation=accuracy",
    "compare": "qdist compare model=digits_vit data=digits compare.dump=3",
    "tune": "qdist tune model=digits_vit data=digits evaluation=accuracy search.max_trials=12",
    "emit": "qdist emit model=digits_vit artifact=vit_int8.onnx",
    "show": "qdist show qdist-runs/digits_vit/plan.json",
    "store": "qdist store export qdist-runs/digits_vit/calibration.zarr digits_vit.qdist.zip",
}
PLAIN = {
    "show": "Print what is in a store, a plan, an artifact or a model, as a table.",
    "store": "Export, import and tidy up calibration stores.",
}
"""Commands without a configuration."""
SUMMARIES = {
    **{name: (inspect.getdoc(schema) or "").splitlines()[0] for name, schema in COMMANDS.items()},
    **PLAIN,
}


def overview() -> str:
    """``qdist --help``."""
    lines = [
        "qdist: distributed post-training-quantization calibration for ONNX models",
        "",
        "usage: qdist COMMAND [group=choice] [group.key=value] ...",
        "",
        "commands, in the order of a first run:",
        *(f"  {name:<10} {text}" for name, text in SUMMARIES.items()),
        "",
        "qdist COMMAND --help    groups, keys and an example of one command",
        "qdist --version         the version",
        "",
        "A first run, on data that ships with qdist:",
        f"  {EXAMPLES['tune']}",
    ]
    return "\n".join(lines)


def command_help(command: str, extra: Path | None = None) -> str:
    """``qdist COMMAND --help``; ``extra``: the folder given as --config-dir."""
    if command == "show":
        return _show_help()
    if command == "store":
        return _store_help()
    schema = COMMANDS[command]
    lines = [
        f"usage: qdist {command} [group=choice] [group.key=value] ...",
        "",
        inspect.getdoc(schema) or "",
        "",
        "example:",
        f"  {EXAMPLES[command]}",
        "",
        "configuration groups and their choices:",
        *_groups(schema, extra),
        "",
        "keys (group.key=value) and their defaults; other choices of a group have others:",
        *_keys(command, schema),
        "",
        "Hydra's own options:",
        "  --cfg job --resolve    print the configuration that these words give, and stop",
        "  --multirun, -m         run every combination of key=a,b,c",
        "  --config-dir FOLDER    find your own group files too: FOLDER/model/mine.yaml",
        "  --hydra-help           the others",
    ]
    return "\n".join(lines)


def _groups(schema: type[CommandSettings], extra: Path | None) -> Iterator[str]:
    for name in schema.model_fields:
        known = choices(name, extra)
        if known:
            yield f"  {name}: {', '.join(known)}"


def _keys(command: str, schema: type[CommandSettings]) -> Iterator[str]:
    for key in keys_of(command, schema):
        label = key.name + (f" ({', '.join(key.kinds)})" if key.kinds else "")
        default = f"(default: {key.default})" if key.default else ""
        if key.default is None:
            default = "(required)"
        yield f"  {label:<34} {' '.join(filter(None, (key.description, default)))}".rstrip()


def _show_help() -> str:
    return "\n".join(
        [
            "usage: qdist show PATH [PATH]",
            "       qdist show thresholds STORE [--method NAME] [--bits N] [--symmetric]",
            "",
            SUMMARIES["show"],
            "",
            "PATH   a calibration store (folder), a plan (.json), a quantized or a float model",
            "       (.onnx). Two plans: what differs between them.",
            "thresholds STORE   the ranges of a method, the least certain first: a bootstrap",
            "       interval over blocks of samples, and how many more samples it would take",
            "",
            "example:",
            f"  {EXAMPLES['show']}",
            "  qdist show plan_a.json plan_b.json",
            "  qdist show thresholds qdist-runs/digits_vit/calibration.zarr --method kl",
            "",
            "options:",
            "  --rows N       print at most N rows of a table (default 40; 0: all)",
            "  --method NAME  of quantization.saturation, but max (default mse)",
            "  --bits N       4, 8 or 16 (default 8); --symmetric: with zero point 0",
            "  --width W      width of an interval, as a share of the range, that more samples",
            "                 are to reach (default 0.05)",
            "  --resamples N  how often blocks are drawn (default 100)",
            "",
            "configuration groups: none; show reads files alone.",
        ]
    )


def _store_help() -> str:
    return "\n".join(
        [
            "usage: qdist store export STORE FILE",
            "       qdist store import FILE STORE",
            "       qdist store sweep STORE",
            "",
            SUMMARIES["store"],
            "",
            "export   write the latest finished calibration to one file",
            "import   put such a file into a store, made where there is none; refused for the",
            "         store of another model. Calibrating goes on from it",
            "sweep    remove what killed processes left behind, and superseded merges",
            "",
            "STORE    a folder, or an s3://, gs:// or az:// URL",
            "",
            "example:",
            f"  {EXAMPLES['store']}",
            "",
            "configuration groups: none.",
        ]
    )

"""The forms of vendors' files by name, and how a file's form is recognised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qdist.errors import PlanError
from qdist.plan.dialects import (
    glow_profile,
    icraft,
    icraft_saturation,
    knight,
    slimai,
    sophgo,
)
from qdist.plan.dialects.reading import Before, FileRules, refuse
from qdist.plan.plan import QuantizationPlan

_LARGEST_BYTES = 256 << 20


Into = Callable[[str, str, Before, QuantizationPlan | None], tuple[str, tuple[str, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form. ``template``: writes a file to edit from choices; ``plan_template``: from a whole
    plan, for forms that hold ranges. ``into``: the same into a vendor's own file, given its text
    and name, with notes. ``suffix``: how the name of such a file ends."""

    read: Callable[[str, str, Before], FileRules]
    recognises: Callable[[str, str], bool]
    template: Callable[[Before], str] | None = None
    plan_template: Callable[[QuantizationPlan], str] | None = None
    into: Into | None = None
    suffix: str = ""


FORMS: dict[str, Form] = {
    "icraft": Form(
        read=icraft.read,
        recognises=icraft.recognises,
        template=icraft.template,
        suffix="_mix_config.csv",
    ),
    "icraft_saturation": Form(read=icraft_saturation.read, recognises=icraft_saturation.recognises),
    "knight": Form(
        read=knight.read,
        recognises=knight.recognises,
        template=knight.template,
        suffix="_mix.json",
    ),
    "slimai": Form(
        read=slimai.read, recognises=slimai.recognises, template=slimai.template, suffix=".yaml"
    ),
    "slimai_profile": Form(
        read=glow_profile.read,
        recognises=glow_profile.recognises,
        plan_template=glow_profile.template,
        into=glow_profile.into,
        suffix="_profile.yaml",
    ),
    "sophgo": Form(
        read=sophgo.read,
        recognises=sophgo.recognises,
        template=sophgo.template,
        into=sophgo.into,
        suffix="_test_fp32.prototxt",
    ),
}
"""By the name that configuration uses."""
TEMPLATES: dict[str, Form] = {
    **{name: form for name, form in FORMS.items() if form.template or form.plan_template},
    # Two more column layouts of one form; both are read as icraft.
    "icraft_sample": Form(
        read=icraft.read,
        recognises=icraft.recognises,
        template=partial(icraft.template, layout="sample"),
        suffix="_mix_config.csv",
    ),
    "icraft_manual": Form(
        read=icraft.read,
        recognises=icraft.recognises,
        template=partial(icraft.template, layout="manual"),
        suffix="_mix_config.csv",
    ),
}
"""What ``qdist quantize --template`` can write."""


def read_file(path: Path, form: str | None, before: Before) -> FileRules:
    """The rules of a vendor's file. ``form``: its name in `FORMS`, or None to recognise it.

    Raises QD508 for a file that cannot be read or recognised, or as its form does.
    """
    text = "\n".join(read_text(path).replace("\r\n", "\n").split("\r"))
    name = form or form_of(path, text)
    if name not in FORMS:
        raise unknown_form(name, "quantization.rules_form", tuple(FORMS))
    return FORMS[name].read(text, path.name, before)


def write_into(
    path: Path, name: str, before: Before, plan: QuantizationPlan | None
) -> tuple[str, tuple[str, ...]]:
    """The text of a vendor's own file with what a template of this form says, and notes.

    Raises QD508 for a form that is not written so, and for a file that cannot be read, or as its
    form does.
    """
    into = TEMPLATES[name].into
    if into is None:
        known = [known for known, form in TEMPLATES.items() if form.into is not None]
        got = f"{name!r}, which is written as a whole"
        mend = "leave template_into out, or choose one of these"
        raise refuse("template_into", got, f"one of {', '.join(known)}", mend)
    return into(read_text(path), path.name, before, plan)


def read_text(path: Path) -> str:
    """A vendor's file. Raises QD508."""
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise refuse(str(path), f"{path.stat().st_size} bytes", "a file of rules")
        # Line ends stay as they are, for what is written back.
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise refuse(str(path), "nothing there", "a file of rules", "correct the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(str(path), f"{error}", "text in UTF-8") from error
    return text


def form_of(path: Path, text: str) -> str:
    """The form of a file by its content. Raises QD508 if none fits."""
    for name, form in FORMS.items():
        if form.recognises(path.name, text):
            return name
    raise refuse(
        str(path),
        "a file of no known form",
        f"one of {', '.join(FORMS)}",
        "name the form with quantization.rules_form, or write one with qdist quantize --template",
    )


def unknown_form(name: str, key: str, known: tuple[str, ...]) -> PlanError:
    """The QD508 for a form's name that is none, to be raised."""
    return refuse(key, repr(name), f"one of {', '.join(known)}", f"choose one of these for {key}")

"""What is written is what is read: rows of vendors' files, with any names and numbers."""

from __future__ import annotations

import json
import re
import string
from typing import Any

from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.plan.dialects import (
    glow_profile,
    icraft,
    icraft_saturation,
    knight,
    prototext,
    slimai,
    sophgo,
)
from qdist.plan.dtype_name import DtypeName

printable = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=("C", "Zl", "Zp")),
    min_size=1,
    max_size=12,
).filter(lambda text: text == text.strip())
positive = st.floats(1e-30, 1e30)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def mix_tables(draw: Any) -> icraft.MixTable:
    layout = draw(st.sampled_from(list(icraft.LAYOUTS)))
    columns = icraft.LAYOUTS[layout]
    ids = draw(st.lists(st.integers(0, 500), unique=True, max_size=6))
    method = st.sampled_from(list(icraft.METHODS))
    grain = st.one_of(
        st.sampled_from(["tensor", "channel"]), st.integers(1, 64).map("group={}".format)
    )
    words = st.text(string.ascii_letters + string.digits + ".%", max_size=6)
    rows = []
    for op_id in ids:
        dtype = draw(st.sampled_from([*DtypeName, "INT8", "FLOAT32"]))
        pair = draw(st.none() | st.tuples(st.integers(1, 32), st.integers(1, 32)))
        extra: dict[str, str] = {
            c: draw(words) for c in ("variance", "cal_amount_percent", "order") if c in columns
        }
        rows.append(
            icraft.MixRow(
                op_id=op_id,
                op_type=draw(printable),
                dtype=str(dtype),
                bits=pair,
                saturation=draw(st.none() | st.tuples(method, method)),
                per=draw(st.none() | st.tuples(grain, grain)),
                extra=extra,
            )
        )
    return icraft.MixTable(columns=columns, rows=tuple(rows))


@settings(max_examples=40)
@given(mix_tables())
def test_icraft_mix_csv(table: icraft.MixTable) -> None:
    assert icraft.parse(icraft.render(table), "f") == table


@settings(max_examples=40)
@given(st.data())
def test_icraft_saturation_csv(data: st.DataObject) -> None:
    is_weights = data.draw(st.booleans())
    columns = icraft_saturation.RAWS if is_weights else icraft_saturation.FTMPS
    numbers = st.lists(finite, max_size=3).map(tuple)
    rows = tuple(
        icraft_saturation.SaturationRow(
            id=data.draw(printable),
            size=data.draw(st.none() | st.integers(0, 1 << 40)),
            max=data.draw(numbers),
            sat=data.draw(st.lists(positive, min_size=1, max_size=3).map(tuple)),
            scale=data.draw(numbers),
            exp=data.draw(numbers),
            normratio=() if is_weights else data.draw(numbers),
        )
        for _ in range(data.draw(st.integers(0, 3)))
    )
    assert icraft_saturation.parse(icraft_saturation.render(rows, columns), "f") == rows


@settings(max_examples=40)
@given(st.lists(printable, unique=True, max_size=5), st.data())
def test_knight_json(names: list[str], data: st.DataObject) -> None:
    layers = tuple(
        knight.KnightLayer(
            name=name,
            bitwidth=data.draw(st.sampled_from([8, 16])),
            mode=data.draw(st.sampled_from(list(knight.MODES))),
        )
        for name in names
    )
    text = knight.render(layers)
    found = knight.parse(text, "f")
    assert found == layers
    lines = text.splitlines()
    assert all(json.dumps(x.name, ensure_ascii=False) in lines[x.line - 1] for x in found)


types = st.sampled_from(list(slimai.TYPES))


@settings(max_examples=40)
@given(
    st.lists(
        st.builds(
            slimai.Datatypes,
            nodes=st.lists(printable, min_size=1, max_size=3).map(tuple),
            intypes=st.lists(types, min_size=1, max_size=2).map(tuple),
            outtypes=st.lists(types, max_size=1).map(tuple),
        ),
        max_size=4,
    ).map(tuple)
)
def test_slimai_datatypes(entries: tuple[slimai.Datatypes, ...]) -> None:
    assert slimai.parse(slimai.render(entries), "f") == entries


@settings(max_examples=40)
@given(
    st.lists(
        st.builds(
            sophgo.SophgoLayer,
            name=printable,
            type=st.just("") | printable,
            th_strategy=st.none() | st.sampled_from(list(sophgo.STRATEGIES)),
            th_scale=st.none() | positive,
            threshold=st.none() | positive,
            forward_with_float=st.none() | st.booleans(),
        ),
        max_size=4,
    ).map(tuple)
)
def test_sophgo_layers(layers: tuple[sophgo.SophgoLayer, ...]) -> None:
    assert sophgo.parse(sophgo.render(layers), "f") == layers


@settings(max_examples=40)
@given(st.lists(st.tuples(printable, printable), max_size=3), st.text(max_size=8))
def test_proto_text_of_protobuf_itself_is_read(
    messages: list[tuple[str, str]], package: str
) -> None:
    # Any message that protobuf prints: nested, repeated, with escapes of its own.
    proto = FileDescriptorProto(package=package)
    for name, inner in messages:
        proto.message_type.add(name=name).nested_type.add(name=inner)
    text = text_format.MessageToString(proto, as_utf8=True)
    found = [field for field in prototext.parse(text, "f") if field.name == "message_type"]
    plain = re.compile(r"[\\\"']")
    for (name, inner), field in zip(messages, found, strict=True):
        nested = {entry.name: entry for entry in field.fields}
        if not plain.search(name + inner):
            assert nested["name"].scalar == name
            assert nested["nested_type"].fields[0].scalar == inner


@settings(max_examples=40)
@given(
    st.dictionaries(printable, st.tuples(finite, finite), min_size=1, max_size=4),
    st.data(),
)
def test_an_edited_profile_has_the_new_ranges_and_all_else(
    ranges: dict[str, tuple[float, float]], data: st.DataObject
) -> None:
    lines = ["---", "GraphPreLowerHash: 0xABC", "...", "---"]
    for name in ranges:
        quoted = name.replace("'", "''")
        lines += [f"- NodeOutputName:  '{quoted}'", "  Min:             -1.0  # here"]
        lines += ["  Max:             1.0", "  Histogram:       [ 0, 1 ]"]
    text = "\n".join(lines) + "\n"
    chosen = data.draw(st.sets(st.sampled_from(sorted(ranges))))
    wanted = {name: (min(ranges[name]), max(ranges[name])) for name in chosen}
    found = glow_profile.edited(text, wanted)
    for entry in glow_profile.parse(found, "f"):
        assert (entry.low, entry.high) == wanted.get(entry.name, (-1.0, 1.0))
    # Nothing but the numbers differs.
    number = re.compile(r"(Min|Max):( +)\S+")
    assert number.sub(r"\1\2", found) == number.sub(r"\1\2", text)

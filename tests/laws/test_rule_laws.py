"""Laws of rules, neighbours and groups, on random graphs of layers."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.model.adjacency import Adjacency
from qdist.model.groups import KINDS, disagreements, find_groups, merged, raised_together
from qdist.model.layers import Layer, LayerInput
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.knight_rules import SAME_AS_NEIGHBOURS, closure, violations
from qdist.plan.layer_index import LayerIndex
from qdist.plan.rules import Rule, apply_rules
from qdist.plan.selector import select_layers

TYPES = ("Conv", "MatMul", "Add", "Relu", "Concat", "LayerNormalization", "LSTM", "Abs")
PRECISIONS = ("int8", "int16", "w8a16", "float32")


@st.composite
def graphs(draw: Any) -> LayerIndex:
    """Up to 12 layers, each reading one to three tensors made before it or inputs."""
    layers = []
    known = ["x", "mask"]
    for i in range(draw(st.integers(1, 12))):
        op_type = draw(st.sampled_from(TYPES))
        n = {"Add": 2, "Concat": 3}.get(op_type, 1)
        reads = draw(st.lists(st.sampled_from(known), min_size=n, max_size=n))
        weights = (LayerInput(index=9, tensor=f"w{i}"),) if op_type == "MatMul" else ()
        layers.append(
            Layer(
                name=f"l{i}",
                op_type=op_type,
                activations=tuple(LayerInput(index=j, tensor=t) for j, t in enumerate(reads)),
                weights=weights,
                outputs=(f"t{i}",),
            )
        )
        known.append(f"t{i}")
    return LayerIndex(layers)


@st.composite
def rules(draw: Any) -> list[Rule]:
    matches = st.one_of(
        st.sampled_from([f"op:{name}" for name in TYPES]),
        st.integers(0, 11).map("layer:l{}".format),
        st.sampled_from(["*", "first:2", "last:1", "op:Conv & last:2", "re:l[0-4]"]),
    )
    change = st.fixed_dictionaries(
        {},
        optional={
            "precision": st.sampled_from(PRECISIONS),
            "saturation": st.sampled_from(["max", "mse", "kl"]),
            "th_scale": st.sampled_from([0.5, 0.9]),
        },
    )
    return [
        Rule(match=match, settings=settings)
        for match, settings in draw(st.lists(st.tuples(matches, change), max_size=5))
    ]


@settings(max_examples=60)
@given(graphs(), rules())
def test_the_last_rule_that_speaks_of_a_field_decides(index: LayerIndex, given: list[Rule]) -> None:
    given = [rule for rule in given if select_layers(rule.match, index)]
    found = apply_rules(index, LayerChoice(), given)
    for layer in index.layers:
        hits = [rule for rule in given if layer in select_layers(rule.match, index)]
        plain = LayerChoice()
        for name in ("precision", "saturation", "th_scale"):
            said = [rule.settings[name] for rule in hits if name in rule.settings]
            expected = said[-1] if said else getattr(plain, name)
            assert getattr(found.choices[layer.name], name) == expected
        assert found.why.get(layer.name) == (hits[-1].why if hits else None)
    # Applied in two steps, rules come to the same.
    half = len(given) // 2
    first = apply_rules(index, LayerChoice(), given[:half])
    assert apply_rules(index, first.choices, given[half:]).choices == found.choices


@settings(max_examples=60)
@given(graphs(), st.data())
def test_words_narrow_down_and_reach_goes_both_ways(index: LayerIndex, data: st.DataObject) -> None:
    names = [layer.name for layer in index.layers]
    a, b = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    before = {layer.name for layer in select_layers(f"before:{a}", index)}
    after = {layer.name for layer in select_layers(f"after:{b}", index)}
    assert (b in before) == (a in after)
    both = {layer.name for layer in select_layers(f"before:{a} & after:{b}", index)}
    assert both == before & after
    block = {layer.name for layer in select_layers(f"until_compute:{a}", index)}
    assert a in block
    assert not any(index.by_name[name].is_compute for name in block - {a})
    assert block <= {layer.name for layer in select_layers(f"after:{a}", index)}


def slow_blocks(index: LayerIndex) -> set[frozenset[str]]:
    """Blocks by their definition: all that lies between a sum and the last layer that both of its
    sides come from."""
    adjacency, order = index.adjacency, {x.name: i for i, x in enumerate(index.layers)}
    found = []
    for layer in index.layers:
        tensors = [entry.tensor for entry in layer.activations]
        made = [adjacency.makers(tensor) for tensor in tensors]
        if layer.op_type != "Add" or len(set(tensors)) < 2 or not all(made):
            continue
        common = adjacency.before(made[0]) & adjacency.before(made[1])
        if common:
            root = max(common, key=order.__getitem__)
            block = adjacency.after([root]) & adjacency.before([layer.name]) - {root}
            if any(index.by_name[name].is_compute for name in block):
                found.append(frozenset(block))
    return {b for i, b in enumerate(found) if not any(b < other for other in found[i + 1 :])}


@settings(max_examples=100)
@given(graphs())
def test_blocks_are_what_their_definition_says(index: LayerIndex) -> None:
    inputs = {"x", "mask"}
    with_inputs = {
        layer.name
        for layer in index.layers
        if layer.op_type == "Add" and inputs & {e.tensor for e in layer.activations}
    }
    found = {block for block in index.blocks if not block & with_inputs}
    slow = {block for block in slow_blocks(index) if not block & with_inputs}
    held = [b for b in index.blocks if b & with_inputs]
    # A block that begins with an input of the model may hold others.
    assert found == {b for b in slow if not any(b < other for other in held)}


@settings(max_examples=60)
@given(graphs(), st.data())
def test_groups_part_the_layers_and_raising_together_is_a_closure(
    index: LayerIndex, data: st.DataObject
) -> None:
    names = [layer.name for layer in index.layers]
    groups = find_groups(index.layers, index.adjacency, kinds=KINDS, tied=SAME_AS_NEIGHBOURS)
    parts = merged(groups, names)
    assert sorted(name for part in parts for name in part) == sorted(names)
    some = data.draw(st.sets(st.sampled_from(names)))
    more = some | data.draw(st.sets(st.sampled_from(names)))
    raised = raised_together(some, groups, names)
    assert some <= raised
    assert raised_together(raised, groups, names) == raised
    assert raised <= raised_together(more, groups, names)
    choice = {name: "high" if name in raised else "low" for name in names}
    assert list(disagreements(groups, choice)) == []


@settings(max_examples=100)
@given(graphs(), st.data())
def test_knights_closure_is_one_and_breaks_no_rule(index: LayerIndex, data: st.DataObject) -> None:
    names = [layer.name for layer in index.layers]
    some = data.draw(st.sets(st.sampled_from(names)))
    wide = closure(index, some)
    assert some <= wide
    assert closure(index, wide) == wide
    assert list(violations(index, {name: 16 if name in wide else 8 for name in names})) == []


@given(graphs())
@settings(max_examples=40)
def test_parents_and_children_mirror_each_other(index: LayerIndex) -> None:
    adjacency = Adjacency(index.layers)
    for name, parents in adjacency.parents.items():
        assert all(name in adjacency.children[parent] for parent in parents)
    for name, children in adjacency.children.items():
        assert all(name in adjacency.parents[child] for child in children)

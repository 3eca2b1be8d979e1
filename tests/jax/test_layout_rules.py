"""Rules for layouts: what they make of a kernel, from Python and from YAML, alone and with traced layouts; what a
scaled and interleaved kernel is; and every way in which rules can be wrong."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stacks import without_type_checks
from strategies import draw_adapter
from tolerances import TOLERANCE

import randlora_jax
from interop.errors import AdapterFormatError
from randlora_jax import Layout, LayoutRule, RandLoraConfig, infer_layouts, name_layouts
from randlora_jax.linen import lazy_params
from randlora_jax.provenance import describe, differences

SCALES = (1.0, -1.0, 0.25, 3.0, 1 / np.sqrt(6))


def params(**shapes):
    """Parameters of these shapes; "__" in a name stands for "/"."""
    rng = np.random.default_rng(0)
    return {name.replace("__", "/"): jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}


def layouts_by(*rules, layouts=None, **shapes):
    return name_layouts(params(**shapes), [LayoutRule(**rule) for rule in rules], layouts=layouts)


# ---- Layout(scale, interleaved)


@st.composite
def axes_and_sizes(draw):
    """Any grouping of the axes of a kernel with up to two of each kind, and their sizes."""
    counts = [draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2), (0, 1, 2))]
    order = draw(st.permutations(range(sum(counts))))
    groups = [tuple(order[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(3)]
    return groups, [draw(st.sampled_from((1, 2, 3))) for _ in order]


def kernel_by_hand(layout, weight, shape):
    """A kernel written entry by entry: where each of its indices is in torch's weight."""
    kernel = np.empty(shape)
    for at in np.ndindex(*shape):
        row = column = 0
        for axis in layout.out_axes:
            index, size = at[axis], shape[axis]
            if layout.interleaved and axis == layout.out_axes[-1]:  # pair p, member m: in torch, p of half m
                index = index // 2 + (index % 2) * (size // 2)
            row = row * size + index
        for axis in layout.in_axes:
            column = column * shape[axis] + at[axis]
        kernel[at] = layout.scale * weight[(*(at[axis] for axis in layout.stack_axes), row, column)]
    return kernel


@given(axes_and_sizes(), st.sampled_from(SCALES), st.booleans(), st.booleans())
def test_a_layout_says_where_each_entry_of_torchs_weight_is_in_the_kernel(drawn, scale, interleaved, in_first):
    (groups, shape), scaled = drawn, {"scale": scale, "interleaved": interleaved}
    layout = Layout(*groups, **scaled)
    shape[layout.out_axes[-1]] *= 1 + interleaved
    weight = np.random.default_rng(0).standard_normal(
        (*layout.stack_shape(tuple(shape)), *layout.torch_shape(tuple(shape)))
    )
    with without_type_checks():  # numpy's arrays will do, and need no compilation for each new shape
        kernel = layout.to_kernel(weight.swapaxes(-1, -2) if in_first else weight, tuple(shape), in_first=in_first)
        np.testing.assert_allclose(kernel, kernel_by_hand(layout, weight, shape), rtol=1e-15)
        np.testing.assert_allclose(layout.to_torch(kernel), weight, rtol=1e-15)
        for axis in layout.stack_axes[:1]:
            np.testing.assert_allclose(layout.without((axis,)).to_torch(kernel.take(0, axis)), weight[0], rtol=1e-15)
        within = layout.within(1).to_torch(kernel[None])
        np.testing.assert_allclose(within[0], weight, rtol=1e-15)


@pytest.mark.parametrize("scale", [0.0, np.inf, np.nan])
def test_a_layout_refuses_a_scale_that_cannot_be_undone(scale):
    with pytest.raises(ValueError, match=rf"scale={scale}: give a finite number other than 0; 1\.0 is torch's own"):
        Layout((0,), (1,), scale=scale)


def test_an_interleaved_layout_refuses_an_axis_without_pairs():
    with pytest.raises(ValueError, match=r"shape \(4, 2, 3\) cannot be interleaved: its axis 2, the last of out_axes"):
        Layout((0,), (1, 2), interleaved=True).torch_shape((4, 2, 3))


ROTARY = {
    "kernel": "layers/query",
    "modules": "layers.{i}.q",
    "in_axes": 0,
    "out_axes": [2, 3],
    "stack_axes": 1,
    "scale": "1/sqrt(head_dim)",
    "interleaved": True,
}


def test_a_rule_scales_by_the_head_dim_of_the_kernel_that_it_finds():
    layouts = layouts_by(ROTARY, layers__query__kernel=(8, 3, 2, 16))
    names = ("layers.0.q", "layers.1.q", "layers.2.q")
    assert layouts == {"layers.query": Layout((0,), (2, 3), (1,), names, scale=0.25, interleaved=True)}


def test_lazy_params_slice_scaled_and_interleaved_kernels_as_merging_changes_them():
    tree = params(layers__query__kernel=(8, 3, 2, 6))
    adapter = randlora_jax.load_adapter(
        draw_adapter(shapes={f"layers.{i}.q": (12, 8) for i in range(3)}), tree, layouts=[ROTARY]
    )
    merged = randlora_jax.merge(tree, adapter)["layers/query/kernel"]
    layout = dict(adapter.layouts)["layers.query"]
    assert (layout.scale, layout.interleaved) == (1 / np.sqrt(6), True)
    (box,) = lazy_params(tree, adapter).values()
    sliced = jax.tree.map(lambda leaf: leaf.take(1, axis=1), box)
    np.testing.assert_allclose(box.unbox(), merged, **TOLERANCE["float32"])
    np.testing.assert_allclose(sliced.unbox(), merged[:, 1], **TOLERANCE["float32"])


def test_a_checkpoint_tells_a_scaled_or_interleaved_kernel_from_a_plain_one():
    tree = params(layers__query__kernel=(8, 3, 2, 6))
    hub = draw_adapter(shapes={f"layers.{i}.q": (12, 8) for i in range(3)})
    plain = {**ROTARY, "scale": 1.0, "interleaved": False}
    described = [describe(randlora_jax.load_adapter(hub, tree, layouts=[rule]), tree) for rule in (ROTARY, plain)]
    assert describe(randlora_jax.load_adapter(hub, tree, layouts=[ROTARY]), tree) == described[0]
    (line,) = differences(*described)
    assert re.fullmatch(
        r"layout of layers\.query: .*'scale': 0\.408.*'interleaved': True.* in the checkpoint, .*", line
    )
    assert described[1]["modules"]["layers.query"]["layout"].keys() == {"in_axes", "out_axes", "stack_axes", "adapted"}


# ---- what a rule says


@pytest.mark.parametrize(
    ("rule", "name", "shape", "layout"),
    [
        ({"kernel": "a/b", "modules": "x"}, "a__b__kernel", (4, 6), Layout((0,), (1,), modules=("x",))),
        ({"kernel": r"a\.b", "modules": "x"}, "a__b__weight", (4, 6), Layout((1,), (0,), modules=("x",))),
        (
            {"kernel": r"layers_(?P<layer>\d+)/(q)", "modules": r"h.\g<layer>.\2.\g<2>"},
            *("layers_10__q__kernel", (4, 6), Layout((0,), (1,), modules=("h.10.q.q",))),
        ),
        (
            {"kernel": "layers/q", "modules": "h.{i}.q"},
            *("layers__q__kernel", (2, 4, 6), Layout((1,), (2,), (0,), ("h.0.q", "h.1.q"))),
        ),
        (
            {"kernel": "layers/q", "modules": "h.{i}.q", "stack_axes": 2},
            *("layers__q__kernel", (4, 6, 2), Layout((0,), (1,), (2,), ("h.0.q", "h.1.q"))),
        ),
        (
            {"kernel": "experts", "modules": "h.{j}.{i}"},
            *("experts__kernel", (2, 1, 4, 6), Layout((2,), (3,), (0, 1), ("h.0.0", "h.0.1"))),
        ),
        (
            {"kernel": "kv", "modules": ["k", None, "v"], "fused_axis": 1},
            *("kv__kernel", (4, 3, 6), Layout((0,), (2,), (1,), ("k", None, "v"))),
        ),
        (
            {"kernel": "kv", "modules": ["h.{i}.k", "h.{i}.v"], "fused_axis": 2},
            *("kv__kernel", (2, 4, 2, 6), Layout((1,), (3,), (0, 2), ("h.0.k", "h.0.v", "h.1.k", "h.1.v"))),
        ),
        (
            {"kernel": "o", "modules": "o", "in_axes": [1, 0], "out_axes": 2, "scale": 2},
            *("o", (2, 3, 4), Layout((1, 0), (2,), modules=("o",), scale=2.0)),
        ),
    ],
)
def test_a_rule_gives_the_layout(rule, name, shape, layout):
    assert list(layouts_by(rule, **{name: shape}).values()) == [layout]


def test_a_rule_is_for_kernels_only_with_the_axes_that_it_speaks_of():
    shapes = {"layers__q__kernel": (2, 4, 6), "layers__q__bias": (2, 6), "layers__norm__scale": (2, 4)}
    assert list(layouts_by({"kernel": "layers/(.+)", "modules": r"{i}.\1"}, **shapes)) == ["layers.q"]


def apply(tree, x):
    """A scan over layers with a fused projection, and an output from heads."""

    def layer(x, kernels):
        k, v = jnp.einsum("bd,dkh->kbh", x, kernels["kv"])
        return k @ kernels["up"] + v @ kernels["up"], None

    x, _ = jax.lax.scan(layer, x, {name: tree[f"layers/{name}/kernel"] for name in ("kv", "up")})
    return jnp.einsum("bnh,nhd->bd", x.reshape(-1, 2, 2), tree["o"]["w"])


NAMES = [
    {"kernel": "layers/kv", "modules": ["h.{i}.k", "h.{i}.v"], "fused_axis": 2},
    {"kernel": "o", "modules": "head"},
]


def scanned():
    tree = params(layers__kv__kernel=(3, 4, 2, 5), layers__up__kernel=(3, 5, 4), o=(2, 2, 7))
    return {**tree, "o": {"w": tree["o"]}}


def test_axes_that_rules_leave_out_are_those_of_the_trace():
    traced = infer_layouts(apply, scanned(), jnp.ones((2, 4)))
    assert traced["layers.kv"] == Layout((1,), (2, 3), (0,))
    layouts = traced.named(NAMES)
    names = tuple(f"h.{i}.{name}" for i in range(3) for name in "kv")
    assert layouts == {
        "layers.kv": Layout((1,), (3,), (0, 2), names),
        "layers.up": traced["layers.up"],
        "o": Layout((0, 1), (2,), modules=("head",)),
    }
    assert (
        layouts == name_layouts(scanned(), NAMES, layouts=traced) == name_layouts(scanned(), NAMES, layouts={**traced})
    )
    assert "layers.kv  in (1,), out (3,), stack (0, 2): h.0.k, h.0.v, ..., h.2.v" in str(layouts)


def test_a_rule_may_count_an_axis_that_the_trace_takes_for_one_of_the_outputs():
    shapes = {"experts": (4, 3, 5)}
    traced = infer_layouts(
        lambda tree, x: jnp.einsum("bd,deh->beh", x, tree["experts"]), params(**shapes), jnp.ones((2, 4))
    )
    assert traced["experts"] == Layout((0,), (1, 2))
    layouts = traced.named([{"kernel": "experts", "modules": "e.{i}", "stack_axes": 1}])
    assert layouts == {"experts": Layout((0,), (2,), (1,), ("e.0", "e.1", "e.2"))}


def test_a_rule_with_all_axes_makes_a_kernel_of_what_the_trace_refused():
    traced = infer_layouts(lambda tree, x: x, params(unused=(4, 6)), jnp.ones(3))
    layouts = traced.named([{"kernel": "unused", "modules": "u", "in_axes": 0, "out_axes": 1}])
    assert (dict(layouts), layouts.refused) == ({"unused": Layout((0,), (1,), modules=("u",))}, {})


def test_a_rule_keeps_the_scale_of_a_layout_that_it_names():
    known = {"q": Layout((0,), (1,), scale=2.0, interleaved=True)}
    (layout,) = layouts_by({"kernel": "q", "modules": "x"}, layouts=known, q=(4, 6)).values()
    assert layout == dataclasses.replace(known["q"], modules=("x",))


YAML = r"""
- kernel: 'layers/kv'
  modules: ['h.{i}.k', 'h.{i}.v']
  fused_axis: 2
- {kernel: o, modules: head}
"""


def test_rules_in_a_yaml_file_are_those_of_python(tmp_path):
    (tmp_path / "rules.yaml").write_text(YAML)
    traced = infer_layouts(apply, scanned(), jnp.ones((2, 4)))
    for path in (tmp_path / "rules.yaml", str(tmp_path / "rules.yaml")):
        assert traced.named(path) == traced.named([LayoutRule(**rule) for rule in NAMES])


def test_every_function_that_takes_layouts_takes_rules(tmp_path):
    (tmp_path / "rules.yaml").write_text("- {kernel: 'layers_(\\d+)/q', modules: 'h.\\1.q'}")
    tree, config = (
        params(layers_0__q__kernel=(4, 6), layers_1__q__kernel=(4, 6)),
        RandLoraConfig(r=2, target_modules=["q"]),
    )
    for layouts in (tmp_path / "rules.yaml", [LayoutRule(r"layers_(\d+)/q", r"h.\1.q")]):
        adapter = randlora_jax.init(config, tree, layouts=layouts)
        assert sorted(adapter.to_interop().factors) == ["h.0.q", "h.1.q"]
        assert sorted(randlora_jax.find_targets(config, tree, layouts=layouts)) == ["h.0.q", "h.1.q"]
        assert randlora_jax.load_adapter(adapter, tree, layouts=layouts).layouts == adapter.layouts


# ---- what is wrong with rules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "("}, r"kernel='\(': it is no regular expression, missing \)"),
        ({"kernel": 3}, r"it is no regular expression"),
        ({"modules": ""}, r"modules='' names no weight: give a name, or the list of names along fused_axis\."),
        ({"modules": [], "fused_axis": 0}, r"names no weight"),
        ({"modules": [None], "fused_axis": 0}, r"names no weight"),
        ({"modules": ["a", 1], "fused_axis": 0}, r"names no weight"),
        ({"modules": ["a", "b"]}, r"are several: say with fused_axis which axis of the kernel numbers them\."),
        ({"fused_axis": 0}, r"fused_axis=0 numbers several weights: give modules as the list of their names\."),
        ({"modules": r"x.\1"}, r"modules have 'x\.\\\\1', but the expression has no group '1'\."),
        ({"modules": r"\g<layer>"}, r"the expression has no group 'layer'\."),
        ({"modules": "x.{k}"}, r"modules have 'x\.\{k\}', with \{k\}: only \{i\} and \{j\} are indices\."),
        ({"modules": "x.{j}"}, r"must all count the same stack_axes, the first with \{i\}, then \{j\}\."),
        ({"modules": ["x.{i}", "y"], "fused_axis": 0}, r"must all count the same stack_axes"),
        ({"stack_axes": 0}, r"stack_axes=\(0,\) are 1, modules='x' count 0: write \{i\} for the index along the first"),
        ({"in_axes": 0}, r"in_axes=\(0,\) and out_axes=None: give both, or neither\."),
        ({"in_axes": 0, "out_axes": 0}, r"together they must name every axis 0\.\.ndim-1 of the kernel once"),
        ({"modules": "x.{i}", "in_axes": 0, "out_axes": 1}, r"count stack_axes: give these as well as in_axes and out"),
        (
            {"modules": ["x", "y"], "fused_axis": -1},
            r"axis -1: give integers, and count axes from the first, which is 0",
        ),
        ({"in_axes": ["0"], "out_axes": 1}, r"axis '0': give integers"),
        ({"scale": 0}, r"scale=0: give a finite number other than 0, or '1/sqrt\(head_dim\)'\."),
        ({"scale": "sqrt"}, r"scale='sqrt': give a finite number"),
        ({"interleaved": 1}, r"interleaved=1: give true or false\."),
    ],
)
def test_a_rule_says_what_is_wrong_with_it(fields, message):
    with without_type_checks(), pytest.raises(ValueError, match=message):
        LayoutRule(**{"kernel": "q", "modules": "x", **fields})


Q = {"kernel": "(.*)/q", "modules": r"\1.x"}
KERNELS = {"a__q__kernel": (4, 6), "b__q__kernel": (4, 6), "b__bias": (6,)}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [Q, {"kernel": "c/q", "modules": "c"}],
            r"these layout rules are for no kernel:\n  - c/q\nthe kernels are:\n  - a\.q \(4, 6\)\n  - b\.q \(4, 6\)\n"
            r"Names must be matched in full, without a final 'kernel' or 'w'\.$",
        ),
        (
            [Q, {"kernel": "b/bias", "modules": "c.{i}"}],
            r"for no kernel:\n  - b/bias, which b\.bias \(6,\) fits by its name, but not by its axes\n",
        ),
        ([Q, {"kernel": "a/q", "modules": "c"}], r"two layout rules are for a\.q \(4, 6\), \['\(\.\*\)/q', 'a/q'\]"),
        ([{**Q, "modules": "x"}], r"call a weight in 'a\.q' and one in 'b\.q' 'x': use what differs between them"),
        (
            [{**Q, "modules": ["x", "y"], "fused_axis": 0, "in_axes": [], "out_axes": 1}],
            r"together they must name every axis",
        ),
    ],
)
def test_rules_that_do_not_fit_a_model_are_refused_with_both_sides(rules, message):
    with pytest.raises(ValueError, match=message):
        layouts_by(*rules, **KERNELS)


def test_an_optional_rule_may_be_for_nothing():
    optional = {"kernel": "c/q", "modules": "c", "optional": True}
    assert layouts_by(Q, optional, **KERNELS) == layouts_by(Q, **KERNELS)


def test_a_fused_kernel_needs_a_name_for_each_of_its_weights():
    rule = {"kernel": "kv", "modules": ["k", "v"], "fused_axis": 0}
    message = r"kernel='kv' lists 2 modules, but kv \(3, 4, 6\) holds 3 on fused_axis=0: name each, or None\."
    with pytest.raises(ValueError, match=message):
        layouts_by(rule, kv__kernel=(3, 4, 6))


@pytest.mark.parametrize(
    "axes",
    [
        {"in_axes": 1, "out_axes": [0, 2]},
        {"modules": "q.{i}", "stack_axes": 0},
        {"modules": "q.{i}", "in_axes": 0, "out_axes": 1, "stack_axes": 2},
        {"modules": ["k", "v", "w", "x"], "fused_axis": 0},
    ],
)
def test_a_rule_that_contradicts_the_trace_is_refused(axes):
    tree = params(q=(4, 2, 3))
    traced = infer_layouts(lambda tree, x: jnp.einsum("bd,dnh->bnh", x, tree["q"]), tree, jnp.ones((2, 4)))
    if axes.get("stack_axes") == 2:  # what one takes for an output may be a stack, but no stack for an output
        assert traced.named([{"kernel": "q", **axes}])["q"].stack_axes == (2,)
        return
    with pytest.raises(
        ValueError, match=r"makes q \(4, 2, 3\) a kernel with .* but the layout found for it is Layout\("
    ):
        traced.named([{"kernel": "q", "modules": "q", **axes}])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"in_axes": 1, "out_axes": [0, 2, 3]}, r"makes layers\.kv .* a kernel with .* but the layout found for it is"),
        ({}, r"for no kernel:\n  - layers/kv, which layers\.kv \(3, 4, 2, 5\) fits by its name, but not by its axes\n"),
    ],
)
def test_a_rule_must_count_the_axes_that_the_trace_found_to_be_stacked(rule, message):
    traced = infer_layouts(apply, scanned(), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=message):
        traced.named([{"kernel": "layers/kv", "modules": "kv", **rule}])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            "tunix-gema3",
            r"'tunix-gema3' is neither a file nor a built-in table\. Did you mean 'tunix-gemma3'\? Tables are",
        ),
        ([], r"layouts: \[\] is no list of rules\."),
        ([3], r"layouts: rule 0 is 3, not a mapping of fields: kernel, modules, in_axes,"),
        (
            [Q, {"kernel": "q", "names": "x"}],
            r"rule 1 has the unknown fields \['names'\] and lacks \['modules'\]\. Fields",
        ),
        (
            "tunix-gemma3",
            r"(?s)none of the kernels is called as in the layouts 'tunix-gemma3', which are for:.*"
            r"layers/\(\\d\+\)/attn/q_einsum\n.*\n  - a\.q \(4",
        ),
    ],
)
def test_what_is_no_list_of_rules_is_refused(rules, message):
    with without_type_checks(), pytest.raises(ValueError, match=message):
        name_layouts(params(**KERNELS), rules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- kernel: [", r"rules\.yaml is no YAML: while parsing"),
        ("kernel: q", r"rules\.yaml: \{'kernel': 'q'\} is no list of rules\. Give a list of fields of LayoutRule"),
        ("", r"rules\.yaml: None is no list of rules"),
        (
            "- {kernel: q, modules: x, axes: 0}",
            r"rules\.yaml: rule 0 has the unknown fields \['axes'\] and lacks \[\]\.",
        ),
        ("- !!python/name:os.system {}", r"rules\.yaml is no YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_holds_no_rules_is_refused(text, message, tmp_path):
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        name_layouts(params(**KERNELS), tmp_path / "rules.yaml")


def test_an_adapter_that_does_not_fit_is_refused_with_both_sides():
    adapter = draw_adapter(shapes={"model.a.x": (6, 4), "b.x": (6, 4)})
    message = (
        r"the model lacks these adapted layers \(it has 2 linear layers, such as 'a\.x'\):\n  - model\.a\.x\n"
        r"the adapter has nothing for these layers of the model:\n  - a\.x\n"
        r"If they are the same layers under other names, pass layouts: one of randlora_jax\.LAYOUTS, or rules"
    )
    with pytest.raises(AdapterFormatError, match=message):
        randlora_jax.load_adapter(adapter, params(**KERNELS), layouts=[Q])

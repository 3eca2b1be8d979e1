"""Several adapters on one NNX model, switched and taken off again; and how adapters find their weights by name."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from strategies import draw_adapter
from tolerances import TOLERANCE

from interop import RandLoraConfig, save
from interop.targets import resolve_targets
from randlora_jax import (
    Layout,
    RandLoraBasis,
    RandLoraParam,
    active_adapter,
    adapter_names,
    attach,
    bound_bases,
    delete_adapter,
    detach,
    disable_adapters,
    effective_params,
    enable_adapters,
    extract,
    find_targets,
    init,
    load_adapter,
    set_adapter,
)


class Attention(nnx.Module):
    """Gemma's kernels: q by heads, k and v fused into one array, and a way back."""

    def __init__(self, rngs):
        self.q = nnx.Einsum("bd,dnh->bnh", (8, 2, 5), rngs=rngs)
        self.kv = nnx.Einsum("bd,cndh->cbnh", (2, 2, 8, 5), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 5), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        k, v = self.kv(x)
        return self.out(nnx.tanh(self.q(x) + k) * v)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn, self.up = Attention(rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.up(self.attn(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.lm_head = nnx.Linear(8, 12, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def block_layouts(i):
    """The layouts of one block, with the names that a transformers model has for the same weights."""
    names = {name: f"model.layers.{i}.self_attn.{name}_proj" for name in "qkvo"}
    return {
        f"layers.{i}.attn.q": Layout((0,), (1, 2), modules=(names["q"],)),
        f"layers.{i}.attn.kv": Layout((2,), (1, 3), (0,), modules=(names["k"], names["v"])),
        f"layers.{i}.attn.out": Layout((0, 1), (2,), modules=(names["o"],)),
    }


LAYOUTS = {**block_layouts(0), **block_layouts(1)}
# Of different kernels, ranks, seeds and dtypes; "first" and "second" overlap in q.
FIRST = RandLoraConfig(r=3, randlora_alpha=3, target_modules=["q_proj", "v_proj"])
SECOND = RandLoraConfig(r=4, randlora_alpha=4, target_modules=["q_proj", "up", "lm_head"], projection_prng_key=17)


@functools.cache
def abstract_net():
    return nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


def net(seed=0):
    graph, state = abstract_net()
    rng = np.random.default_rng(seed)
    fill = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(fill, state))


CLOSE = TOLERANCE["float32", "gradient"]  # two blocks deep
X = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8)), jnp.float32)


@functools.cache
def trained(config, seed, dtype=None):
    """An adapter for `Net` with random lambda and gamma, as after training."""
    adapter = extract(attach(net(), config, layouts=LAYOUTS, dtype=dtype))
    rng = np.random.default_rng(seed)
    leaves = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype), adapter.trainable)
    return adapter.with_trainable(leaves)


def first():
    return trained(FIRST, 1)


def second(dtype=None):
    return trained(SECOND, 2, dtype)


def two(dtype=None):
    """A model with both, "second" being active."""
    model = attach(net(), first(), adapter_name="first", layouts=LAYOUTS)
    return attach(model, second(dtype), adapter_name="second", layouts=LAYOUTS)


@functools.cache
def output_of(which):
    adapter = {"base": None, "first": first, "second": second}[which]
    return np.asarray((net() if adapter is None else attach(net(), adapter(), layouts=LAYOUTS))(X))


def to_bytes(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# --- Several adapters ------------------------------------------------------------------------------------------------


def test_each_of_several_adapters_computes_as_if_it_were_alone():
    model = two()
    assert (adapter_names(model), active_adapter(model)) == (("first", "second"), "second")
    np.testing.assert_array_equal(model(X), output_of("second"))
    assert set_adapter(model, "first") is model
    assert active_adapter(model) == "first"
    np.testing.assert_array_equal(model(X), output_of("first"))
    np.testing.assert_array_equal(set_adapter(model, "second")(X), output_of("second"))
    for one, other in (("base", "first"), ("base", "second"), ("first", "second")):
        assert np.abs(output_of(one) - output_of(other)).max() > 0.1


def test_disabled_adapters_leave_the_base_model_and_stay():
    model = two()
    assert disable_adapters(model) is model
    np.testing.assert_array_equal(model(X), output_of("base"))
    assert (adapter_names(model), active_adapter(model)) == (("first", "second"), "second")
    np.testing.assert_array_equal(set_adapter(model, "first")(X), output_of("base"))
    assert enable_adapters(model) is model
    np.testing.assert_array_equal(model(X), output_of("first"))


def test_extract_gives_any_of_the_adapters_with_its_own_config_bases_and_dtype():
    model = two(jnp.bfloat16)
    for name, adapter in (("first", first()), ("second", second(jnp.bfloat16))):
        got = extract(model, name)
        assert jax.tree.structure(got) == jax.tree.structure(adapter)
        assert to_bytes(got) == to_bytes(adapter)
    assert (extract(model, "first").dtype, extract(model).dtype) == (None, jnp.bfloat16)
    assert (extract(model, "first").config.r, extract(model).config.r) == (3, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(extract(model).trainable)} == {np.dtype("float32")}


def test_only_the_factors_of_the_active_adapter_are_lora_params():
    """By `nnx.LoRAParam` Tunix and MaxText choose what they train, count and save."""
    model = two()
    for name, adapter in (("second", second()), ("first", first())):
        set_adapter(model, name)
        for kind in (nnx.LoRAParam, RandLoraParam):
            leaves = jax.tree.leaves(nnx.state(model, kind))
            assert sorted(leaf.size for leaf in leaves) == sorted(
                leaf.size for leaf in jax.tree.leaves(adapter.trainable)
            )
        paths = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        assert {path[-2] for path, _ in paths} == {name}
    assert len(jax.tree.leaves(nnx.state(model, RandLoraBasis))) == 4


def train(model, steps=3):
    """Steps with weight decay, which moves whatever the optimizer sees, used or not."""
    optimizer = nnx.Optimizer(model, optax.adamw(0.01, weight_decay=0.1), wrt=RandLoraParam)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: (model(X) ** 2).mean()  # noqa: E731
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model))

    for _ in range(steps):
        step(model, optimizer)
    return model


@pytest.mark.parametrize(("active", "other"), [("first", "second"), ("second", "first")])
def test_training_moves_the_active_adapter_and_no_bit_of_the_other_or_of_the_base(active, other):
    model = set_adapter(two(), active)
    before, bases = to_bytes(extract(model, other)), to_bytes(extract(model, active).bases)
    base = to_bytes(nnx.state(detach(nnx.clone(model))))
    old = extract(model, active).trainable
    train(model)
    assert to_bytes(extract(model, other)) == before
    assert to_bytes(extract(model, active).bases) == bases
    for was, now in zip(jax.tree.leaves(old), jax.tree.leaves(extract(model, active).trainable), strict=True):
        assert was.tobytes() != now.tobytes()
    np.testing.assert_array_equal(set_adapter(model, other)(X), output_of(other))
    assert to_bytes(nnx.state(detach(model))) == base


def test_what_one_adapter_learned_survives_switching():
    model = train(set_adapter(two(), "first"), steps=1)
    want = np.asarray(model(X))
    assert np.any(want != output_of("first"))
    set_adapter(model, "second")
    np.testing.assert_array_equal(set_adapter(model, "first")(X), want)


def test_split_merge_and_clone_keep_all_adapters_and_which_is_active():
    model = set_adapter(two(), "first")
    graph, trainable, rest = nnx.split(model, RandLoraParam, ...)
    assert len(jax.tree.leaves(trainable)) == 2 * len(first().modules)
    for again in (nnx.merge(graph, trainable, rest), nnx.clone(model)):
        assert (adapter_names(again), active_adapter(again)) == (("first", "second"), "first")
        np.testing.assert_array_equal(again(X), output_of("first"))
        np.testing.assert_array_equal(set_adapter(again, "second")(X), output_of("second"))
    assert active_adapter(model) == "first"


def test_jit_computes_with_the_adapter_that_is_active_and_compiles_once_for_each():
    model, traces = two(), []

    @nnx.jit
    def forward(model, x):
        traces.append(active_adapter(model))
        return model(x)

    for name in ("second", "first", "second", "first"):
        chex.assert_trees_all_close(
            forward(set_adapter(model, name), X), output_of(name), **TOLERANCE["float32", "forward"]
        )
    chex.assert_trees_all_close(
        forward(disable_adapters(model), X), output_of("base"), **TOLERANCE["float32", "forward"]
    )
    assert traces == ["second", "first", "first"]


def test_deleting_an_inactive_adapter_changes_nothing_of_the_active_one():
    model = two()
    assert delete_adapter(model, "first") is model
    assert (adapter_names(model), active_adapter(model)) == (("second",), "second")
    np.testing.assert_array_equal(model(X), output_of("second"))
    # Kernels that only the deleted adapter had are plain again, and its bases are gone.
    alone = attach(net(), second(), adapter_name="second", layouts=LAYOUTS)
    assert nnx.graphdef(model) == nnx.graphdef(alone)
    assert to_bytes(nnx.state(model)) == to_bytes(nnx.state(alone))


def test_deleting_the_active_adapter_leaves_the_base_model_until_another_is_set():
    model = delete_adapter(two(), "second")
    assert (adapter_names(model), active_adapter(model)) == (("first",), None)
    np.testing.assert_array_equal(model(X), output_of("base"))
    assert jax.tree.leaves(nnx.state(model, RandLoraParam)) == []
    with pytest.raises(ValueError, match=r"no adapter is active: it has \('first',\)\. set_adapter\(model, name\)"):
        extract(model)
    np.testing.assert_array_equal(set_adapter(model, "first")(X), output_of("first"))


def test_deleting_the_last_adapter_gives_back_the_model():
    model = delete_adapter(delete_adapter(two(), "second"), "first")
    assert adapter_names(model) == ()
    assert nnx.graphdef(model) == nnx.graphdef(net())
    assert to_bytes(nnx.state(model)) == to_bytes(nnx.state(net()))


def test_detaching_takes_all_adapters_off_and_merges_the_active_one():
    assert to_bytes(nnx.state(detach(two()))) == to_bytes(nnx.state(net()))
    merged = detach(set_adapter(two(), "first"), merge=True)
    assert nnx.graphdef(merged) == nnx.graphdef(net())
    np.testing.assert_array_equal(merged(X), output_of("first"))


def test_a_deleted_name_is_free_again_and_an_attached_adapter_becomes_the_active_one():
    model = delete_adapter(two(), "first")
    attach(model, first(), adapter_name="first", layouts=LAYOUTS)
    assert active_adapter(model) == "first"
    np.testing.assert_array_equal(model(X), output_of("first"))


def test_a_fresh_adapter_beside_a_trained_one_starts_from_the_base_model():
    model = attach(net(), first(), adapter_name="first", layouts=LAYOUTS)
    attach(model, SECOND, adapter_name="new", layouts=LAYOUTS)
    np.testing.assert_array_equal(model(X), output_of("base"))
    np.testing.assert_array_equal(set_adapter(model, "first")(X), output_of("first"))


HAS = r"it has \('first', 'second'\)\. set_adapter\(model, name\) makes one the active one\."


@pytest.mark.parametrize("function", [set_adapter, delete_adapter, extract])
def test_a_name_that_the_model_does_not_have_is_refused_with_those_it_has(function):
    model = two()
    before = to_bytes(nnx.state(model))
    with pytest.raises(ValueError, match=rf"the model has no adapter 'third': {HAS}"):
        function(model, "third")
    assert to_bytes(nnx.state(model)) == before
    assert active_adapter(model) == "second"


@pytest.mark.parametrize("function", [set_adapter, delete_adapter, extract])
def test_a_model_without_adapters_says_how_to_add_one(function):
    with pytest.raises(ValueError, match=r"has no adapter attached: attach\(model, config\) adds one\."):
        function(net(), "default")
    assert (adapter_names(net()), active_adapter(net())) == ((), None)


def test_a_taken_name_is_refused_and_the_model_stays_as_it_was():
    model = two()
    with pytest.raises(ValueError, match=r"under the name 'first': pass another adapter_name, or delete_adapter"):
        attach(model, first(), adapter_name="first", layouts=LAYOUTS)
    assert active_adapter(model) == "second"
    np.testing.assert_array_equal(model(X), output_of("second"))


@pytest.mark.parametrize("name", ["my-adapter", "a.b", "1", "items"])
def test_a_name_that_cannot_stand_in_a_path_of_the_state_is_refused(name):
    with pytest.raises(ValueError, match=rf"adapter_name='{name}' cannot be part of a path .* use letters, digits and"):
        attach(net(), FIRST, adapter_name=name, layouts=LAYOUTS)


def test_a_refused_second_adapter_leaves_the_first_active():
    model = attach(net(), first(), adapter_name="first", layouts=LAYOUTS)
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match=r"entry 'gate' matches none of the"):
        attach(model, RandLoraConfig(r=3, target_modules=["gate"]), adapter_name="second", layouts=LAYOUTS)
    assert nnx.graphdef(model) == before
    np.testing.assert_array_equal(model(X), output_of("first"))


def test_two_adapters_on_scanned_layers_are_bound_together():
    class Scanned(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(rngs.split(3))

        def __call__(self, x):
            step = lambda x, layer: nnx.tanh(layer(x))  # noqa: E731
            return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    layouts = {"layers": Layout((1,), (2,), (0,))}
    configs = [RandLoraConfig(r=r, randlora_alpha=r, target_modules=["layers"], init_weights=False) for r in (3, 4)]
    model, alone = Scanned(nnx.Rngs(0)), []
    for i, config in enumerate(configs):
        attach(model, config, adapter_name=f"adapter_{i}", layouts=layouts, rngs=nnx.Rngs(i))
        other = attach(Scanned(nnx.Rngs(0)), extract(model, f"adapter_{i}"), layouts=layouts)
        with bound_bases(other):
            alone.append(other(X))
    for i, want in enumerate(alone):
        with bound_bases(set_adapter(model, f"adapter_{i}")):
            np.testing.assert_array_equal(model(X), want)
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    assert len(jax.tree.leaves(nnx.state(model, RandLoraBasis))) == 4


# --- Files -----------------------------------------------------------------------------------------------------------


def test_one_of_two_adapters_can_be_saved_and_attached_elsewhere(tmp_path):
    extract(two(), "first").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (3, ["q_proj", "v_proj"])
    model = attach(net(), tmp_path, layouts=LAYOUTS)
    np.testing.assert_array_equal(model(X), output_of("first"))
    # Beside one whose bases differ, each keeps its own.
    model = attach(net(), second(), adapter_name="second", layouts=LAYOUTS)
    attach(model, tmp_path, adapter_name="loaded", layouts=LAYOUTS)
    np.testing.assert_array_equal(model(X), output_of("first"))
    np.testing.assert_array_equal(set_adapter(model, "second")(X), output_of("second"))


TORCH_SHAPES = {
    "model.layers.0.self_attn.q_proj": (10, 8),
    "model.layers.0.self_attn.v_proj": (10, 8),
    "model.layers.1.self_attn.v_proj": (10, 8),
    "model.layers.1.self_attn.o_proj": (8, 10),
}


def test_a_folder_from_torch_finds_its_weights_by_the_names_in_the_layouts(tmp_path):
    """q is a kernel, v the second half of a fused one, o runs from heads back; none has its torch name in the model."""
    source = draw_adapter(shapes=TORCH_SHAPES, r=4, randlora_alpha=4)
    save(source, tmp_path)
    model = attach(net(), tmp_path, layouts=LAYOUTS)
    base = net()
    for i, name, place in (
        (0, "q", lambda model: model.layers[0].attn.q.kernel[...].reshape(8, 10).T),
        (0, "v", lambda model: model.layers[0].attn.kv.kernel[1].transpose(0, 2, 1).reshape(10, 8)),
        (1, "v", lambda model: model.layers[1].attn.kv.kernel[1].transpose(0, 2, 1).reshape(10, 8)),
        (1, "o", lambda model: model.layers[1].attn.out.kernel[...].reshape(10, 8).T),
    ):
        update = source.delta_weight(f"model.layers.{i}.self_attn.{name}_proj")
        np.testing.assert_allclose(place(model) - place(base), update, **TOLERANCE["float32", "delta_weight"])
    for i in (0, 1):  # k is in the same array as v, and not adapted
        np.testing.assert_array_equal(model.layers[i].attn.kv.kernel[0], base.layers[i].attn.kv.kernel[0])
    again = extract(model).to_interop()
    assert again.modules == tuple(sorted(TORCH_SHAPES))
    assert dict(again.shapes) == TORCH_SHAPES
    for name, pair in source.factors.items():
        assert to_bytes(again.factors[name]) == to_bytes(pair)
    params = load_adapter(tmp_path, nnx.state(base), layouts=LAYOUTS)
    chex.assert_trees_all_close(
        effective_params(nnx.state(base), params)["layers"][0]["attn"]["kv"]["kernel"][...],
        model.layers[0].attn.kv.kernel[...],
        **TOLERANCE["float32", "merge"],
    )


# --- Targets ---------------------------------------------------------------------------------------------------------


def state():
    return nnx.state(net())


def config(targets, **fields):
    return RandLoraConfig(r=4, randlora_alpha=4, target_modules=targets, **fields)


def test_find_targets_lists_weights_by_their_names_in_files():
    found = find_targets(config(["q_proj", "v_proj", "layers.1.up"]), state(), layouts=LAYOUTS)
    assert found == {
        "model.layers.0.self_attn.q_proj": (10, 8),
        "model.layers.0.self_attn.v_proj": (10, 8),
        "model.layers.1.self_attn.q_proj": (10, 8),
        "model.layers.1.self_attn.v_proj": (10, 8),
        "layers.1.up": (8, 8),
    }


PLAIN = {name: Layout(layout.in_axes, layout.out_axes, layout.stack_axes) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize(
    "targets",
    [
        "layers/.*/(q|up)",
        r"layers\..*\.(q|up)",
        r"layers/\d/(attn/q|up)",
        ["q", "up"],
        ["attn/q", "up"],
        ["attn.q", "up"],
    ],
    ids=str,
)
def test_targets_are_written_with_slashes_or_dots(targets):
    found = find_targets(config(targets), state(), layouts=PLAIN)
    assert sorted(found) == ["layers.0.attn.q", "layers.0.up", "layers.1.attn.q", "layers.1.up"]
    adapter = init(config(targets), state(), layouts=PLAIN)
    assert adapter.modules == tuple(sorted(found))


def test_a_stacked_kernel_is_targeted_as_a_whole_and_listed_by_weight():
    found = find_targets(config("layers/0/attn/kv"), state(), layouts=PLAIN)
    assert found == {"layers.0.attn.kv.0": (10, 8), "layers.0.attn.kv.1": (10, 8)}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_porj"],
            r"entry 'q_porj' matches none of the 11 adaptable layers\. Did you mean 'q_proj'\? Adaptable layers",
        ),
        (["self_attn/o_prj"], r"'self_attn/o_prj' matches none .* Did you mean 'self_attn\.o_proj' or "),
        ("layers/.*/(q|v)", r"entry 'layers/\.\*/\(q\|v\)' matches none of the 11 .* Adaptable layers end in: "),
        ("up", r"A string is a regular expression for the whole name; for a suffix write \['up'\]\."),
        (["bias"], r"It matches '[a-z0-9.]*\.bias', which is not a linear layer's kernel"),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_refused_with_the_nearest_names(targets, message):
    with pytest.raises(ValueError, match=message):
        find_targets(config(targets), state(), layouts=LAYOUTS)
    with pytest.raises(ValueError, match=message):
        attach(net(), config(targets), layouts=LAYOUTS)


@pytest.mark.parametrize(
    "targets",
    ["layers/.*/(q|up)", ["attn/q", "up"], ["q", "up"], "layers/./attn/kv", ["kv", "lm_head"], "all-linear"],
    ids=str,
)
def test_the_file_has_targets_by_which_others_find_its_modules(targets, tmp_path):
    """In dots, and of the very names that the tensors have: a torch model of those names is adapted alike."""
    adapter = init(config(targets), state(), layouts=PLAIN)
    adapter.save_pretrained(tmp_path)
    written = RandLoraConfig.from_pretrained(tmp_path)
    modules = adapter.to_interop().modules
    assert "/" not in str(written.target_modules)
    everything = [*modules, "elsewhere.down"] if targets != "all-linear" else modules
    assert resolve_targets(written, list(everything)) == modules
    assert load_adapter(tmp_path, state(), layouts=PLAIN).modules == adapter.modules


@pytest.mark.parametrize("layouts", [PLAIN])
def test_the_recorded_config_makes_a_new_adapter_of_the_same_layers(layouts):
    adapter = init(config(["kv"]), state(), layouts=layouts)
    assert init(adapter.config, state(), layouts=layouts).modules == adapter.modules


def test_the_recorded_config_of_named_weights_makes_a_new_adapter_of_the_same_layers():
    adapter = init(config(["v_proj", "up"]), state(), layouts=LAYOUTS)
    again = init(adapter.config, state(), layouts=LAYOUTS)
    assert (again.modules, again.layouts) == (adapter.modules, adapter.layouts)

"""Checkpoints: a resumed run is the uninterrupted one, only the adapter is written, what does not fit is refused."""

import dataclasses
import functools
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from interop import RandLoraConfig
from interop.errors import AdapterFormatError
from randlora_jax import Layout, RandLoraParam, attach, effective_params, extract, init
from randlora_jax.checkpoint import AdapterCheckpoints, Restored
from randlora_jax.provenance import kernel_checksums
from randlora_jax.quantized import Quantized8bit
from randlora_jax.sharding import shardings_of

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["up", "down"])
STEPS, MIDDLE = 6, 3


def base_params(scale=1.0):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape) / 3, jnp.float32)  # noqa: E731
    return {"up": {"kernel": draw(8, 16)}, "down": {"kernel": draw(16, 8)}}


def adapter_of(params=None, **fields):
    return init(dataclasses.replace(CONFIG, **fields), base_params() if params is None else params)


def batch(step):
    return np.random.default_rng(100 + step).standard_normal((8, 8), np.float32)


def optimizer():
    """With two counters: adam's and the schedule's."""
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.05, 2, STEPS))


def loss_of(forward, x, key):
    """Depends on a random key, as dropout does."""
    return ((forward(x * jax.random.bernoulli(key, 0.8, x.shape)) - 1) ** 2).mean()


class PytreeRun:
    """Plain functions, on one device or on a mesh, with donated buffers; its state includes a random key."""

    def __init__(self, directory, mesh=None):
        self.params = base_params()
        if mesh is not None:
            specs = {"up": {"kernel": P("fsdp", "tp")}, "down": {"kernel": P("tp", "fsdp")}}
            self.params = jax.device_put(self.params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        self.adapter = adapter_of(self.params)
        self.checkpoints = AdapterCheckpoints(directory, self.adapter, self.params)
        trainable = jax.tree.map(jnp.copy, self.adapter.trainable)
        state = (optimizer().init(trainable), jax.random.key(0))
        self.first, self.trainable, self.state = self.checkpoints.restore(trainable, state)
        pinned = {} if mesh is None else {"out_shardings": (shardings_of(trainable), on_mesh(state, mesh), None)}
        self.jitted = jax.jit(self.update, donate_argnums=(0, 1), **pinned)

    def update(self, trainable, state, adapter, params, x):
        def loss(trainable):
            weights = effective_params(params, adapter.with_trainable(trainable))
            forward = lambda x: jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"]  # noqa: E731
            return loss_of(forward, x, key)

        state, key = state[0], jax.random.fold_in(state[1], 1)
        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer().update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), (state, key), value

    def step(self, x):
        self.trainable, self.state, loss = self.jitted(self.trainable, self.state, self.adapter, self.params, x)
        return loss


def on_mesh(state, mesh):
    """The shardings of a state, counters and keys replicated."""
    return jax.tree.map(lambda leaf: leaf.sharding if leaf.committed else NamedSharding(mesh, P()), state)


class Model(nnx.Module):
    def __init__(self):
        params = base_params()
        self.up, self.down = (nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in ((8, 16), (16, 8)))
        self.up.kernel[...], self.down.kernel[...] = params["up"]["kernel"], params["down"]["kernel"]

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


class NnxRun:
    """An NNX model and its optimizer, which hold their values themselves."""

    def __init__(self, directory):
        self.model = attach(Model(), CONFIG)
        self.optimizer = nnx.Optimizer(self.model, optimizer(), wrt=RandLoraParam)
        self.checkpoints = AdapterCheckpoints(directory, extract(self.model), self.model)
        self.first, trainable, state = self.checkpoints.restore(self.trainable, self.state)
        nnx.update(self.model, trainable)
        nnx.update(self.optimizer, state)

    trainable = property(lambda self: nnx.state(self.model, RandLoraParam))
    state = property(lambda self: nnx.state(self.optimizer, nnx.optimizer.OptState))

    @staticmethod
    @nnx.jit
    def update(model, optimizer, x):
        loss = lambda model: loss_of(model, x, jax.random.key(0))  # noqa: E731
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
        optimizer.update(model, gradients)
        return value

    def step(self, x):
        return self.update(self.model, self.optimizer, x)


def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: tests/conftest.py forces them on CPU")
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


RUNS = {"pytree": PytreeRun, "mesh": lambda directory: PytreeRun(directory, mesh()), "nnx": NnxRun}


def bits(tree):
    """Every array on the host, random keys as their words."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.device_get(jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "mesh")) for k in RUNS])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind, tmp_path):
    run, losses = RUNS[kind](tmp_path), []
    for index in range(STEPS):
        losses.append(float(run.step(batch(index))))
        if index + 1 == MIDDLE:  # written in the background, while the step overwrites what it was given
            assert run.checkpoints.save(MIDDLE, run.trainable, run.state)
    run.checkpoints.close()
    again = RUNS[kind](tmp_path)
    assert again.first == MIDDLE
    assert [float(again.step(batch(index))) for index in range(MIDDLE, STEPS)] == losses[MIDDLE:]
    chex.assert_trees_all_equal(bits((again.trainable, again.state)), bits((run.trainable, run.state)))
    again.checkpoints.close()
    assert losses[-1] < losses[0] - 0.05


@pytest.fixture
def written(tmp_path):
    """A directory with a checkpoint of step 1, and the values in it."""
    trainable = randomized(adapter_of().trainable)
    state = randomized(optax.adam(0.1).init(trainable))
    with AdapterCheckpoints(tmp_path, adapter_of(), base_params()) as checkpoints:
        checkpoints.save(1, trainable, state)
    return tmp_path, trainable, state


def randomized(tree):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(100 * rng.standard_normal(leaf.shape), leaf.dtype), tree)


def test_an_empty_directory_gives_the_starting_values_at_step_0(tmp_path):
    with AdapterCheckpoints(tmp_path / "new", adapter_of(), base_params()) as checkpoints:
        assert checkpoints.steps == ()
        assert checkpoints.restore("given", "state") == Restored(0, "given", "state")
        with pytest.raises(ValueError, match=r"step=2: .* has checkpoints of \(\)"):
            checkpoints.restore("given", "state", step=2)


def test_the_factors_alone_are_restored_where_no_state_is_given(written):
    directory, trainable, _ = written
    with AdapterCheckpoints(directory, adapter_of(), None) as checkpoints:
        restored = checkpoints.restore(adapter_of().trainable)
    assert restored.opt_state is None
    chex.assert_trees_all_equal(restored.trainable, trainable)
    assert adapter_of().with_trainable(restored.trainable).modules == ("down", "up")


def test_arrays_come_back_with_the_shardings_and_kinds_of_those_given(tmp_path):
    spread = NamedSharding(mesh(), P(None, "fsdp"))
    replicated = NamedSharding(spread.mesh, P())
    adapter = adapter_of()
    placed = lambda leaf: jax.device_put(leaf, spread if leaf.shape == (2, 8) else replicated)  # noqa: E731
    trainable = jax.tree.map(placed, randomized(adapter.trainable))
    key = jax.device_put(jax.random.key(5), replicated)
    state = {
        "scalar": jnp.zeros(()),
        "key": key,
        "numpy": np.arange(3.0),
        "int": 7,
        "float": np.float32(0.1),
        "none": None,
    }
    with AdapterCheckpoints(tmp_path, adapter, None) as checkpoints:
        checkpoints.save(1, adapter.trainable, state | {"int": 8})
        checkpoints.save(2, trainable, state)
        _, got, got_state = checkpoints.restore(trainable, state | {"int": 0, "scalar": jnp.ones(())})
        elsewhere = checkpoints.restore(adapter.trainable, state, step=1)
    assert shardings_of(got) == shardings_of(trainable)
    chex.assert_trees_all_equal(bits(got), bits(trainable))
    chex.assert_trees_all_equal(bits(elsewhere.trainable), bits(adapter.trainable))
    assert (elsewhere.step, elsewhere.opt_state["int"]) == (1, 8)
    assert {name: type(value) for name, value in got_state.items()} == {
        name: type(value) for name, value in state.items()
    }
    assert not got_state["scalar"].committed  # else it could not be used along with arrays on the mesh
    assert (got_state["key"].sharding, got_state["key"].dtype) == (replicated, key.dtype)
    chex.assert_trees_all_equal(jax.random.key_data(got_state["key"]), jax.random.key_data(key))
    np.testing.assert_array_equal(got_state["numpy"], state["numpy"])
    assert (got_state["int"], got_state["float"]) == (7, np.float32(0.1))


def test_a_state_without_arrays_is_one_too(tmp_path):
    state = optax.sgd(0.1).init(adapter_of().trainable)
    with AdapterCheckpoints(tmp_path, adapter_of(), None) as checkpoints:
        checkpoints.save(1, adapter_of().trainable, state)
        assert checkpoints.restore(adapter_of().trainable, state).opt_state == state


def test_what_fails_in_the_background_is_raised_at_the_end(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = AdapterCheckpoints(tmp_path, adapter_of(), None)
    checkpoints.save(1, adapter_of().trainable, {})
    checkpoints.manager.wait_until_finished()
    try:  # as a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        assert checkpoints.save(2, adapter_of().trainable, np.random.default_rng(0).standard_normal(2**19))
        with pytest.raises((OSError, ValueError), match="File too large"):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with AdapterCheckpoints(tmp_path, adapter_of(), None) as checkpoints:
        assert checkpoints.steps == (1,)  # what was half written is no checkpoint


def test_neither_the_base_model_nor_the_bases_are_written(tmp_path):
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}}
    adapter = init(RandLoraConfig(r=16, target_modules=["layer"]), params)
    trainable = randomized(adapter.trainable)
    with AdapterCheckpoints(tmp_path, adapter, params) as checkpoints:
        checkpoints.save(1, trainable, optax.adam(0.1).init(trainable))
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    smallest = min(params["layer"]["kernel"].nbytes, adapter.bases.B.nbytes)
    assert written < smallest / 2
    found = ocp.StandardCheckpointer().restore(tmp_path / "1" / "trainable")  # as any user of Orbax reads it
    assert set(found) == {"layer/lam", "layer/gamma"}
    np.testing.assert_array_equal(found["layer/gamma"], trainable["layer"].gamma)
    assert {path.name for path in (tmp_path / "1").iterdir() if path.is_dir()} == {"trainable", "opt_state", "adapter"}


def test_the_metadata_say_config_recipe_and_hash_of_the_bases(written):
    with ocp.CheckpointManager(written[0]) as manager:
        found = manager.restore(1, args=ocp.args.Composite(adapter=ocp.args.JsonRestore()))["adapter"]
    assert RandLoraConfig.from_dict(found["config"]) == adapter_of().config
    assert (found["version"], found["recipe"], len(found["bases_sha256"])) == (1, "torch>=2.12", 64)
    assert found["modules"]["up"]["shape"] == [16, 8]
    assert found["kernels"]["up"].startswith("float32(8, 16) ")
    assert found["trainable"]["up/lam"] == "float32(4, 2)"


def test_old_checkpoints_go_and_steps_between_are_skipped(tmp_path):
    trainable = adapter_of().trainable
    with AdapterCheckpoints(tmp_path, adapter_of(), None, max_to_keep=2, save_interval_steps=2) as checkpoints:
        saved = [checkpoints.save(step, trainable, {"step": step}) for step in range(2, 8)]
        assert saved == [True, False, True, False, True, False]
        assert checkpoints.save(7, trainable, {"step": 7}, force=True)
        assert not checkpoints.save(7, trainable, {"step": 7}, force=True)
    with AdapterCheckpoints(tmp_path, adapter_of(), None) as checkpoints:
        assert checkpoints.steps == (6, 7)
        assert checkpoints.restore(trainable, {"step": 0}, step=6).opt_state == {"step": 6}
        with pytest.raises(ValueError, match=r"step=6: .* later step, 7. Go on in another directory, or remove"):
            checkpoints.save(6, trainable, {"step": 6})


BASE = base_params()
OTHER = {
    "rank": ({"r": 2}, BASE, ["r: 4 in the checkpoint, 2 here"]),
    "alpha": ({"randlora_alpha": 4}, BASE, ["randlora_alpha: 8 in the checkpoint, 4 here"]),
    "seed": ({"projection_prng_key": 2**64 - 1}, BASE, ["bases: ", f"projection_prng_key={2**64 - 1}"]),
    "kind of bases": ({"sparse": True}, BASE, ["bases: ", "sparse=True"]),
    "modules": ({"target_modules": ["up"]}, BASE, ["down: adapted in the checkpoint, not adapted here"]),
    "base model": ({}, base_params(2.0), ["base kernel down: float32(16, 8) ", "base kernel up: float32(8, 16) "]),
    "dtype of the base model": (
        {},
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE),
        ["base kernel up: float32(8, 16) ", "bfloat16(8, 16) "],
    ),
    "size of the base model": (
        {},
        {"up": BASE["up"], "down": {"kernel": jnp.ones((16, 12))}},
        ["shape of down: [8, 16] in the checkpoint, [12, 16] here", "base kernel down: float32(16, 8) "],
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_checkpoint_of_another_adapter_or_base_is_refused_with_what_differs(what, written):
    fields, params, reasons = OTHER[what]
    with pytest.raises(AdapterFormatError, match=r"step 1 in .* is a checkpoint of another adapter or base") as refused:
        AdapterCheckpoints(written[0], adapter_of(params, **fields), params)
    for reason in reasons:
        assert reason in str(refused.value)
    listed = [line for line in str(refused.value).splitlines() if line.startswith("  - ")]
    unchanged = {"base kernel": "base model" not in what, "alpha": what != "alpha", "adapted": what != "modules"}
    assert not [line for line in listed for word, expected in unchanged.items() if word in line and expected]
    assert "Use the config and the base model of the run" in str(refused.value)


def test_other_recipes_are_refused_and_other_layouts_of_the_same_kernel(tmp_path):
    params = {"experts": {"kernel": jnp.ones((2, 8, 8))}}
    adapter = lambda recipe, modules, in_axis=1: init(  # noqa: E731
        RandLoraConfig(r=4, target_modules=["experts.a"]),
        params,
        recipe=recipe,
        layouts={"experts": Layout((in_axis,), (3 - in_axis,), (0,), modules)},
    )
    first = adapter("torch>=2.12", ("experts.a", "experts.b"))
    with AdapterCheckpoints(tmp_path, first, params) as checkpoints:
        checkpoints.save(1, first.trainable, {})
    with pytest.raises(AdapterFormatError, match=r"bases: .*recipe='torch>=2.12'\) in .*recipe='torch<=2.11'\) here"):
        AdapterCheckpoints(tmp_path, adapter("torch<=2.11", ("experts.a", "experts.b")), params)
    with pytest.raises(AdapterFormatError, match=r"layout of experts: .*'adapted': \[0\].*'adapted': \[1\]"):
        AdapterCheckpoints(tmp_path, adapter("torch>=2.12", ("experts.b", "experts.a")), params)
    with pytest.raises(AdapterFormatError, match=r"layout of experts: .*'in_axes': \[1\].*'in_axes': \[2\]"):
        AdapterCheckpoints(tmp_path, adapter("torch>=2.12", ("experts.a", "experts.b"), in_axis=2), params)


def test_what_does_not_change_the_update_is_not_compared(written):
    fields = {
        "inference_mode": True,
        "revision": "other",
        "base_model_name_or_path": "elsewhere",
        "save_projection": False,
        "target_modules": "up|down",
        "randlora_alpha": 8.0,
        "unknown_fields": {"new": 1},
    }
    adapter = adapter_of(**fields).with_bases_dtype(jnp.float32)
    for params in (BASE, None):
        with AdapterCheckpoints(written[0], adapter, params) as checkpoints:
            chex.assert_trees_all_equal(checkpoints.restore(adapter.trainable).trainable, written[1])


def test_an_older_checkpoint_of_another_adapter_is_refused_when_it_is_asked_for(written):
    directory, trainable, state = written
    shutil.copytree(directory / "1", directory / "2")
    other = directory / "2" / "adapter" / "metadata"
    other.write_text(other.read_text().replace('"randlora_alpha": 8', '"randlora_alpha": 9'))
    (directory / "1").rename(directory / "3")
    with AdapterCheckpoints(directory, adapter_of(), BASE) as checkpoints:
        assert checkpoints.restore(trainable, state).step == 3
        with pytest.raises(AdapterFormatError, match=r"step 2 in .*\n  - randlora_alpha: 9 in the checkpoint, 8 here"):
            checkpoints.restore(trainable, state, step=2)


def test_another_optimizer_or_dtype_is_refused_with_what_differs(written):
    directory, trainable, state = written
    with AdapterCheckpoints(directory, adapter_of(), BASE) as checkpoints:
        with pytest.raises(AdapterFormatError, match=r"opt_state 0/nu/down/gamma: float32\(2, 8\) in .*, none given"):
            checkpoints.restore(trainable, optax.sgd(0.1, momentum=0.9).init(trainable))
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainable)
        with pytest.raises(AdapterFormatError, match=r"trainable up/lam: float32\(4, 2\) in .* bfloat16\(4, 2\) given"):
            checkpoints.restore(narrow, state)


def test_a_base_model_in_nnx_is_compared_too(tmp_path):
    model = attach(Model(), CONFIG)
    names = ("up", "down")
    assert kernel_checksums(model, names) == kernel_checksums(Model(), names) == kernel_checksums(BASE, names)
    with AdapterCheckpoints(tmp_path, extract(model), model) as checkpoints:
        checkpoints.save(1, nnx.state(model, RandLoraParam), {})
    model.down.kernel.base[...] += 1e-6
    with pytest.raises(
        AdapterFormatError, match=r"base kernel down: float32\(16, 8\) \w{8} in the checkpoint"
    ) as refused:
        AdapterCheckpoints(tmp_path, extract(model), model)
    assert "base kernel up" not in str(refused.value)


@pytest.mark.parametrize("mistake", ["the whole adapter", "the model's state", "half of it"])
def test_what_is_not_the_adapters_trainable_part_is_not_saved(mistake, tmp_path):
    adapter = adapter_of()
    given = {
        "the whole adapter": adapter,
        "the model's state": nnx.state(attach(Model(), CONFIG)),
        "half of it": {"up": adapter.trainable["up"]},
    }[mistake]
    with AdapterCheckpoints(tmp_path, adapter, BASE) as checkpoints:
        with pytest.raises(
            ValueError, match=r"trainable holds [\d,]+ numbers, the adapter trains 48: pass adapter.tra"
        ):
            checkpoints.save(1, given, {})
        assert checkpoints.steps == ()


def test_directories_of_something_else_are_refused(written, tmp_path_factory):
    directory, *_ = written
    file = directory / "file"
    file.write_text("")
    refuse(file, "is a file: give the directory")
    refuse(directory / "1", "is a single checkpoint: give its parent, and step=")
    arrays = ocp.args.StandardSave({"a": jnp.ones(3)})
    others = {
        "one item": arrays,
        "an item of that name": ocp.args.Composite(adapter=arrays),
        "JSON of that name": ocp.args.Composite(adapter=ocp.args.JsonSave([1])),
    }
    for name, args in others.items():
        other = tmp_path_factory.mktemp(name)
        with ocp.CheckpointManager(other) as manager:
            manager.save(1, args=args)
        refuse(other, "step 1 in .* is no checkpoint of an adapter: give another directory")


def refuse(path, match):
    with pytest.raises(AdapterFormatError, match=match):
        AdapterCheckpoints(path, adapter_of(), BASE)


def test_another_version_of_the_format_is_refused(written):
    described = written[0] / "1" / "adapter" / "metadata"
    described.write_text(described.read_text().replace('"version": 1', '"version": 0'))
    refuse(written[0], "format version 0, this release reads 1. Read it with the release of randlora that wrote it")


def test_adapters_and_params_that_cannot_be_described_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not know the shapes of its layers: load_adapter"):
        AdapterCheckpoints(tmp_path, dataclasses.replace(adapter_of(), shapes=None), BASE)
    with pytest.raises(ValueError, match=r"params lacks these adapted kernels \(it has 1 parameters, such as 'up'\)"):
        AdapterCheckpoints(tmp_path, adapter_of(), {"up": BASE["up"]})
    with pytest.raises(
        ValueError, match=r"params holds no arrays for these kernels, pass None or the values:\n  - down"
    ):
        AdapterCheckpoints(tmp_path, adapter_of(), jax.eval_shape(base_params))
    with pytest.raises(ValueError, match=r"two of the 2 arrays have one path"):
        AdapterCheckpoints(tmp_path, adapter_of(), None).save(1, adapter_of().trainable, {"a/b": 1, "a": {"b": 2}})


KERNEL = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


def checksum(kernel):
    return kernel_checksums({"layer": {"kernel": kernel}}, ("layer",))["layer"]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float32", AxisType.Auto),
        ("float32", AxisType.Explicit),
        ("bfloat16", AxisType.Auto),
        ("int4", AxisType.Explicit),
        ("float8_e4m3fn", AxisType.Auto),
    ],
)
def test_a_checksum_is_the_same_however_the_kernel_is_sharded(dtype, kind):
    devices = mesh().devices
    kernel = jnp.asarray(4 * KERNEL).astype(dtype)
    for spec in (P("fsdp", "tp"), P(None, ("fsdp", "tp"))):
        spread = jax.device_put(kernel, NamedSharding(jax.sharding.Mesh(devices, ("fsdp", "tp"), (kind, kind)), spec))
        assert checksum(spread) == checksum(kernel)


def test_a_checksum_sees_every_element_and_its_place():
    words = KERNEL.view(np.uint32)
    lowest_bit, sign = words.copy(), words.copy()
    lowest_bit[3, 5] ^= 1
    sign[7, 15] ^= 1 << 31
    moved = [np.roll(KERNEL, 1, axis) for axis in (0, 1)] + [KERNEL[::-1], KERNEL[:, ::-1], KERNEL.reshape(16, 8).T]
    rounded = jnp.asarray(KERNEL).astype(jnp.bfloat16)
    changed = [lowest_bit.view(np.float32), sign.view(np.float32), rounded, rounded.astype(np.float32), 0 * KERNEL]
    sums = [checksum(jnp.asarray(kernel)).split()[-1] for kernel in (KERNEL, *moved, *changed)]
    assert len(set(sums)) == len(sums)
    assert checksum(jnp.asarray(KERNEL.reshape(16, 8))) != checksum(jnp.asarray(KERNEL))  # by its shape


def test_checksums_of_wide_and_of_quantized_kernels():
    with jax.enable_x64(True):
        wide = jnp.asarray(KERNEL, jnp.float64)
        nudged = wide.at[0, 0].set(np.nextafter(float(KERNEL[0, 0]), 9.0))
        assert checksum(wide).startswith("float64(8, 16) ")
        assert checksum(wide) != checksum(nudged)
    kernel = functools.partial(
        Quantized8bit, layout=Layout((0,), (1,)), kernel_shape=(8, 16), dtype=np.dtype(np.float32)
    )
    values, scales = jnp.arange(128, dtype=jnp.int8).reshape(16, 8), jnp.ones(16)
    sums = {checksum(kernel(v, s)) for v in (values, values + 1) for s in (scales, 2 * scales)}
    assert len(sums) == 4


def test_orbax_is_imported_with_this_module_only_and_named_where_it_is_missing():
    code = """
import sys, randlora_jax
assert not [name for name in sys.modules if name.partition(".")[0] == "orbax"]
sys.modules["orbax.checkpoint"] = None
try:
    import randlora_jax.checkpoint
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "orbax-checkpoint is not installed: pip install 'randlora[orbax]'."

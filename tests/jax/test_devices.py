"""What must not depend on the hardware: an NVIDIA GPU by default multiplies float32 in TF32, a TPU in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from tolerances import TOLERANCE

from randlora_jax import (
    RandLoraConfig,
    RandLoraParam,
    attach,
    detach,
    effective_params,
    extract,
    init,
    merge,
    unmerge,
)
from randlora_jax.quantized import from_bnb
from tests.jax.programs import equations
from tests.jax.test_quantized import assert_same_bits, eight_bit, four_bit

no_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs jax on a CUDA device")
DEVICES = ["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, no_gpu])]
CONFIG = RandLoraConfig(r=16, randlora_alpha=16, target_modules=["up", "down"], init_weights=False)


@pytest.fixture(params=DEVICES)
def device(request):
    first = jax.local_devices(backend=request.param)[0]
    with jax.default_device(first), jax.default_matmul_precision(None):  # None: what the hardware does fastest
        yield request.param


def params_of(dtype=jnp.float32):
    up, down = jax.random.split(jax.random.key(0))
    shapes = {"up": (up, (64, 160)), "down": (down, (160, 64))}
    return {name: {"kernel": jax.random.normal(key, shape, dtype)} for name, (key, shape) in shapes.items()}


def oracle_delta(adapter, name):
    """dW of a kernel (in, out) by the oracle."""
    part, shape = adapter.to_interop(), dict(adapter.shapes)[name]
    factors = part.factors[name]
    return oracle.delta_weight(*part.bases, *factors, scaling=CONFIG.scaling, shape=shape).T


def precisions(fn, *arguments):
    """The precision of every matrix product in a trace."""
    traced = equations(jax.make_jaxpr(fn)(*arguments))
    found = {equation.params["precision"] for equation in traced if equation.primitive.name == "dot_general"}
    assert found
    return found


HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
FULL = {
    "merge": merge,
    "unmerge": unmerge,
    "delta_weight": lambda params, adapter: adapter.delta_weight("up"),
}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("jit", [False, True])
def test_what_is_computed_once_asks_for_full_precision(name, jit):
    params, adapter = params_of(), init(CONFIG, params_of(), key=jax.random.key(1))
    with jax.default_matmul_precision("bfloat16"):
        assert precisions(jax.jit(FULL[name]) if jit else FULL[name], params, adapter) == {HIGHEST}


def test_training_multiplies_as_jax_is_told_to_and_the_small_products_stay_in_full_precision():
    params, adapter = params_of(), init(CONFIG, params_of(), key=jax.random.key(1))

    def loss(trainable, params):
        adapted = effective_params(params, adapter.with_trainable(trainable))
        return sum(layer["kernel"].sum() for layer in adapted.values())

    trace = functools.partial(precisions, jax.grad(loss), adapter.trainable, params)
    with jax.default_matmul_precision(None):
        assert trace() == {None, HIGHEST}
    with jax.default_matmul_precision("highest"):
        assert trace() == {HIGHEST}


def test_a_merged_kernel_is_that_of_the_oracle(device):
    params, adapter = params_of(), init(CONFIG, params_of(), key=jax.random.key(1))
    merged = merge(params, adapter)
    assert {leaf.device.platform for leaf in jax.tree.leaves(merged)} == {device}
    for name, layer in merged.items():
        want = np.float64(params[name]["kernel"]) + oracle_delta(adapter, name)
        np.testing.assert_allclose(layer["kernel"], want, **TOLERANCE["float32"])
    for name, layer in unmerge(merged, adapter).items():
        np.testing.assert_allclose(layer["kernel"], params[name]["kernel"], **TOLERANCE["float32"])


class Net(nnx.Module):
    def __init__(self):
        self.up, self.down = (nnx.Linear(*shape, rngs=nnx.Rngs(0)) for shape in ((64, 160), (160, 64)))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_detaching_merges_in_full_precision(device):
    model = attach(Net(), CONFIG, rngs=nnx.Rngs(1))
    adapter, before = extract(model), np.float64(model.up.kernel.base[...])
    detach(model, merge=True)
    np.testing.assert_allclose(model.up.kernel[...], before + oracle_delta(adapter, "up"), **TOLERANCE["float32"])


def test_an_adapter_trains_and_its_factors_stay_where_the_model_is(device):
    model, x = attach(Net(), CONFIG, rngs=nnx.Rngs(1)), jax.random.normal(jax.random.key(2), (32, 64))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=RandLoraParam)

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, RandLoraParam)
        loss, grads = nnx.value_and_grad(lambda model: ((model(x) - x) ** 2).mean(), argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert {leaf.device.platform for leaf in jax.tree.leaves(extract(model))} == {device}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantized_kernels_have_the_same_bits_everywhere(device, kind, dtype):
    packed = eight_bit if kind == "int8" else functools.partial(four_bit, quant_type=kind, blocksize=64)
    weight = packed((96, 64), dtype=dtype)
    got = jax.jit(lambda kernel: kernel.dequantize())(from_bnb(weight))
    assert got.device.platform == device
    assert_same_bits(got, weight.dequantize().T)

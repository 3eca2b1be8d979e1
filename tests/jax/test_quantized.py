"""Quantized kernels: they answer for the array they stand for, and give it inside every transformation."""

import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from stacks import without_type_checks
from tolerances import TOLERANCE

from interop.bnb import CODES, Weight4bit, Weight8bit
from randlora_jax.layouts import IN_OUT, OUT_IN, Layout
from randlora_jax.quantized import (
    Quantized4bit,
    Quantized8bit,
    dequantize,
    from_bnb,
    is_quantized,
    load_quantized,
    stack,
    to_qarray,
)

ROOT = Path(__file__).resolve().parents[2]


def four_bit(shape=(6, 32), *, quant_type="nf4", blocksize=32, dtype=np.float32, seed=0):
    rng = np.random.default_rng([seed, *shape])
    count = int(np.prod(shape))
    packed = rng.integers(0, 256, -(-count // 2), dtype=np.uint8)
    absmax = rng.random(-(-count // blocksize), dtype=np.float32)
    code = tuple(np.array(CODES[quant_type], np.float32).tolist())
    return Weight4bit(packed, absmax, code, blocksize, shape, np.dtype(dtype), quant_type)


def eight_bit(shape=(6, 32), *, dtype=np.float32, seed=0):
    rng = np.random.default_rng([seed, *shape])
    values = rng.integers(-127, 128, shape, dtype=np.int8)
    return Weight8bit(values, rng.random(shape[0], dtype=np.float32) / 127, np.dtype(dtype))


KINDS = {"4bit": four_bit, "8bit": eight_bit}
every_kind = pytest.mark.parametrize("kind", KINDS)
HEADS_OUT = Layout(in_axes=(0,), out_axes=(1, 2))  # (model, heads, head_dim): a query projection
HEADS_IN = Layout(in_axes=(0, 1), out_axes=(2,))  # (heads, head_dim, model): the output projection


def assert_same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(np.ravel(got).view(np.uint8), np.ravel(want).view(np.uint8))


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_kernel_is_the_transposed_torch_weight_bit_for_bit(kind, dtype):
    weight = KINDS[kind](dtype=dtype)
    kernel = from_bnb(weight)
    assert_same_bits(kernel.dequantize(), weight.dequantize().T)
    assert (kernel.shape, kernel.ndim, kernel.size, kernel.dtype) == ((32, 6), 2, 192, np.dtype(dtype))
    packed_bytes = 96 + 4 * 6 if kind == "4bit" else 192 + 4 * 6
    assert kernel.nbytes == packed_bytes


@every_kind
@pytest.mark.parametrize(
    ("layout", "kernel_shape"),
    [(OUT_IN, None), (OUT_IN, (6, 32)), (IN_OUT, (32, 6)), (HEADS_OUT, (32, 3, 2)), (HEADS_IN, (4, 8, 6))],
)
def test_the_kernel_has_the_axes_of_its_layout(kind, layout, kernel_shape):
    weight = KINDS[kind]()
    kernel = from_bnb(weight, layout, kernel_shape)
    assert kernel.shape == (kernel_shape or (6, 32))
    assert_same_bits(layout.to_torch(kernel.dequantize()), weight.dequantize())
    assert_same_bits(kernel.dequantize(), layout.to_kernel(jnp.asarray(weight.dequantize()), kernel.shape))


@pytest.mark.parametrize("shape", [(4, 24), (5, 9), (3, 5)], ids=["blocks across rows", "odd", "less than a block"])
def test_4_bit_blocks_need_not_fit_the_rows(shape):
    weight = four_bit(shape)
    assert_same_bits(from_bnb(weight).dequantize(), weight.dequantize().T)


@every_kind
def test_rounding_to_the_dtype_happens_although_the_next_operation_is_wider(kind):
    weight = KINDS[kind](dtype=ml_dtypes.bfloat16)
    wide = jax.jit(lambda kernel: kernel.dequantize().astype(jnp.float32))(from_bnb(weight))
    assert_same_bits(wide, weight.dequantize().T.astype(np.float32))
    text = jax.jit(dequantize).lower(from_bnb(weight)).as_text()
    assert "reduce_precision" in text  # which XLA keeps, while it may drop a cast to bfloat16 and back


@every_kind
def test_a_stack_is_its_kernels_along_a_new_leading_axis(kind):
    weights = [KINDS[kind](seed=i) for i in range(3)]
    stacked = stack([from_bnb(weight) for weight in weights])
    want = np.stack([weight.dequantize().T for weight in weights])
    assert (stacked.shape, stacked.ndim, stacked.size) == ((3, 32, 6), 3, 3 * 192)
    assert stacked.nbytes == 3 * from_bnb(weights[0]).nbytes
    assert_same_bits(stacked.dequantize(), want)
    twice = stack([stacked, stacked])
    assert twice.shape == (2, 3, 32, 6)
    assert_same_bits(twice.dequantize(), np.stack([want, want]))


def test_a_stack_of_kernels_with_several_axes_and_of_blocks_across_rows():
    weights = [four_bit((4, 24), seed=i) for i in range(2)]
    stacked = stack([from_bnb(weight, HEADS_OUT, (24, 2, 2)) for weight in weights])
    assert_same_bits(stacked.dequantize(), np.stack([weight.dequantize().T.reshape(24, 2, 2) for weight in weights]))


@every_kind
def test_scan_and_vmap_take_a_stack_apart_into_kernels(kind):
    weights = [KINDS[kind](seed=i) for i in range(3)]
    stacked = stack([from_bnb(weight) for weight in weights])
    want = np.stack([weight.dequantize().T for weight in weights])
    seen = []

    def layer(carry, kernel):
        seen.append((kernel.shape, kernel.ndim, kernel.size, kernel.dtype))
        return carry, kernel.dequantize()

    _, scanned = jax.jit(lambda kernels: jax.lax.scan(jax.checkpoint(layer), None, kernels))(stacked)
    assert_same_bits(scanned, want)
    assert set(seen) == {((32, 6), 2, 192, np.dtype(np.float32))}
    assert_same_bits(jax.vmap(dequantize)(stacked), want)
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert second.shape == (32, 6)
    assert_same_bits(second.dequantize(), want[1])


@pytest.mark.parametrize(
    "others",
    [
        [],
        [four_bit(), four_bit((6, 64))],
        [four_bit(), eight_bit()],
        [four_bit(), four_bit(quant_type="fp4")],
        [four_bit(), four_bit(dtype=np.float16)],
        [four_bit(), four_bit(blocksize=64)],
    ],
    ids=["none", "shape", "kind", "quant_type", "dtype", "blocksize"],
)
def test_only_kernels_of_one_kind_are_stacked(others):
    kernels = [from_bnb(weight) for weight in others]
    with pytest.raises(
        ValueError, match=rf"{len(others)} kernels of kinds .* must be of one shape, dtype, .* Stack those"
    ):
        stack(kernels)


@every_kind
@pytest.mark.parametrize("filling", [object(), None, "name", jax.sharding.PartitionSpec("x")])
def test_the_leaves_may_be_replaced_by_anything(kind, filling):
    kernel = from_bnb(KINDS[kind]())
    structure = jax.tree.structure(kernel)
    assert structure.num_leaves == 2
    filled = jax.tree.unflatten(structure, [filling, filling])
    assert [leaf for leaf in vars(filled).values() if leaf is filling] == [filling, filling]
    again = jax.tree.unflatten(structure, jax.tree.leaves(kernel))
    assert jax.tree.structure(again) == structure
    chex.assert_trees_all_equal(again, kernel)
    assert jax.tree.map(lambda leaf: filling, kernel).layout == IN_OUT


@every_kind
def test_abstract_kernels_know_shape_and_dtype_and_give_those_of_the_array(kind):
    kernel = from_bnb(KINDS[kind](dtype=ml_dtypes.bfloat16))
    abstract = jax.eval_shape(lambda: kernel)
    assert (abstract.shape, abstract.dtype) == (kernel.shape, kernel.dtype)
    array = jax.eval_shape(dequantize, abstract)
    assert (array.shape, array.dtype) == (kernel.shape, kernel.dtype)


@every_kind
def test_gradients_of_what_is_trained_pass_by_and_the_kernel_gets_none(kind, rng):
    weight = KINDS[kind]()
    x, delta = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((4, 32), (32, 6)))

    def loss(delta, kernel, x):
        return jnp.sum((x @ (dequantize(kernel) + delta)) ** 2)

    got = jax.jit(jax.grad(loss, argnums=(0, 2)))(delta, from_bnb(weight), x)
    want = jax.jit(jax.grad(loss, argnums=(0, 2)))(delta, jnp.asarray(weight.dequantize().T), x)
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])
    assert all(np.abs(gradient).max() > 0.1 for gradient in got)
    frozen = jax.grad(loss, argnums=1, allow_int=True)(delta, from_bnb(weight), x)
    assert np.abs(frozen.absmax if kind == "4bit" else frozen.scales).max() == 0


def test_what_is_not_quantized_is_returned_as_it_is():
    class QArray:  # of somebody else
        pass

    for leaf in (jnp.ones(3), np.ones(3), None, "x", QArray()):
        assert not is_quantized(leaf)
        assert dequantize(leaf) is leaf
    assert all(is_quantized(from_bnb(draw())) for draw in KINDS.values())


def test_a_tree_of_parameters_is_dequantized_leaf_by_leaf():
    params = {"a": {"kernel": from_bnb(four_bit())}, "b": {"kernel": jnp.ones(3)}}
    got = jax.tree.map(dequantize, params, is_leaf=is_quantized)
    chex.assert_trees_all_equal(got, {"a": {"kernel": four_bit().dequantize().T}, "b": {"kernel": jnp.ones(3)}})


@pytest.mark.parametrize(
    ("shape", "layout", "kernel_shape", "message"),
    [
        ((2, 3, 32), IN_OUT, None, r"a weight of shape \(2, 3, 32\) cannot be a kernel .* pass a weight \(out, in\)"),
        ((6, 32), Layout((1,), (2,), (0,)), (1, 32, 6), "layout of a single kernel"),
        (
            (6, 32),
            HEADS_OUT,
            None,
            r"kernel_shape=None by .* does not hold a weight of shape \(6, 32\): pass the shape",
        ),
        ((6, 32), IN_OUT, (6, 32), r"kernel_shape=\(6, 32\) .* does not hold a weight of shape \(6, 32\)"),
        ((6, 32), HEADS_OUT, (32, 2, 2), r"kernel_shape=\(32, 2, 2\) .* does not hold"),
    ],
)
def test_a_weight_that_does_not_fit_its_layout_is_refused(shape, layout, kernel_shape, message):
    with pytest.raises(ValueError, match=message):
        from_bnb(four_bit(shape), layout, kernel_shape)


def test_a_folder_is_loaded_with_its_weights_quantized(tmp_path):
    weight = eight_bit()
    plain = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    tensors = {"q.weight": weight.values, "q.SCB": weight.scales * 127, "head.weight": plain}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load_quantized(tmp_path)
    assert set(weights) == {"head.weight", "q.weight"}
    assert isinstance(weights["head.weight"], jax.Array)
    assert_same_bits(weights["head.weight"], plain)
    assert isinstance(weights["q.weight"], Quantized8bit)
    assert weights["q.weight"].shape == (32, 6)
    assert load_quantized(tmp_path, OUT_IN)["q.weight"].shape == (6, 32)


def in_blocks_of_64(shape=(4, 128), **options):
    return four_bit(shape, blocksize=64, **options)


@pytest.mark.parametrize(
    ("layout", "kernel_shape"),
    [(IN_OUT, (128, 4)), (OUT_IN, (4, 128)), (HEADS_OUT, (128, 2, 2)), (HEADS_IN, (2, 64, 4))],
)
def test_the_qarray_of_an_nf4_kernel_has_its_numbers(layout, kernel_shape):
    qwix = pytest.importorskip("qwix")
    kernel = from_bnb(in_blocks_of_64(), layout, kernel_shape)
    array = to_qarray(kernel)
    assert isinstance(array, qwix.QArray)
    assert is_quantized(array)
    assert array.shape == kernel.shape
    assert_same_bits(dequantize(array), kernel.dequantize())
    assert_same_bits(jax.jit(dequantize)(array), kernel.dequantize())


def test_the_qarray_of_a_bfloat16_kernel_has_its_numbers_after_the_cast():
    pytest.importorskip("qwix")
    kernel = from_bnb(in_blocks_of_64(dtype=ml_dtypes.bfloat16))
    array = to_qarray(kernel)
    assert array.dtype == np.float32
    assert_same_bits(dequantize(array).astype(kernel.dtype), kernel.dequantize())


def test_the_qarray_of_a_stack_is_the_stack_of_qarrays():
    pytest.importorskip("qwix")
    kernels = [from_bnb(in_blocks_of_64(seed=i)) for i in range(2)]
    array = to_qarray(stack(kernels))
    assert array.shape == (2, 128, 4)
    assert_same_bits(dequantize(array), np.stack([kernel.dequantize() for kernel in kernels]))
    _, scanned = jax.lax.scan(lambda carry, slice_: (carry, dequantize(slice_)), None, array)
    assert_same_bits(scanned, dequantize(array))


@pytest.mark.parametrize("qtype", ["nf4", jnp.int8, jnp.int4])
def test_qarrays_that_qwix_made_are_dequantized_as_qwix_does(qtype, rng):
    qwix = pytest.importorskip("qwix")
    weight = jnp.asarray(rng.standard_normal((128, 4), np.float32))
    array = qwix.quantize(weight, qtype, channelwise_axes=(1,), tiled_axes={0: 64})
    assert is_quantized(array)
    assert_same_bits(dequantize(array), qwix.dequantize(array))
    assert np.abs(dequantize(array) - weight).max() < 0.5
    x = jnp.ones((3, 128))
    gradient = jax.grad(lambda x, array: jnp.sum(x @ dequantize(array)))(x, array)
    np.testing.assert_allclose(gradient[0], np.asarray(qwix.dequantize(array)).sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "layout", "kernel_shape", "message"),
    [
        (in_blocks_of_64(quant_type="fp4"), IN_OUT, None, "quant_type='fp4' has no counterpart in qwix"),
        (in_blocks_of_64((4, 96)), IN_OUT, None, r"\(96, 4\) with 96 on the last .* no multiple of the blocksize 64"),
        (in_blocks_of_64(), HEADS_IN, (4, 32, 4), r"\(4, 32, 4\) with 32 on the last .* Keep the kernel as it is"),
    ],
)
def test_a_kernel_that_no_qarray_can_hold_is_refused(weight, layout, kernel_shape, message):
    with pytest.raises(ValueError, match=message):
        to_qarray(from_bnb(weight, layout, kernel_shape))


def test_without_qwix_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"pip install 'randlora\[qwix\]'"):
        to_qarray(from_bnb(in_blocks_of_64()))


def test_qwix_is_not_imported_until_it_is_needed():
    code = "import sys, randlora_jax.quantized as q, numpy; q.dequantize(numpy.ones(2)); print('qwix' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_packed_kernels_are_made_by_from_bnb_of_either_kind():
    assert isinstance(from_bnb(four_bit()), Quantized4bit)
    assert isinstance(from_bnb(eight_bit()), Quantized8bit)
    with without_type_checks(), pytest.raises(AttributeError):
        from_bnb(np.ones((2, 2)))

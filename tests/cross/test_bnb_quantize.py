"""The quantizers in numpy against bitsandbytes' own on the CPU: byte for byte."""

import ml_dtypes
import numpy as np
import pytest
import torch

from interop.bnb import CODES
from interop.bnb_quantize import quantize_4bit, quantize_8bit, quantize_scales

bnb = pytest.importorskip("bitsandbytes").functional

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (out, in), blocksize: full blocks, blocks across rows, a last one that is not full, an odd count, one block only.
SIZES = [((128, 96), 64), ((8, 24), 32), ((5, 9), 64), ((300, 211), 128), ((33, 64), 4096), ((1, 1), 32)]


def draw(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * 0.02
    weight.view(-1)[:80] = 0  # a block of zeros, and one that begins with some
    if shape == (1, 1):
        weight[:] = 0.3
    return weight.to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocksize"), SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_codes_and_scales_are_those_of_bitsandbytes(quant_type, shape, blocksize, dtype):
    weight = draw(shape, dtype)
    want, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    packed, absmax = quantize_4bit(weight.float().numpy(), quant_type, blocksize, kind)
    assert packed.tobytes() == want.numpy().tobytes()
    assert absmax.tobytes() == state.absmax.numpy().tobytes()


@pytest.mark.parametrize("count", [50, 64])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_numbers_on_the_boundary_of_two_codes_fall_on_the_same_side(quant_type, count):
    """Full blocks are multiplied by the inverse of their scale, a last one that is not full is divided by it."""
    code = np.sort(np.array(CODES[quant_type], np.float32))
    bounds = (code[:-1] + code[1:]) / np.float32(2)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scale = np.float32(rng.uniform(0.5, 1))
        exact = bounds * scale
        near = np.concatenate([exact, np.nextafter(exact, np.float32(2)), np.nextafter(exact, np.float32(-2))])
        weight = np.zeros(count, np.float32)
        weight[: near.size], weight[-1] = near, scale
        want, _ = bnb.quantize_4bit(torch.tensor(weight), blocksize=64, quant_type=quant_type)
        packed, _ = quantize_4bit(weight, quant_type, 64, np.dtype(np.float32))
        assert packed.tobytes() == want.numpy().tobytes()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounding_to_the_dtype_of_the_model_is_part_of_it(quant_type):
    weight = torch.randn((64, 64), generator=torch.Generator().manual_seed(0))
    want, _ = bnb.quantize_4bit(weight.to(torch.bfloat16), blocksize=64, quant_type=quant_type)
    packed, _ = quantize_4bit(weight.numpy(), quant_type, 64, np.dtype(ml_dtypes.bfloat16))
    assert packed.tobytes() == want.numpy().tobytes()
    other, _ = quantize_4bit(weight.numpy(), quant_type, 64, np.dtype(np.float32))
    assert other.tobytes() != packed.tobytes()


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 5000])
def test_quantized_scales_are_those_of_bitsandbytes_given_its_mean(count):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.rand(count, generator=generator) * 0.1 + 0.02
        if seed == 3:
            scales[:] = 0.25  # nothing is left of them without their mean
        mean = scales.mean()
        want, state = bnb.quantize_blockwise(scales - mean, blocksize=256)
        codes, absmax, offset = quantize_scales(scales.numpy(), state.code.numpy(), 256)
        assert abs(np.float32(offset).view(np.int32) - mean.numpy().view(np.int32)) <= 1  # torch adds in float32
        if offset == mean.item():
            assert codes.tobytes() == want.numpy().tobytes()
            assert absmax.tobytes() == state.absmax.numpy().tobytes()
        else:
            assert (codes == want.numpy()).mean() > 0.99
            np.testing.assert_allclose(absmax, state.absmax.numpy(), rtol=1e-6)
        assert count > 2 or offset == mean.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 32), (300, 211), (3, 1)])
def test_8_bit_values_and_row_maxima_are_those_of_bitsandbytes(shape, dtype):
    weight = draw(shape, dtype)
    weight[0] = 0
    want, maxima, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    values, row_maxima = quantize_8bit(weight.float().numpy())
    assert values[1:].tobytes() == want[1:].numpy().tobytes()
    assert not values[0].any()
    assert row_maxima.tobytes() == maxima.numpy().tobytes()


def test_8_bits_hold_no_number_beyond_float16():
    with pytest.raises(ValueError, match="beyond 65504"):
        quantize_8bit(np.array([[1.0, 70000.0]], np.float32))

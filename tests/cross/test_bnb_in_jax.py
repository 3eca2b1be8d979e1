"""Fourteen Llamas that bitsandbytes quantized and transformers saved: the same numbers here, to the last bit."""

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from interop.bnb import CheckpointFormatError, Weight4bit, Weight8bit, read_folder
from randlora_jax.quantized import dequantize, from_bnb, is_quantized, load_quantized

bitsandbytes = pytest.importorskip("bitsandbytes")

LAYERS = 14  # two blocks of seven
WEIGHTS = 81920  # of those layers
KINDS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-bf16-storage": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "nf4-double-bf16-storage": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {},
}
DTYPES = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16}
CHECKPOINTS = [(kind, dtype) for kind in KINDS for dtype in DTYPES]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """All in_features are multiples of 64: where they are not, bitsandbytes' AVX512 kernel is wrong."""
    disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=16, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(folder, kind, dtype):
    how = "load_in_8bit" if kind == "int8" else "load_in_4bit"
    config = BitsAndBytesConfig(**{how: True}, **KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", quantization_config=config)
    return model.train()  # an eval forward would repack 4-bit weights in place


def to_numpy(tensor):
    """A copy, in numpy's dtype for torch's."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy().copy()


def by_bitsandbytes(layer, dtype):
    """The weight (out, in) as bitsandbytes computes with it: its layer, applied to the identity, is exact."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return to_numpy(bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    identity = torch.eye(layer.in_features, dtype=dtype, requires_grad=True)
    return to_numpy(layer(identity)).T


def quantized_layers(model):
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.fixture(scope="module")
def checkpoints(llama_folder, tmp_path_factory):
    """Of each kind and dtype: the folder that transformers saved, and the weights by bitsandbytes."""
    saved = {}
    for kind, dtype in CHECKPOINTS:
        model = quantized(llama_folder, kind, dtype)
        weights = {f"{name}.weight": by_bitsandbytes(layer, dtype) for name, layer in quantized_layers(model).items()}
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        saved[kind, dtype] = folder, weights
    return saved


def count_differing(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    bits = f"u{want.dtype.itemsize}"
    return int((np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(want).view(bits)).sum())


every_checkpoint = pytest.mark.parametrize(
    ("kind", "dtype"), CHECKPOINTS, ids=[f"{kind}-{str(dtype)[6:]}" for kind, dtype in CHECKPOINTS]
)


@every_checkpoint
def test_numpy_dequantizes_every_weight_to_the_bits_of_bitsandbytes(checkpoints, kind, dtype):
    folder, want = checkpoints[kind, dtype]
    weights = read_folder(folder)
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, Weight4bit | Weight8bit)}
    assert packed.keys() == want.keys()
    assert (len(packed), sum(weight.size for weight in want.values())) == (LAYERS, WEIGHTS)
    assert {weight.dtype for weight in packed.values()} == {np.dtype(DTYPES[dtype])}
    assert sum(count_differing(weight.dequantize(), want[name]) for name, weight in packed.items()) == 0


@every_checkpoint
def test_jit_dequantizes_every_kernel_to_the_bits_of_bitsandbytes(checkpoints, kind, dtype):
    folder, want = checkpoints[kind, dtype]
    kernels = {name: leaf for name, leaf in load_quantized(folder).items() if is_quantized(leaf)}
    assert kernels.keys() == want.keys()
    dequantized = jax.jit(lambda tree: jax.tree.map(dequantize, tree, is_leaf=is_quantized))(kernels)
    assert sum(count_differing(np.asarray(kernel).T, want[name]) for name, kernel in dequantized.items()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_weights_beside_quantized_ones_are_those_of_the_model(checkpoints, llama_folder, dtype):
    folder, want = checkpoints["nf4", dtype]
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
    plain = {name: leaf for name, leaf in load_quantized(folder).items() if not is_quantized(leaf)}
    assert plain.keys() == {name for name, _ in model.named_parameters()} - want.keys()
    for name, leaf in plain.items():
        assert count_differing(np.asarray(leaf), to_numpy(model.get_parameter(name))) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_int8_numbers_are_those_of_the_layers_forward_and_backward(llama_folder, dtype, tmp_path):
    model = quantized(llama_folder, "int8", dtype)
    layers = quantized_layers(model)
    backward, vectorwise = {}, {}
    for name, layer in layers.items():
        x = torch.zeros(layer.out_features, layer.in_features, dtype=dtype, requires_grad=True)
        layer(x).backward(torch.eye(layer.out_features, dtype=dtype))
        backward[name] = to_numpy(x.grad)
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        vectorwise[name] = to_numpy(
            bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, scales).to(dtype)
        )
    model.save_pretrained(tmp_path)
    weights = read_folder(tmp_path)
    got = {name: weights[f"{name}.weight"].dequantize() for name in layers}
    assert sum(count_differing(got[name], backward[name]) for name in layers) == 0
    # bitsandbytes' other formula multiplies in another order: float32 differs in the last bit, bfloat16 hides that.
    for name in layers:
        np.testing.assert_array_max_ulp(got[name].astype(np.float32), vectorwise[name].astype(np.float32), maxulp=1)
    differing = sum(count_differing(got[name], vectorwise[name]) for name in layers)
    assert differing == 0 if dtype == torch.bfloat16 else 0.1 < differing / WEIGHTS < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocksize", [32, 1024])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_dtype_and_blocksize_has_the_bits_of_bitsandbytes(quant_type, blocksize, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.linspace(-7, 1, 8192)  # in float16, the smallest of these are subnormal
    weight = (torch.randn(8192, generator=generator) * sizes).to(dtype)[None]
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    want = to_numpy(bitsandbytes.functional.dequantize_4bit(packed, state))
    code = tuple(state.code.tolist())
    ours = Weight4bit(
        packed.numpy().reshape(-1), state.absmax.numpy(), code, blocksize, (1, 8192), want.dtype, quant_type
    )
    assert count_differing(ours.dequantize(), want) == 0
    assert count_differing(np.asarray(from_bnb(ours).dequantize()).T, want) == 0


def test_a_model_saved_after_an_eval_forward_repacked_it_is_refused(llama_folder, tmp_path):
    model = quantized(llama_folder, "nf4", torch.float32).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))
    state = next(iter(quantized_layers(model).values())).weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointFormatError, match="save the model before any eval forward"):
        read_folder(tmp_path)

"""What the tests of this folder share: small models, adapters with random values, and how results are compared."""

import importlib
import sys
from types import ModuleType

import numpy as np
import oracle
import pytest
import torch
from tolerances import TOLERANCE
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from interop import RandLoraConfig
from randlora_torch import RandLoraLayer, extract, get_peft_model
from randlora_torch.bases import to_numpy

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
TOKENS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny models: threads only wait for each other, all the more if other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_unchecked: dict[str, ModuleType] = {}


def package_modules():
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "randlora_torch"}


@pytest.fixture
def unchecked(monkeypatch):
    """The package imported once more, without the suite's type checks, which dynamo cannot trace.

    Once for all tests: dynamo keeps what it finds of a package under its modules' names.
    """
    checked = package_modules()
    for name in checked:
        del sys.modules[name]
    sys.modules.update(_unchecked)
    finders = [finder for finder in sys.meta_path if "jaxtyping" not in type(finder).__module__]
    monkeypatch.setattr(sys, "meta_path", finders)
    yield importlib.import_module("randlora_torch")
    _unchecked.update(package_modules())
    for name in package_modules():
        del sys.modules[name]
    sys.modules.update(checked)


@pytest.fixture
def factored(monkeypatch):
    """Layers that multiply in the order of PEFT's, whatever the sizes: for comparisons bit for bit."""
    monkeypatch.setattr(RandLoraLayer, "plan", "factored")


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.down(torch.relu(self.up(x)))))


def mlp(seed=0):
    torch.manual_seed(seed)
    return MLP()


def llama(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 16, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **fields})).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, initializer_range=0.3)
    ).eval()


def bert(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, max_position_embeddings=16, initializer_range=0.3, **sizes, **fields)
    ).eval()


MODELS = {  # maker, targets, how many layers they are, the kind of base layer
    "MLP": (mlp, ["up", "down"], 2, nn.Linear),
    "Llama": (llama, ["q_proj", "v_proj", "down_proj"], 6, nn.Linear),
    "GPT-2": (gpt2, ["c_attn", "c_fc"], 4, Conv1D),
    "BERT": (bert, ["query", "value", "intermediate.dense"], 6, nn.Linear),
}
every_model = pytest.mark.parametrize("kind", MODELS)


QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "int8-all": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A saved Llama whose layers bitsandbytes computes rightly on the CPU: in_features are multiples of 64."""
    folder = tmp_path_factory.mktemp("llama")
    llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1, initializer_range=0.2).save_pretrained(folder)
    return folder


def load_llama(folder, kind="plain", dtype=torch.float32, compute=torch.float32, device="cpu"):
    """The saved Llama, plain or quantized."""
    options = dict(QUANTIZATIONS.get(kind, ()))
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = compute
    quantization = {"quantization_config": BitsAndBytesConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **quantization)


def config(targets, **fields):
    """A small config; alpha = r keeps updates of order 1."""
    return RandLoraConfig(**{"r": 3, "randlora_alpha": 3, "target_modules": targets, **fields})


def output(model, **options):
    """Logits for a fixed input, without gradient."""
    with torch.no_grad():
        return model(X, **options) if isinstance(model, MLP) else model(TOKENS, **options).logits


def loss_of(model):
    return (model(X) if isinstance(model, MLP) else model(TOKENS).logits).float().square().sum()


def layers_of(model, name="default"):
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, RandLoraLayer) and name in module.randlora_lambda
    ]


def randomize(model, name="default", seed=0, scale=1 / 3):
    """Random lambda and gamma, as after training, and shifted values of what else the adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in layers_of(model, name):
        for parameter in layer.factors(name):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    for value in extract(model, name).saved_weights.values():  # the parameters' own memory
        if value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=generator) * scale)
    return model


def trained(kind="MLP", name="default", **fields):
    make, targets, _, _ = MODELS[kind]
    return randomize(get_peft_model(make(), config(targets, **fields), name), name)


def plain_dequantization(weight):
    """The numbers a packed 4-bit weight stands for, by the format: high nibble first, a scale per block, row-major."""
    state = weight.quant_state
    packed = weight.data.contiguous().view(torch.uint8).numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: state.shape.numel()]
    scales = state.absmax
    if state.nested:
        inner = state.state2
        blocks = np.arange(scales.numel()) // inner.blocksize
        scales = inner.code.numpy()[scales.numpy()] * inner.absmax.numpy()[blocks] + state.offset.numpy()
    else:
        scales = scales.numpy()
    values = state.code.numpy()[codes] * scales[np.arange(codes.size) // state.blocksize]
    return values.reshape(state.shape)


def delta_by_oracle(layer, name="default"):
    lam, gamma = map(to_numpy, layer.factors(name))
    A, B = to_numpy(layer.randlora_A[name]), to_numpy(layer.randlora_B[name])
    shape = (layer.out_features, layer.in_features)
    return oracle.delta_weight(A, B, lam, gamma, scaling=layer.scaling[name], shape=shape)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def assert_close(got, want):
    torch.testing.assert_close(got, want, **TOLERANCE["float32", "forward"])


def relative_error(got, want):
    """Norm of the difference by the norm of what is wanted, in float64."""
    got, want = (np.asarray(value.detach().double() if torch.is_tensor(value) else value) for value in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)

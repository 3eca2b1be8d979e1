"""Bytes of frozen bases that PEFT and both stacks hold for a Llama with all linear layers adapted, to the byte."""

import jax.numpy as jnp
import peft
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import interop
import randlora_jax
import randlora_torch
from interop import RandLoraConfig

HIDDEN, FFN, R = 128, 344, 4
N, N_PEFT = HIDDEN // R, FFN // R  # bases of a layer, whose short side is HIDDEN at most, and PEFT's
SIZES = {"q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128)}
SIZES |= {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
# kind: config, bytes of a number of A in JAX, which holds it as the recipe draws it; of B; PEFT's bytes by ours
KINDS = {
    "dense": ({}, 2, 2, 5.3),
    "sparse": ({"sparse": True}, 4, 1, 10.3),
    "very_sparse": ({"very_sparse": True}, 4, 1, 10.3),
}
every_kind = pytest.mark.parametrize(("fields", "bytes_A", "bytes_B", "ratio"), KINDS.values(), ids=KINDS)


def llama():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=1, **heads))


def config(kind=RandLoraConfig, **fields):
    return kind(r=R, target_modules="all-linear", **fields)


def held_by_peft(fields):
    tuner = peft.get_peft_model(llama(), config(peft.RandLoraConfig, **fields)).base_model
    A, B = tuner.randlora_A["default"], tuner.randlora_B["default"]
    assert B.shape == (FFN, N_PEFT, R)
    assert A.nbytes + B.nbytes == 4 * (R * FFN + FFN * N_PEFT * R)
    return A.nbytes + B.nbytes


@every_kind
def test_in_torch(fields, bytes_A, bytes_B, ratio, capsys):
    model = randlora_torch.get_peft_model(llama(), config(**fields))
    held = model.randlora_A.nbytes + model.randlora_B.nbytes
    assert held == 4 * R * HIDDEN + bytes_B * FFN * N * R
    assert held_by_peft(fields) / held > ratio - 0.1  # A, a few per mille, is in float32 here
    model.print_trainable_parameters()
    assert f"frozen bases: {held:,d} bytes, shared by 7 layers" in capsys.readouterr().out
    assert randlora_torch.extract(model).bases.B.shape == (FFN, N_PEFT, R)


@every_kind
def test_in_jax(fields, bytes_A, bytes_B, ratio, capsys):
    params = {name: {"kernel": jnp.zeros((inp, out))} for name, (out, inp) in SIZES.items()}
    adapter = randlora_jax.init(config(**fields), params)
    held = sum(basis.nbytes for basis in adapter.bases)
    assert held == bytes_A * R * HIDDEN + bytes_B * FFN * N * R
    assert held_by_peft(fields) / held > ratio
    randlora_jax.print_trainable_parameters(adapter, params)
    assert f"frozen bases: {held:,d} bytes, shared by 7 layers" in capsys.readouterr().out
    want = interop.init_adapter(config(**fields), SIZES).bases
    assert interop.bases_digest(adapter.to_interop().bases) == interop.bases_digest(want)

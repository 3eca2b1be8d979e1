"""Every source of `interop.convert` crossed with every target: what is saved in the end are the bytes of the beginning.

A source is one function, which puts an adapter really there: onto a model, into a folder by PEFT, ... A new kind of
source is one more function and its line in `SOURCES`.
"""

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from flax import linen, nnx
from safetensors.torch import load_file, save_file
from stacks import without_type_checks
from strategies import draw_adalora, draw_adapter

import interop
import randlora_jax
import randlora_torch
from interop.contents import PARTS
from randlora_torch.bases import to_torch

SHAPES = {"down": (12, 20), "mix": (12, 12), "up": (20, 12)}
KEPT = {"down": (False,) * 4, "mix": (True,) * 4, "up": (True, False, False, True)}
FILES = ("adapter_config.json", "adapter_model.safetensors")


class TorchNet(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, (out, inp) in SHAPES.items():
            self.add_module(name, torch.nn.Linear(inp, out, dtype=dtype))


class NNXNet(nnx.Module):
    def __init__(self, dtype):
        for name, (out, inp) in SHAPES.items():
            setattr(self, name, nnx.Linear(inp, out, kernel_init=nnx.initializers.ones, param_dtype=dtype, rngs=_RNGS))


_RNGS = nnx.Rngs(0)
# What a config has after PEFT wrote it, so that it can be the same then; of a list of targets, PEFT loses the order.
BY_PEFT = {
    "auto_mapping": {"base_model_class": "TorchNet", "parent_library": __name__},
    "peft_version": peft.__version__,
    "target_modules": "down|mix|up",
}
LORAS_FIELDS = interop.AdaLoraConfig.from_dict(peft.AdaLoraConfig(total_step=9).to_dict()).unknown_fields


def randlora(seed=0, dtype=np.float32, **fields):
    adapter = draw_adapter(seed, shapes=SHAPES, **BY_PEFT, **fields)
    factors = {name: interop.Factors(*(p.astype(dtype) for p in pair)) for name, pair in adapter.factors.items()}
    bases = interop.Bases(*(basis.astype(dtype) for basis in adapter.bases))  # PEFT keeps them in float32
    return dataclasses.replace(adapter, factors=factors, bases=bases)


def adalora(seed=0, dtype=np.float32, **fields):
    return draw_adalora(seed, shapes=SHAPES, dtype=dtype, unknown_fields=LORAS_FIELDS, **BY_PEFT, **fields)


ADAPTERS = {
    "RandLoRA": randlora,
    "RandLoRA, sparse": functools.partial(randlora, sparse=True),
    "RandLoRA, no bases": functools.partial(randlora, save_projection=False),
    "AdaLoRA": adalora,
    "AdaLoRA, pruned": functools.partial(adalora, kept=KEPT),
}
HALF = {"RandLoRA": randlora, "AdaLoRA, pruned": ADAPTERS["AdaLoRA, pruned"]}


class Source(NamedTuple):
    holds: Any
    arguments: dict[str, Any] = {}  # noqa: RUF012


def is_half(adapter):
    return next(iter(adapter.factors.values()))[0].dtype == ml_dtypes.bfloat16


def another(adapter):
    """An adapter of the same method with other numbers, and in ours also another rank."""
    return adalora(9, kept=KEPT) if isinstance(adapter.config, interop.AdaLoraConfig) else randlora(9, r=3)


# --- JAX -------------------------------------------------------------------------------------------------------------


def variables(adapter):
    dtype = jnp.bfloat16 if is_half(adapter) else jnp.float32
    return {"params": {name: {"kernel": jnp.ones((inp, out), dtype)} for name, (out, inp) in SHAPES.items()}}


def nnx_net(adapter):
    return NNXNet(jnp.bfloat16 if is_half(adapter) else jnp.float32)


def jax_pytree(adapter, folder):
    return Source(randlora_jax.load_adapter(adapter, variables(adapter)))


def nnx_model(adapter, folder):
    return Source(randlora_jax.attach(nnx_net(adapter), adapter))


def nnx_model_with_both_methods(adapter, folder):
    model = randlora_jax.attach(nnx_net(adapter), adapter, adapter_name="second")
    other = randlora(9, r=3) if isinstance(adapter.config, interop.AdaLoraConfig) else adalora(9, kept=KEPT)
    return Source(randlora_jax.attach(model, other, adapter_name="first"), {"adapter_name": "second"})


def linen_params(adapter, folder):
    params = variables(adapter)
    return Source(randlora_jax.lazy_params(params, randlora_jax.load_adapter(adapter, params)))


# --- torch -----------------------------------------------------------------------------------------------------------


def torch_net(adapter):
    return TorchNet(torch.bfloat16 if is_half(adapter) else torch.float32)


def torch_tensors(adapter, folder):
    kind = {interop.RandLoraConfig: "RandLoraAdapter", interop.AdaLoraConfig: "AdaLoraAdapter"}[type(adapter.config)]
    return Source(getattr(randlora_torch, kind).from_interop(adapter))


def torch_model(adapter, folder):
    return Source(randlora_torch.load_adapter(torch_net(adapter), adapter))


def torch_model_with_two(adapter, folder):
    model = randlora_torch.load_adapter(torch_net(adapter), another(adapter), adapter_name="first")
    model.load_adapter(adapter, "second")
    return Source(model, {"adapter_name": "second"})


# --- PEFT ------------------------------------------------------------------------------------------------------------


def saved(adapter, folder):
    interop.save(adapter, folder)
    return folder


def from_peft(adapter, folder, name="default"):
    model = torch_net(adapter)
    half = {"autocast_adapter_dtype": False} if is_half(adapter) else {}
    return peft.PeftModel.from_pretrained(model, saved(adapter, folder / "ours"), adapter_name=name, **half)


def peft_model(adapter, folder):
    return Source(from_peft(adapter, folder))


def peft_model_with_two(adapter, folder):
    other = another(adapter)
    if isinstance(adapter.config, interop.RandLoraConfig):  # PEFT has one pair of bases for all its adapters
        factors = {name: interop.Factors(pair.lam + 1, pair.gamma) for name, pair in adapter.factors.items()}
        other = dataclasses.replace(adapter, factors=factors)
    model = from_peft(other, folder / "first", "first")
    model.load_adapter(saved(adapter, folder / "second"), "second")
    return Source(model, {"adapter_name": "second"})


def accelerated_peft_model(adapter, folder):
    return Source(randlora_torch.accelerate_peft(from_peft(adapter, folder)))


def injected_by_peft(adapter, folder):
    """PEFT's layers in the bare model, in training: of AdaLoRA they hold all triplets, whatever the pattern says."""
    config = peft.PeftConfig.from_pretrained(saved(adapter, folder))
    pattern = config.rank_pattern = getattr(config, "rank_pattern", None) and {
        key.replace(".lora_E", ".lora_E.default"): mask for key, mask in config.rank_pattern.items()
    }
    model = peft.inject_adapter_in_model(config, torch_net(adapter))
    config.rank_pattern = pattern
    for name, factors in adapter.factors.items():
        layer = model.get_submodule(name)
        for part, values in zip(PARTS[type(factors)], map(to_torch, factors), strict=True):
            parameter = getattr(layer, part)["default"].data
            parameter.normal_()
            if values.shape == parameter.shape:
                parameter.copy_(values)
            else:
                kept = torch.tensor(adapter.config.kept(name))
                (parameter.T if part == "lora_B" else parameter)[kept] = values.T if part == "lora_B" else values
        for part in interop.Bases._fields if adapter.bases else ():
            getattr(layer, f"randlora_{part}")["default"].copy_(to_torch(getattr(adapter.bases, part)))
    return Source(model)


# --- Folders ---------------------------------------------------------------------------------------------------------


def folder_by_us(adapter, folder):
    return Source(saved(adapter, folder))


def folder_by_peft(adapter, folder):
    """Layout (a): the bases once for the model, and a copy for each layer; or of AdaLoRA, the only one."""
    from_peft(adapter, folder).save_pretrained(folder / "peft")
    return Source(folder / "peft")


def _rewritten(adapter, folder, keeps):
    path = folder_by_peft(adapter, folder).holds
    tensors = {
        key: value
        for key, value in load_file(path / FILES[1]).items()
        if "_lambda" in key or "_gamma" in key or keeps(key)
    }
    save_file(tensors, path / FILES[1], metadata={"format": "pt"})
    return path


def folder_with_one_copy(adapter, folder):
    """Layout (b), of PEFT's main branch."""
    return Source(_rewritten(adapter, folder, lambda key: key.startswith("base_model.randlora_")))


def folder_with_a_copy_per_layer(adapter, folder):
    """Layout (c)."""
    return Source(_rewritten(adapter, folder, lambda key: key.startswith("base_model.model.")))


def folder_without_bases(adapter, folder):
    """Layout (d): neither are there bases, nor does the file say what made them."""
    return Source(_rewritten(adapter, folder, lambda key: False), {"recipe": adapter.recipe})


def sub_folder(adapter, folder):
    """Where PEFT saves an adapter that is not called "default"."""
    from_peft(adapter, folder, "second").save_pretrained(folder / "peft")
    return Source(folder / "peft", {"adapter_name": "second"})


ALL, RANDLORA, WITH_BASES = list(ADAPTERS), list(ADAPTERS)[:3], list(ADAPTERS)[:2]
SOURCES = {  # and of which adapters
    jax_pytree: ALL,
    nnx_model: ALL,
    nnx_model_with_both_methods: ALL,
    linen_params: ALL,
    torch_tensors: ALL,
    torch_model: ALL,
    torch_model_with_two: ALL,
    peft_model: ALL,
    peft_model_with_two: ALL,
    accelerated_peft_model: RANDLORA,
    injected_by_peft: ALL,
    folder_by_us: ALL,
    folder_by_peft: [*WITH_BASES, *ALL[3:]],
    folder_with_one_copy: WITH_BASES,
    folder_with_a_copy_per_layer: WITH_BASES,
    folder_without_bases: ["RandLoRA, no bases"],
    sub_folder: [*WITH_BASES, *ALL[3:]],
}


def converted(source, to):
    """What `convert` gives; by way of the model's shapes where only they say how large the bases are."""
    held, arguments = source
    if "recipe" in arguments and to != "peft":
        with pytest.raises(ValueError, match=r"holds no bases and does not say how large they are: attach it to its"):
            interop.convert(held, to, **arguments)
        held, arguments = interop.convert(held, "peft", **arguments).bind(SHAPES), {}
    return interop.convert(held, to, **arguments)


def bytes_of(adapter, folder):
    """The files of an adapter, once it is told the shapes that PEFT's files do not hold."""
    interop.save(adapter.bind(SHAPES), folder)
    return {name: (folder / name).read_bytes() for name in FILES}


def assert_moves_without_a_change(adapter, put, tmp_path):
    want = bytes_of(adapter, tmp_path / "original")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's, on keys of bases that it then finds elsewhere
        source = put(adapter, tmp_path / "source")
        targets = {to: converted(source, to) for to in ("jax", "torch", "peft")}
        for to, target in targets.items():
            assert bytes_of(interop.convert(target, "peft"), tmp_path / to) == want, to
        # And all the way round, into a source of the same kind.
        around = interop.convert(interop.convert(targets["jax"], "torch"), "peft")
        back = put(around.bind(SHAPES), tmp_path / "back")
        assert bytes_of(converted(back, "peft"), tmp_path / "again") == want


@pytest.mark.parametrize(
    ("put", "adapter"),
    [
        # Two adapters of each source always, all in the runs of all cases.
        pytest.param(put, name, marks=() if (number - row) % len(names) < 2 else pytest.mark.slow)
        for row, (put, names) in enumerate(SOURCES.items())
        for number, name in enumerate(names)
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_an_adapter_moves_from_any_source_to_any_target_and_back_without_a_change(put, adapter, tmp_path):
    assert_moves_without_a_change(ADAPTERS[adapter](), put, tmp_path)


@pytest.mark.parametrize("put", [jax_pytree, nnx_model, linen_params, torch_model, peft_model, folder_by_us])
@pytest.mark.parametrize("adapter", HALF)
def test_in_half_precision_too(put, adapter, tmp_path):
    assert_moves_without_a_change(HALF[adapter](dtype=ml_dtypes.bfloat16), put, tmp_path)


# --- What holds no adapter -------------------------------------------------------------------------------------------

NOTHING = {
    "a torch tensor": lambda: torch.zeros(2),
    "a torch optimizer": lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))]),
    "a torch state dict": lambda: TorchNet().state_dict(),
    "a jax array": lambda: jnp.zeros(2),
    "linen variables": lambda: {"params": {"up": {"kernel": linen.Partitioned(jnp.zeros((2, 2)), (None, None))}}},
    "the state of an NNX model": lambda: nnx.state(NNXNet(jnp.float32), nnx.Param),
}


@pytest.mark.parametrize("source", NOTHING)
def test_what_holds_no_adapter_is_told_what_does(source):
    with pytest.raises(TypeError, match=r"which holds no adapter: pass a folder, .* linen variables of randlora_jax\."):
        interop.convert(NOTHING[source](), "peft")


@pytest.mark.parametrize("make", [lambda: linen.Dense(3), lambda: nnx.Param(jnp.zeros(2))], ids=["Dense", "Param"])
def test_of_flax_only_nnx_models_and_variables_hold_adapters(make):
    message = r"model is a (Dense|Param), not an nnx\.Module with an adapter attached\. In linen, the variables of"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        interop.convert(make(), "peft")


def test_a_model_without_an_adapter_has_none_to_give():
    with pytest.raises(ValueError, match=r"no adapter is attached to this TorchNet\. Attach one first\."):
        interop.convert(TorchNet(), "peft")
    with pytest.raises(ValueError, match=r"the model has no adapter attached: attach\(model, config\) adds one"):
        interop.convert(NNXNet(jnp.float32), "peft")


def test_a_name_is_looked_up_on_the_model():
    for put in (nnx_model_with_both_methods, torch_model_with_two):
        model = put(randlora(), None).holds
        with pytest.raises(ValueError, match=r"adapter 'third'.* has .*'(first|second)', '(first|second)'"):
            interop.convert(model, "peft", adapter_name="third")
    with pytest.raises(ValueError, match=r"has the adapters \['first', 'second'\]: pass adapter_name to say which one"):
        interop.convert(model, "peft")
    with pytest.raises(
        ValueError, match=r"adapter_name='default' is for a folder or a model, not for a source of type dict"
    ):
        interop.convert(linen_params(randlora(), None).holds, "peft", adapter_name="default")

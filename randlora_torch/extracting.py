"""`extract`: an attached adapter taken off its model as tensors, with their current values."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from interop.adalora import AdaLoraConfig, SVDFactors, keep_triplets
from interop.bases import Bases
from interop.delta import Factors
from randlora_torch.adapter import AdaLoraAdapter, RandLoraAdapter
from randlora_torch.attach import Attached, AttachedAdapter, attached_to, find_attached, saved_parameters, state_of
from randlora_torch.bases import to_numpy, to_torch
from randlora_torch.extras import embedding_parameters
from randlora_torch.layer import AdapterLayer
from randlora_torch.merging import is_sharded
from randlora_torch.structure import adapted_layers


def extract(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    with_embeddings: bool = False,
) -> RandLoraAdapter | AdaLoraAdapter:
    """An adapter attached to `model`, with the current values of its parameters (shared where they are whole and ours).

    Of an AdaLoRA adapter, the triplets are left out that its `RankAllocator` took away and that are still zero.

    Args:
        model: A model with an adapter attached, by this package or by PEFT.
        adapter_name: Which one; may be left out if there is only one.
        state_dict: Values to take instead of the model's, under the model's names, where a trainer has gathered them.
        with_embeddings: Whether to take the base's embeddings and output head along, as PEFT does for added tokens.

    Raises:
        ValueError: the model has no such adapter, or several and no name was given; or PEFT attached it, and one of the
            last two arguments was given; or its bases were changed in memory since.
        AdapterFormatError: an adapter of PEFT's is none that a file could hold.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled model
    if _is_pefts(model):
        if state_dict is not None or with_embeddings:
            raise ValueError("state_dict and with_embeddings are not for PEFT's models: leave them out.")
        return importlib.import_module("randlora_torch.peft_source").extract_peft(model, adapter_name)
    name = _the_name(model, adapter_name)
    info, layers = find_attached(model, name), adapted_layers(model)
    given = state_dict or {}
    held = (*model.named_parameters(), *model.named_buffers()) if given else ()
    gathered = {id(tensor): given[key] for key, tensor in held if key in given}

    def value(tensor: Tensor) -> Tensor:
        return gathered[id(tensor)].detach() if id(tensor) in gathered else whole(tensor)

    embeddings = embedding_parameters(model, info.modules) if with_embeddings else {}
    extras = {**embeddings, **saved_parameters(model, name)}
    common: dict[str, Any] = {
        "shapes": {module: (layers[module].out_features, layers[module].in_features) for module in info.modules},
        "saved_weights": {key: value(tensor) for key, tensor in extras.items()},
    }
    if isinstance(info.config, AdaLoraConfig):
        return AdaLoraAdapter(**_kept_factors(info, layers, name, value), **common)
    factors = {module: Factors(*map(value, layers[module].factors(name))) for module in info.modules}
    return RandLoraAdapter(
        factors=factors,
        bases=_whole_bases(state_of(model), name),
        config=info.config,
        recipe=info.recipe,
        **common,
    )


def held_bases(state: Attached, adapter_name: str) -> Bases:
    """The bases of an adapter that its model holds, in the dtypes of files."""
    held = state.bases_A[adapter_name], state.bases_B[adapter_name]
    dtypes = state.adapters[adapter_name].bases_dtypes
    return Bases(*(basis.to(dtype) for basis, dtype in zip(held, dtypes, strict=True)))


def _whole_bases(state: Attached, adapter_name: str) -> Bases:
    """All of the bases of an adapter: those held, or drawn again if they are not all.

    Raises:
        ValueError: the bases that are held are not those that are drawn.
    """
    held, origin = held_bases(state, adapter_name), state.adapters[adapter_name].origin
    if origin is None:
        return held
    whole = origin.whole(Bases(*map(to_numpy, held)))
    return Bases(*(to_torch(basis).to(held.B.device) for basis in whole))


def _is_pefts(model: nn.Module) -> bool:
    """Whether the adapters of the model are PEFT's."""
    configs = getattr(model, "peft_config", None)
    configs = configs.values() if isinstance(configs, Mapping) else ()
    return any(type(config).__module__.split(".")[0] == "peft" for config in configs)


def _the_name(model: nn.Module, adapter_name: str | None) -> str:
    attached = attached_to(model)
    if not attached:
        inside = [name for name, module in model.named_modules() if getattr(module, "_randlora", None)]
        hint = f" Its part {inside[0]!r} has one." if inside else " Attach one first."
        raise ValueError(f"no adapter is attached to this {type(model).__name__}.{hint}")
    if adapter_name is None and len(attached) != 1:
        raise ValueError(f"the model has the adapters {list(attached)}: pass adapter_name to say which one.")
    return adapter_name or next(iter(attached))


def _kept_factors(
    info: AttachedAdapter, layers: Mapping[str, AdapterLayer], name: str, value: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Factors and config with the triplets that count: those not taken away, or not zero (again) since."""
    factors, kept = {}, {}
    for module in info.modules:
        parts = SVDFactors(*map(value, layers[module].factors(name)))
        nonzero = (parts.E[:, 0] != 0).tolist()
        rows = [a or b for a, b in zip(info.rows_kept(module), nonzero, strict=True)]
        factors[module] = parts if all(rows) else keep_triplets(parts, rows)
        kept[module] = rows
    return {"factors": factors, "config": info.config_keeping(kept)}


def whole(tensor: Tensor) -> Tensor:
    """A parameter's full value, gathered from all processes if it is sharded; detached."""
    own: Any = tensor.detach()
    return own.full_tensor() if is_sharded(own) else own

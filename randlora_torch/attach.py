"""Adapters put on the layers of a model, in place: the model object and the names of its layers stay."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.bases import BFLOAT16, FLOAT16, Bases, cut_bases
from interop.config import RandLoraConfig
from interop.shapes import Dims
from interop.storage import Origin, store, used_bases
from randlora_torch.bases import BufferDict, to_torch
from randlora_torch.extras import Extras, extra_parameters, find_extras, match_extras
from randlora_torch.layer import BASE_ROWS, AdapterLayer, Rows
from randlora_torch.merging import is_sharded
from randlora_torch.randlora import RandLoraLayer
from randlora_torch.rank_allocator import RankAllocator
from randlora_torch.saved import ModulesToSaveWrapper
from randlora_torch.structure import (
    adapted_layers,
    base_modules,
    bnb_layers,
    floating_dtype,
    layer_kind,
)

_HALF = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@dataclasses.dataclass(frozen=True)
class AttachedAdapter:
    """What a model remembers of an adapter besides the parameters in its layers.

    Attributes:
        config: Its config.
        recipe: Name of the recipe of its bases, or None.
        modules: Names of the adapted layers.
        extras: What it holds besides the parameters of its layers.
        bases_dtypes: The dtypes of A and B in its file; in memory they are others. () without bases.
        origin: What all of the bases are drawn from, if only those are held that its layers use.
        held: Which of its `init_r` triplets the parameters of an AdaLoRA adapter hold, by layer: those that were left
            when it was attached.
        allocator: What takes more of them away while it trains.
    """

    config: RandLoraConfig | AdaLoraConfig
    recipe: str | None
    modules: tuple[str, ...]
    extras: Extras
    bases_dtypes: tuple[torch.dtype, ...] = ()
    origin: Origin | None = None
    held: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    allocator: RankAllocator | None = None

    @property
    def adalora_config(self) -> AdaLoraConfig:
        """The config of an AdaLoRA adapter."""
        assert isinstance(self.config, AdaLoraConfig)
        return self.config

    def rows_kept(self, module: str) -> tuple[bool, ...]:
        """Which rows of an AdaLoRA layer's parameters the config keeps."""
        kept = self.adalora_config.kept(module)
        return tuple(kept[i] for i in self.held[module])

    def config_keeping(self, rows: Mapping[str, Iterable[bool]]) -> AdaLoraConfig:
        """The config of an AdaLoRA adapter of which these rows are kept."""
        left = {name: {i for i, kept in zip(self.held[name], mask, strict=True) if kept} for name, mask in rows.items()}
        config = self.adalora_config
        return config.with_kept({name: [i in kept for i in range(config.init_r)] for name, kept in left.items()})


@dataclasses.dataclass
class Attached:
    """All that a model remembers of its adapters. No module, so that the bases are no children of the model."""

    adapters: dict[str, AttachedAdapter] = dataclasses.field(default_factory=dict)
    bases_A: BufferDict = dataclasses.field(default_factory=BufferDict)
    bases_B: BufferDict = dataclasses.field(default_factory=BufferDict)
    active: list[str] = dataclasses.field(default_factory=list)
    disabled: bool = False
    rows: Rows | None = None  # of a mixed batch, while it is computed
    plan: str | None = None  # of layers to come, and `keep_weight`, if `set_plan` was called
    keep_weight: bool = False


def attach(model: nn.Module, adapter: Adapter, adapter_name: str, *, loaded: bool, drawn_by: str | None = None) -> None:
    """Put an adapter that is bound to the model on its layers. Everything that can fail comes before any change.

    Args:
        model: The model, with or without other adapters.
        adapter: The adapter; its bases are known.
        adapter_name: Its name on this model, which `check_request` accepted.
        loaded: Whether it must bring the values of its modules and biases; a new one starts from the model's.
        drawn_by: The recipe that drew its bases just now; None if they came with it.

    Raises:
        ValueError, AdapterFormatError: the model cannot take this adapter.
    """
    config = adapter.config
    state: Attached = getattr(model, "_randlora", None) or Attached()
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in adapter.modules}
    base = dict(base_modules(model))
    _check_attachable(model, state, config)
    with biases_outside(state):
        extras = find_extras(adapter, model)
    weights = match_extras(adapter, base, extras) if loaded else {}
    shared, options = _layer_arguments(config, state)
    created = {
        name: layer_kind(layer, config)(layer, adapter_name, *shared, *options)
        for name, layer in layers.items()
        if not isinstance(layer, AdapterLayer)
    }
    if not state.adapters:
        model.requires_grad_(False)
        if (bnb := bnb_layers()) is not None:
            bnb.protect_from_repacking(model)
    dtypes, origin = _share_bases(state, adapter_name, adapter, floating_dtype(model), drawn_by)
    _replace(model, layers, created, state)
    for name, factors in adapter.factors.items():
        if name not in created:
            layers[name].update_layer(adapter_name, *options)
        layer: Any = model.get_submodule(name)
        layer.set_factors(adapter_name, type(factors)(*map(to_torch, factors)))
    for name in extras.modules:
        _wrap(model, name, adapter_name)
    held = {}
    if isinstance(config, AdaLoraConfig):
        held = {name: held_triplets(config, name) for name in adapter.modules}
    state.adapters[adapter_name] = AttachedAdapter(
        config, adapter.recipe, adapter.modules, extras, dtypes, origin, held
    )
    model._randlora = state  # type: ignore[assignment] # no module, as torch has it
    places = saved_parameters(model, adapter_name)
    with torch.no_grad():
        for key, value in weights.items():
            places[key].copy_(value)


def held_triplets(config: AdaLoraConfig, module: str) -> tuple[int, ...]:
    """The numbers, from 0 to below `init_r`, of the triplets that a config keeps in a layer."""
    return tuple(i for i, kept in enumerate(config.kept(module)) if kept)


@contextlib.contextmanager
def biases_outside(state: Attached) -> Iterator[None]:
    """Within this context, the biases in the model are the base's."""
    inside = [
        info.extras.biases for info in state.adapters.values() if info.extras.biases and info.extras.biases.inside
    ]
    for biases in inside:
        biases.swap(inside=False)
    try:
        yield
    finally:
        for biases in inside:
            biases.swap(inside=True)


def detach_layers(model: nn.Module, *, empty_only: bool = False, keep_saved: bool = False) -> None:
    """Put base layers back in their places.

    Args:
        model: The adapted model.
        empty_only: Only where no adapter is left.
        keep_saved: Leave the trained modules that are in force in place of the base's.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdapterLayer) and not (empty_only and module.adapter_names):
            model.set_submodule(name, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and not (empty_only and len(module.modules_to_save)):
            model.set_submodule(name, module.current if keep_saved else module.original_module)


def check_request(model: nn.Module, adapter_name: str) -> None:
    """Check that an adapter can be attached under this name, before anything is loaded or made for it.

    Raises:
        TypeError, ValueError: the name is no string, not usable, or taken.
    """
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name={adapter_name!r}: pass a string.")
    taken = any(hasattr(container(), adapter_name) for container in (nn.ModuleDict, nn.ParameterDict))
    if not adapter_name or any(mark in adapter_name for mark in "./\\\0") or taken or adapter_name == BASE_ROWS:
        raise ValueError(
            f"adapter_name={adapter_name!r}: must be a non-empty name without dots and slashes that is no attribute of"
            f" torch's containers, such as 'keys', nor {BASE_ROWS!r}. Choose another."
        )
    adapters = attached_to(model)
    if adapter_name in adapters:
        raise ValueError(
            f"adapter_name={adapter_name!r} is taken: the model has {list(adapters)}. Choose another name, delete it"
            " with model.delete_adapter(name), or set it to saved values with model.restore_adapter(folder, name)."
        )


def attached_to(model: Any) -> dict[str, AttachedAdapter]:
    """What is attached to this very model, by adapter name."""
    return state_of(model).adapters if hasattr(model, "_randlora") else {}


def state_of(model: Any) -> Attached:
    """All that a model with adapters remembers of them."""
    return model._randlora


def find_attached(model: Any, adapter_name: str) -> AttachedAdapter:
    """What the model remembers of an adapter.

    Raises:
        ValueError: no adapter of this name is attached.
    """
    attached = attached_to(model)
    if adapter_name not in attached:
        raise ValueError(f"adapter {adapter_name!r} is not attached: the model has {list(attached)}.")
    return attached[adapter_name]


def saved_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter holds besides the parameters of its layers, under the keys of PEFT's files."""
    info = find_attached(model, adapter_name)
    return extra_parameters(model, info.extras, adapter_name, info.modules)


def _layer_arguments(
    config: RandLoraConfig | AdaLoraConfig, state: Attached
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What an adapted layer is given of the model's, and of the adapter's; the latter also when it gets another one."""
    if isinstance(config, AdaLoraConfig):
        return (), (config.init_r, config.lora_alpha, config.lora_dropout, None)
    options = (config.r, config.randlora_alpha, config.randlora_dropout)
    return (state.bases_A, state.bases_B), options


def _check_attachable(model: nn.Module, state: Attached, config: RandLoraConfig | AdaLoraConfig) -> None:
    kind = getattr(model, "config_class_of_adapters", type(config))
    if kind is not type(config):
        raise ValueError(
            f"the model carries {kind.METHOD} adapters, and one model carries adapters of one method only: take them"
            f" off with model.unload() or model.merge_and_unload() before attaching one of {config.METHOD}."
        )
    if not state.adapters and adapted_layers(model):
        raise ValueError(
            f"a part of this model, with {next(iter(adapted_layers(model)))!r}, carries adapters already: attach to"
            " that part, or load its adapter on a model that has none."
        )
    foreign = next((name for name, module in model.named_modules() if _is_of_peft(module)), None)
    if foreign is not None or hasattr(model, "_orig_mod"):
        reason = f"{foreign!r} is a layer of PEFT" if foreign else "it is compiled"
        advice = (
            "unload PEFT's adapters (for RandLoRA, see accelerate_peft)" if foreign else "attach to model._orig_mod"
        )
        raise ValueError(f"adapters cannot be attached to this model, because {reason}: {advice}.")
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "the model's parameters are sharded already, and those of an adapter would not be: attach adapters first,"
            " then shard the model."
        )


def _is_of_peft(module: nn.Module) -> bool:
    return any(
        f"{kind.__module__}.{kind.__name__}" == "peft.tuners.tuners_utils.BaseTunerLayer"
        for kind in type(module).__mro__
    )


def _share_bases(
    state: Attached, adapter_name: str, adapter: Adapter, dtype: torch.dtype, drawn_by: str | None
) -> tuple[tuple[torch.dtype, ...], Origin | None]:
    """Hold the bases that the layers use: A in float32, B as narrow as it goes; those of other adapters if they agree.

    Returns:
        The dtypes they came in, and what all of them are drawn from if these are not all.
    """
    if adapter.bases is None:
        return (), None
    assert adapter.shapes is not None  # as it is bound
    used, origin = used_bases(adapter.bases, adapter.shapes.values(), adapter.config, drawn_by=drawn_by)
    values, scale = store(used.B, prefer=_HALF.get(dtype))
    bases = Bases(to_torch(used.A).float(), to_torch(values))
    for name, info in state.adapters.items():
        held = Bases(state.bases_A.stored(name), state.bases_B.stored(name))
        if (info.origin, state.bases_B.scale(name)) == (origin, scale) and _agree(held, bases):
            bases = _larger(state, held, bases, scale)
            break
    state.bases_A[adapter_name] = bases.A
    state.bases_B.hold(adapter_name, bases.B, scale)
    return tuple(to_torch(basis[:0]).dtype for basis in used), origin


def _agree(held: Bases, given: Bases) -> bool:
    """Whether the one is a part of the other."""
    common = Dims(*map(min, held.dims, given.dims))
    pairs = zip(cut_bases(held, common), cut_bases(given, common), strict=True)
    return common in (held.dims, given.dims) and all(
        a.shape == b.shape and torch.equal(a.cpu().to(b.dtype), b) for a, b in pairs
    )


def _larger(state: Attached, held: Bases, given: Bases, scale: float) -> Bases:
    """The larger of two pairs that agree; if it is the given one, it takes the place of the held one first."""
    if given.dims == Dims(*map(min, held.dims, given.dims)):
        return held
    for name in [name for name in state.bases_B if state.bases_B.stored(name) is held.B]:
        state.bases_A[name] = given.A
        state.bases_B.hold(name, given.B, scale)
    return given


def _replace(model: nn.Module, layers: dict[str, nn.Module], created: dict[str, AdapterLayer], state: Attached) -> None:
    """Put the created layers in place, under every name that their base layers have in the model."""
    aliases: dict[int, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        aliases[id(module)].append(name)
    owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, layer in created.items():
        layer.active_adapters, layer.disable_adapters = list(state.active), state.disabled
        if state.plan is not None and isinstance(layer, RandLoraLayer):
            layer.plan, layer.keep_weight = state.plan, state.keep_weight
        layer.tied = owners[id(layers[name]._parameters.get("weight"))] > 1
        for alias in aliases[id(layers[name])]:
            model.set_submodule(alias, layer.train(model.training))


def _wrap(model: nn.Module, name: str, adapter_name: str) -> None:
    module = model.get_submodule(name)
    if not isinstance(module, ModulesToSaveWrapper):
        module = ModulesToSaveWrapper(module).train(module.training)
        model.set_submodule(name, module)
    module.add(adapter_name)

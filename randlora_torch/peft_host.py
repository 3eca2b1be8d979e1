"""Our RandLoRA layers inside an existing `peft.PeftModel`: with `peft_source` all that knows PEFT's classes.

PEFT stays the host: it saves, loads, switches and deletes as it always did. The layers keep their parameters and names;
only their class changes, and that of the tuner that creates them.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interop.bases import Bases
from interop.config import RandLoraConfig
from interop.shapes import shared_dims
from randlora_torch import randlora as ours
from randlora_torch.bases import LayerBases, layer_bases, make_bases
from randlora_torch.layer import BASE_ROWS, Rows, layer_shape
from randlora_torch.structure import bnb_layers
from randlora_torch.switching import input_sizes, rows_of

try:
    from peft import PeftModel
    from peft.tuners.randlora import RandLoraModel as PeftTuner
    from peft.tuners.randlora.layer import Linear as PeftLinear
    from peft.tuners.randlora.layer import RandLoraLayer as PeftLayer
    from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed. Run: pip install 'randlora[peft]'") from error


def accelerate_peft(model: PeftModel) -> PeftModel:
    """Swap the RandLoRA layers of a PEFT model for ours, in place.

    Outputs, files and PEFT's own methods stay. What changes: speed and memory of the forward and backward passes, the
    dtype of quantized layers' outputs, merging into 8-bit and 4-bit weights, unmerging (exact), `adapter_names=[...]`,
    files with one copy of the bases, and further adapters, which may differ in r, sparsity, targets and seed. Adapters
    that PEFT nested by adding them to a quantized layer are put side by side.

    Args:
        model: A `peft.PeftModel` with RandLoRA adapters, before or after training, saving and loading.

    Returns:
        The same model.

    Raises:
        TypeError: the model is no PeftModel whose adapters are RandLoRA's.
        ValueError: adapters are merged.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, PeftTuner):
        raise TypeError(f"model is a {type(model).__name__} without RandLoRA: pass peft.get_peft_model's result.")
    if any(layer.merged for layer in tuner.modules() if isinstance(layer, PeftLayer)):
        raise ValueError("adapters are merged into the base weights: call model.unmerge_adapter() first.")
    if (bnb := bnb_layers()) is not None:
        bnb.protect_from_repacking(model)
    for name, layer in list(tuner.model.named_modules()):
        if isinstance(layer, PeftLayer) and isinstance(layer.base_layer, PeftLayer):
            tuner.model.set_submodule(name, _flattened(layer))
    for layer in tuner.modules():
        if isinstance(layer, PeftLayer):
            _host(layer)
    tuner.__class__ = _Tuner
    return model


def _flattened(outer: PeftLayer) -> PeftLayer:
    """One layer with the adapters of several that PEFT put around each other."""
    inner = _flattened(outer.base_layer) if isinstance(outer.base_layer, PeftLayer) else outer
    if inner is not outer:
        for held in ("r", "scaling", "randlora_dropout", "randlora_lambda", "randlora_gamma"):
            for name in getattr(outer, held):
                getattr(inner, held)[name] = getattr(outer, held)[name]
        inner._active_adapter = outer._active_adapter
    return inner


def _host(layer: Any) -> None:
    """Give a layer of PEFT our methods."""
    bnb = bnb_layers()
    kinds: list[tuple[type, type]] = [(PeftLinear, ours.Linear)]
    if bnb is not None:
        from peft.tuners.randlora import bnb as peft_bnb  # exists only if bitsandbytes is installed

        kinds += [(peft_bnb.Linear8bitLt, bnb.Linear8bitLt), (peft_bnb.Linear4bit, bnb.Linear4bit)]
    fitting: list[tuple[type, type]] = [pair for pair in kinds if pair[0] is type(layer)]
    for theirs, mine in fitting:
        layer.__class__ = _hosted_class(mine, theirs)
        layer._share_bases()


@functools.cache
def _hosted_class(mine: type, theirs: type) -> type:
    made_of = {"__module__": __name__, "_made_of": (mine, theirs)}
    return type(theirs.__name__, (_Hosted, mine, theirs), made_of)


def _rebuild(mine: type, theirs: type) -> nn.Module:
    """An empty layer, for pickle and deepcopy to fill."""
    kind: Any = _hosted_class(mine, theirs)
    return kind.__new__(kind)


if TYPE_CHECKING:
    _Mixed = ours.Linear  # or another layer of ours, see `_hosted_class`
else:
    _Mixed = object


class _Hosted(_Mixed):
    """What differs between our layers and PEFT's, where PEFT's code creates, names and deletes adapters."""

    _made_of: tuple[type, type]
    set_adapter = PeftLayer.set_adapter
    delete_adapter = PeftLayer.delete_adapter

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, self._made_of, self.__getstate__()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        own: Any = self
        PeftLayer.update_layer(own, *args, **kwargs)
        self._share_bases()

    def _share_bases(self) -> None:
        """Hold the bases without owning them: the tuner does, and so they are saved and moved once."""
        for name in ("randlora_A", "randlora_B"):
            if name in self._modules:
                self.__dict__[name] = self._modules.pop(name)

    def _bases(self, adapter_name: str, device: torch.device, dtype: torch.dtype | None = None) -> LayerBases:
        bases = Bases(*(_on(held, adapter_name, device) for held in (self.randlora_A, self.randlora_B)))
        return LayerBases(*layer_bases(bases, (self.out_features, self.in_features)))

    def _sparse_basis(self, adapter_name: str, codes: Tensor) -> None:
        return None  # PEFT's bases are in float32

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        return super().forward(x, *args, **kwargs)


def _on(held: Any, name: str, device: torch.device) -> Tensor:
    """One of PEFT's bases where it is needed; a copy is kept until PEFT changes what it was made from."""
    source = held[name]
    if source.device == device:
        return source
    copies = held.__dict__.setdefault("_copies", {})
    made_from, copy = copies.get((name, device), (None, None))
    if made_from != (id(source), source._version):
        with torch.inference_mode(False):
            copy = source.to(device)
        copies[name, device] = ((id(source), source._version), copy)
    return copy


class _Tuner(PeftTuner):
    """PEFT's tuner, with bases of its own for each adapter, on layers of any kind."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        if adapter_name not in self.randlora_A:
            beside = next(iter((*self.randlora_A.values(), *model.parameters())))
            dtype = next((basis.dtype for basis in self.randlora_A.values()), torch.float32)
            for held, basis in zip((self.randlora_A, self.randlora_B), self._new_bases(model, config), strict=True):
                held[adapter_name] = basis.to(beside.device, dtype)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _new_bases(self, model: nn.Module, config: Any) -> Bases:
        resolved = self._prepare_adapter_config(config, self.get_model_config(model))
        resolved = _maybe_include_all_linear_layers(resolved, model)
        shapes = []
        for name, module in model.named_modules():
            base = module.base_layer if isinstance(module, PeftLayer) else module
            if self._check_target_module_exists(resolved, name) and hasattr(base, "weight"):
                shapes.append(layer_shape(base))
        return make_bases(RandLoraConfig.from_dict(config.to_dict()), **shared_dims(shapes)._asdict())

    def _check_new_adapter_config(self, config: Any) -> None:
        BaseTuner._check_new_adapter_config(self, config)
        configs: Iterable[Any] = self.peft_config.values()
        saved = {other.save_projection for other in configs}
        if len(saved) > 1:
            raise ValueError("PEFT saves the bases of all adapters or of none: give all the same save_projection.")

    def _create_and_replace(  # type: ignore[override] # PEFT calls it so
        self, randlora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, **kwargs: Any
    ) -> None:
        if isinstance(target, PeftLayer):
            target.update_layer(
                adapter_name, self.randlora_A, self.randlora_B, randlora_config.r, config=randlora_config
            )
        else:
            super()._create_and_replace(randlora_config, adapter_name, target, target_name, parent, **kwargs)
            _host(getattr(parent, target_name))

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        layers = [layer for layer in self.modules() if isinstance(layer, PeftLayer)]
        for reason in self._against_mixing(names, layers, input_sizes((*args, *kwargs.values()))):
            raise ValueError(f"adapter_names={names}: {reason}. Call the model once per adapter, or correct it.")
        with rows_of(layers, Rows(list(names))):
            yield

    def _against_mixing(self, names: list[str], layers: list[Any], sizes: tuple[int, int] | None) -> Iterator[str]:
        """Why a batch cannot be mixed so."""
        unknown = set(names) - set(self.peft_config) - {BASE_ROWS}
        if unknown:
            yield f"{sorted(unknown)} are not attached, {sorted(self.peft_config)} are"
        if sizes is not None and sizes[0] != len(names):
            yield f"the batch has {sizes[0]} rows"
        if self.training or any(layer.merged or layer.disable_adapters for layer in layers):
            yield "mixing is for inference (model.eval()) with adapters enabled and unmerged"
        configs: Iterable[Any] = self.peft_config.values()
        if any(config.bias != "none" or config.modules_to_save for config in configs):
            yield "an adapter trains biases or whole modules, which are not mixed here"

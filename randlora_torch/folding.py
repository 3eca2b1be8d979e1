"""What a training loop may say about W' = W + dW: which layers make it (`set_plan`), and that a step makes it once.

Within an optimizer step W' is the same for every micro-batch, and lambda and gamma depend on the batch only through
the gradient of W', which adds up. So `fold_once` makes W' once and projects its gradient once, by the chain rule.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

from interop.plans import check_plan
from randlora_torch.merging import is_sharded
from randlora_torch.randlora import RandLoraLayer
from randlora_torch.step import Step


def set_plan(model: nn.Module, plan: str = "auto", *, keep_weight: bool = False) -> None:
    """Choose how the RandLoRA layers of a model multiply, also those that later adapters bring.

    Args:
        model: A model with RandLoRA adapters attached, by this package or by PEFT (`accelerate_peft`).
        plan: "factored", "folded", or "auto": what costs less for the number of tokens, see `adapted_linear`.
        keep_weight: Keep the W' that a folded forward makes until backward, instead of making it again: faster, for
            as much memory as the adapted weights take in the dtype of the products.

    Raises:
        ValueError: there is no such plan, or the model has no RandLoRA layers.
    """
    check_plan(plan)
    for layer in _randlora_layers(model):
        layer.plan, layer.keep_weight = plan, keep_weight
    state = getattr(model, "_randlora", None)
    if state is not None:
        state.plan, state.keep_weight = plan, keep_weight


@contextlib.contextmanager
def fold_once(model: nn.Module) -> Iterator[None]:
    """Compute an optimizer step's micro-batches over one W' per layer; exact against the large batch.

        with fold_once(model):
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    The gradients of lambda and gamma come at the end of the block, added to those that are there; none come if it is
    left by an exception. Other parameters get theirs in each backward, as always. It takes one W' and one float32
    gradient of it per layer; under `torch.no_grad`, as while generating, one W'.

    Raises:
        ValueError: the model has no RandLoRA layers, is in such a block already, or its parameters are sharded.
        RuntimeError: lambda or gamma changed before the end of the block.
    """
    step = Step()
    begin_step(model, step)
    try:
        yield
        step.project()
    finally:
        end_step(model)


def begin_step(model: nn.Module, step: Step) -> None:
    """Let the layers of a model compute over the weights of a step, until `end_step`."""
    layers = _randlora_layers(model)
    if any(layer.step is not None for layer in layers):
        raise ValueError("fold_once is active on this model already: one block is one optimizer step.")
    if any(is_sharded(part) for layer in layers for part in layer.parameters()):
        raise ValueError("the model's parameters are sharded, so no W' can be kept whole: leave fold_once out.")
    for layer in layers:
        layer.step = step


def end_step(model: nn.Module) -> None:
    """Let the layers of a model make W' in each pass again."""
    for layer in _randlora_layers(model):
        layer.step = None


def _randlora_layers(model: nn.Module) -> list[RandLoraLayer]:
    layers = [module for module in model.modules() if isinstance(module, RandLoraLayer)]
    if not layers:
        raise ValueError("the model has no RandLoRA layers: attach an adapter first, with get_peft_model.")
    return layers

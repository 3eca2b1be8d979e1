"""`RankAllocator`: which triplets of an AdaLoRA adapter are left at each step (arXiv:2303.10512, section 3.2 and 3.3).

It works on the rows that the layers hold, numbered from 0. Which of an adapter's `init_r` triplets these are, if some
were taken away before, is the model's business (`AttachedAdapter.held`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.schedule import budgets, is_allocated, is_measured
from randlora_torch.adalora import AdaLoraLayer
from randlora_torch.merging import is_sharded


class Importance(NamedTuple):
    """Moving averages for each number in A, E and B of one layer (equations 9 and 10 of the paper)."""

    exp_avg_ipt: SVDFactors  # of the importance |parameter * gradient|
    exp_avg_unc: SVDFactors  # of how far it is from its own average


class Allocation(NamedTuple):
    """What a step of the allocator did."""

    budget: int  # triplets that all layers together may keep
    kept: dict[str, tuple[bool, ...]] | None  # which rows each layer keeps, by name, if they were chosen anew


def require_whole(layers: Mapping[str, AdaLoraLayer], adapter_name: str) -> None:
    """Raise a ValueError if a process holds only parts of an adapter's parameters, as under FSDP."""
    for name, layer in layers.items():
        if is_sharded(layer.lora_E[adapter_name]):
            raise ValueError(f"the parameters of {name!r} are sharded, and AdaLoRA needs them whole: train with DDP.")


class RankAllocator:
    """Measures the importance of triplets and sets E to zero for the least important ones, as the budget falls.

    Attributes:
        config: The adapter's config, with its schedule.
        adapter_name: The adapter.
        step: The last step that it was told of, or None.
        threshold: The score up to which the last allocation took triplets away, or None.
        importance: By layer; empty before the first step, and after the last allocation.
        kept: Which rows each layer keeps since the last allocation; empty before the first one.

    Args:
        model: A model whose layers carry the adapter.
        peft_config: The adapter's config.
        adapter_name: Its name.

    Raises:
        ValueError: the config has no schedule (`AdaLoraConfig.require_schedule`), or no layer carries the adapter.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str = "default") -> None:
        self.config, self.adapter_name = peft_config, adapter_name
        layers = self._layers(model)
        if not layers:
            raise ValueError(f"no layer carries an AdaLoRA adapter called {adapter_name!r}. Attach it first.")
        self._budgets = budgets(peft_config, len(layers))
        self.step: int | None = None
        self.threshold: float | None = None
        self.importance: dict[str, Importance] = {}
        self.kept: dict[str, tuple[bool, ...]] = {}

    def budget(self, step: int) -> int:
        """Triplets that all layers together may keep at a step."""
        return int(self._budgets[min(step, len(self._budgets) - 1)])

    @torch.no_grad()
    def update_and_allocate(self, model: nn.Module, global_step: int) -> Allocation:
        """Do what the schedule has for this step; call it after the optimizer's step, before gradients are cleared.

        Args:
            model: The model, with the gradients of this step.
            global_step: Number of the optimizer step just made, from 1 to `config.total_step`; more are allowed.

        Raises:
            ValueError: there are no gradients to measure by, or never were; parameters are sharded.
        """
        layers = self._layers(model)
        require_whole(layers, self.adapter_name)
        if is_measured(self.config, global_step):
            self._measure(layers)
        allocates = bool(is_allocated(self.config, global_step))
        if allocates or global_step > self.config.last_allocation:
            if allocates or not self.kept:
                self._choose(layers, global_step)
            self._mask(layers)
        if global_step >= self.config.last_allocation:
            self.importance = {}
        self.step = global_step
        return Allocation(self.budget(global_step), dict(self.kept) if allocates else None)

    def scores(self) -> dict[str, Tensor]:
        """The importance (r,) of each layer's triplets: equation 7, with the product of both averages as in PEFT."""
        found = {}
        for name, (importances, uncertainties) in self.importance.items():
            A, E, B = (i * u for i, u in zip(importances, uncertainties, strict=True))
            found[name] = E[:, 0] + (A.mean(dim=1) + B.mean(dim=0))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What going on from this step depends on, as tensors by key."""
        state = {f"{name}.kept": torch.tensor(rows, dtype=torch.bool) for name, rows in self.kept.items()}
        for name, importance in self.importance.items():
            for average, factors in importance._asdict().items():
                state |= {f"{name}.{average}.{part}": value for part, value in factors._asdict().items()}
        return state | {"step": torch.tensor(-1 if self.step is None else self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        step = int(state["step"])
        self.step = None if step < 0 else step
        kept = {key.removesuffix(".kept"): value for key, value in state.items() if key.endswith(".kept")}
        self.kept = {name: tuple(rows.tolist()) for name, rows in kept.items()}
        names = {key.removesuffix(".exp_avg_ipt.A") for key in state if key.endswith(".exp_avg_ipt.A")}

        def factors(name: str, average: str) -> SVDFactors:
            return SVDFactors(*(state[f"{name}.{average}.{part}"] for part in SVDFactors._fields))

        self.importance = {name: Importance(*(factors(name, field) for field in Importance._fields)) for name in names}

    def _layers(self, model: nn.Module) -> dict[str, AdaLoraLayer]:
        modules = model.named_modules()
        found = {name: module for name, module in modules if isinstance(module, AdaLoraLayer)}
        return {name: layer for name, layer in found.items() if layer.holds(self.adapter_name)}

    def _measure(self, layers: Mapping[str, AdaLoraLayer]) -> None:
        """Update both averages; a step whose gradients are not finite is passed over, as a GradScaler does."""
        factors = {name: layer.factors(self.adapter_name) for name, layer in layers.items()}
        grads = {name: SVDFactors(*(part.grad for part in parts)) for name, parts in factors.items()}
        given = [grad for parts in grads.values() for grad in parts if grad is not None]
        if not given:
            raise ValueError(
                f"adapter {self.adapter_name!r} has no gradients: call update_and_allocate after loss.backward() and"
                " optimizer.step(), and before zero_grad(); AdaLoraCallback does so in transformers' Trainer."
            )
        finite = torch.stack([torch.isfinite(grad).all().to(given[0].device) for grad in given])
        if not finite.all():
            return
        for name, parts in factors.items():
            self.importance[name] = self._averaged(self.importance.get(name), parts, grads[name])

    def _averaged(self, before: Importance | None, parameters: SVDFactors, grads: SVDFactors) -> Importance:
        beta1, beta2 = self.config.beta1, self.config.beta2
        importances, uncertainties = [], []
        for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            # A layer that took no part in this step has no gradient, which is a gradient of zero.
            value = torch.zeros_like(parameter) if grad is None else (parameter * grad).abs()
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            old, old_uncertainty = (0, 0) if before is None else (before.exp_avg_ipt[i], before.exp_avg_unc[i])
            importances.append(beta1 * old + (1 - beta1) * value)
            uncertainties.append(beta2 * old_uncertainty + (1 - beta2) * (value - importances[-1]).abs())
        return Importance(SVDFactors(*importances), SVDFactors(*uncertainties))

    def _choose(self, layers: Mapping[str, AdaLoraLayer], step: int) -> None:
        """Keep the triplets above the score of the last one that must go; of equal ones, all go, as in PEFT."""
        ranks = {name: layer.r[self.adapter_name] for name, layer in layers.items()}
        excess = sum(ranks.values()) - self.budget(step)
        if excess <= 0:
            self.kept = {name: (True,) * rank for name, rank in ranks.items()}
            return
        if not self.importance:
            raise ValueError(
                f"step {step} takes {excess} triplets away from adapter {self.adapter_name!r}, but their importance was"
                " never measured: call update_and_allocate at every step, from the first one."
            )
        scores = {name: score.cpu() for name, score in self.scores().items()}
        self.threshold = torch.kthvalue(torch.cat(list(scores.values())), excess).values.item()
        self.kept = {name: tuple((score > self.threshold).tolist()) for name, score in scores.items()}

    def _mask(self, layers: Mapping[str, AdaLoraLayer]) -> None:
        for name, layer in layers.items():
            E = layer.lora_E[self.adapter_name]
            E[[row for row, kept in enumerate(self.kept[name]) if not kept]] = 0

"""What an adapter trains besides lambda and gamma: whole modules (`modules_to_save`) and bias vectors (`bias`)."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from randlora_torch.layer import BASE_ROWS, Rows


class ModulesToSaveWrapper(nn.Module):
    """A module and its trained copies, by adapter name; it computes, and reads, as the one in force.

    Attributes:
        original_module: The frozen module of the base model.
        modules_to_save: Its trained copies by adapter name, as PEFT names them.
        active: Name of the adapter whose copy is in force, or None for the original.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.rows: Rows | None = None

    def add(self, adapter_name: str) -> None:
        """Start a copy of the original module for an adapter."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module).requires_grad_(False)

    @property
    def current(self) -> nn.Module:
        """The module in force."""
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module in force; in a mixed batch, each row's own."""
        return self.current(*args, **kwargs) if self.rows is None else self._by_row(*args, **kwargs)

    def _by_row(self, *args: Any, **kwargs: Any) -> Tensor:
        batch = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        assert self.rows is not None
        names = [name if name in self.modules_to_save else BASE_ROWS for name in self.rows.along(batch)]
        outputs: dict[int, Tensor] = {}
        for name in dict.fromkeys(names):
            module = self.original_module if name == BASE_ROWS else self.modules_to_save[name]
            index = [i for i, row in enumerate(names) if row == name]

            def chosen(value: Any, index: list[int] = index) -> Any:
                of_batch = isinstance(value, Tensor) and value.dim() and value.shape[0] == len(names)
                return value[index] if of_batch else value

            some = module(*map(chosen, args), **{key: chosen(value) for key, value in kwargs.items()})
            if not isinstance(some, Tensor) or some.shape[:1] != (len(index),):
                raise ValueError(
                    f"a mixed batch needs trained modules that return one tensor, a row per row of the batch; a"
                    f" {type(module).__name__} does not. Call the model once per adapter."
                )
            outputs.update(zip(index, some, strict=True))
        return torch.stack([outputs[i] for i in range(len(names))])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):  # not yet set: while copying or unpickling
                raise
            return getattr(self.current, name)


class TrainedBiases:
    """The bias vectors that an adapter trains: in the model while the adapter is in force, else kept here.

    Attributes:
        inside: Whether the adapter's own biases are in the model now, and the base's are kept here.
    """

    def __init__(self, owners: Iterable[tuple[nn.Module, str]]) -> None:
        self._owners = list(owners)
        copies: dict[int, nn.Parameter] = {}  # by the parameter they start from: a tied one stays tied
        for module, name in self._owners:
            start = _bias(module, name)
            copies.setdefault(id(start), nn.Parameter(start.detach().clone()))
        self._kept = [copies[id(module._parameters[name])] for module, name in self._owners]
        self.inside = False

    def swap(self, inside: bool) -> None:
        """Exchange the biases in the model for those kept here, if they are not where they are wanted."""
        if inside == self.inside:
            return
        for i, (module, name) in enumerate(self._owners):
            now = _bias(module, name)
            wanted = self._kept[i]
            wanted.data = wanted.data.to(now.device, now.dtype)  # the model may have been moved or converted
            module._parameters[name], self._kept[i] = wanted, now
        self.inside = inside

    def items(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Owner, attribute and the adapter's own value of each bias."""
        inside = [_bias(module, name) for module, name in self._owners]
        return [
            (*owner, value) for owner, value in zip(self._owners, inside if self.inside else self._kept, strict=True)
        ]


def _bias(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None, f"{name} of the {type(module).__name__} was taken away"
    return parameter


def bias_names(module: nn.Module) -> list[str]:
    """The bias vectors that a module holds itself; PEFT trains and saves those of the name "bias" only."""
    return ["bias"] if module._parameters.get("bias") is not None else []

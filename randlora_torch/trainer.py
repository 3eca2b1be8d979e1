"""What transformers' Trainer must be taught to resume: it reloads whole models and PEFT's PeftModels only."""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn


def support_trainer(model: nn.Module, kind: type, *, wanted: bool) -> None:
    """Make `Trainer.train(resume_from_checkpoint=...)` and `load_best_model_at_end` work with adapted models.

    Two methods of `transformers.Trainer` (and so of TRL's trainers) are wrapped, once per process; they act as before
    on every other model.

    Args:
        model: The model that is adapted.
        kind: The class that adapted models have.
        wanted: Whether it is worth importing the Trainer for it, because the model will train.
    """
    of_transformers = any(base.__module__.startswith("transformers.") for base in type(model).__mro__)
    if "transformers.trainer" not in sys.modules:
        if not (wanted and of_transformers and importlib.util.find_spec("accelerate")):
            return
    trainer = importlib.import_module("transformers.trainer").Trainer
    for name, best in (("_load_from_checkpoint", False), ("_load_best_model", True)):
        method = getattr(trainer, name, None)
        if method is not None and getattr(method, "_restores", None) is not kind:
            setattr(trainer, name, _restoring(method, kind, best))


def _restoring(method: Any, kind: type, best: bool) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder = Path(self.state.best_model_checkpoint if best else (args or tuple(kwargs.values()))[0])
        ours = isinstance(model, kind) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        adapters = (*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json"))
        if not ours or not adapters:  # of a module of one's own, the Trainer saves all
            return method(self, *args, **kwargs)
        for name in model.randlora_adapters:  # "default" is in the folder, the others in sub-folders
            model.restore_adapter(folder if name == "default" else folder / name, name)

    wrapped: Any = functools.wraps(method)(wrapper)
    wrapped._restores = kind
    return wrapped

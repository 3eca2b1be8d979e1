"""When AdaLoRA takes triplets away, and how many it leaves: arXiv:2303.10512, equation 12, with PEFT's rounding."""

from typing import Any

import numpy as np

from interop.adalora import AdaLoraConfig


def budgets(config: AdaLoraConfig, num_weights: int) -> np.ndarray:
    """Triplets left in all adapted weights together, by step, from 0 to `config.last_allocation`.

    `b(t) = target + (init - target) (1 - (t - tinit) / (total - tfinal - tinit))^3` after tinit, rounded down; before,
    all. It depends on the config alone, so a run that goes on from a pruned file goes on with its schedule.

    >>> config = AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=3, total_step=12)
    >>> budgets(config, 4).tolist()
    [24, 24, 24, 18, 13, 10, 9, 8, 8, 8]

    Raises:
        ValueError: the config has no schedule, see `AdaLoraConfig.require_schedule`.
    """
    config.require_schedule()
    initial, target = config.init_r * num_weights, config.target_r * num_weights
    steps = np.arange(config.last_allocation + 1)
    left = 1 - (steps - config.tinit) / (config.last_allocation - config.tinit)
    falling = ((initial - target) * left**3 + target).astype(np.int32)
    return np.where(steps <= config.tinit, np.int32(initial), falling)


def is_measured(config: AdaLoraConfig, step: Any) -> Any:
    """Whether importance is measured at a step, an int or an array."""
    return step < config.last_allocation


def is_allocated(config: AdaLoraConfig, step: Any) -> Any:
    """Whether the triplets that are left are chosen anew at a step, an int or an array."""
    due = (step % config.deltaT == 0) | (step == config.last_allocation)
    return (step > config.tinit) & (step <= config.last_allocation) & due

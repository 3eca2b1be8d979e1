"""When AdaLoRA takes triplets away. That PEFT's allocator agrees: tests/cross/test_adalora_files_against_peft.py."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import adalora_configs, schedules

from interop import AdaLoraConfig
from interop.schedule import budgets, is_allocated, is_measured

WORKED = AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=3, total_step=12)
# PEFT's rank allocator on four layers; after step 9 ranks stay.
WORKED_BUDGETS = [24, 24, 24, 18, 13, 10, 9, 8, 8, 8]

num_weights = st.sampled_from((1, 4, 7, 64, 1000))


def test_the_worked_example_has_the_numbers_of_peft():
    found = budgets(WORKED, 4)
    assert found.tolist() == WORKED_BUDGETS
    assert found.dtype == np.int32
    assert [step for step in range(15) if is_allocated(WORKED, step)] == [3, 4, 5, 6, 7, 8, 9]
    assert [step for step in range(15) if is_measured(WORKED, step)] == [*range(9)]


@given(schedule=schedules(), layers=num_weights)
def test_the_budget_falls_with_the_third_power_of_the_time_left(schedule, layers):
    config = AdaLoraConfig(**schedule)
    found = budgets(config, layers)
    first, last = config.init_r * layers, config.target_r * layers
    for step, budget in enumerate(found.tolist()):
        left = (config.last_allocation - step) / (config.last_allocation - config.tinit)
        exact = first if step <= config.tinit else last + (first - last) * left**3
        assert exact - 1 - 1e-9 < budget <= exact + 1e-9
    assert len(found) == config.last_allocation + 1
    assert (found[0], found[-1]) == (first, last)
    assert (np.diff(found) <= 0).all()


@given(schedule=schedules(), layers=num_weights, other=adalora_configs())
def test_the_budget_depends_on_the_schedule_alone(schedule, layers, other):
    kept = {f"{i}.lora_E": [True] + [False] * (schedule["init_r"] - 1) for i in range(2)}
    pruned = dataclasses.replace(other, **schedule, rank_pattern=kept)
    np.testing.assert_array_equal(budgets(pruned, layers), budgets(AdaLoraConfig(**schedule), layers))


@given(schedule=schedules())
def test_steps_as_ints_and_as_arrays_give_the_same_answers(schedule):
    config = AdaLoraConfig(**schedule)
    steps = np.arange(config.total_step + 3)
    for question in (is_allocated, is_measured):
        np.testing.assert_array_equal(question(config, steps), [question(config, step) for step in steps.tolist()])


@given(schedule=schedules())
def test_triplets_are_chosen_every_delta_t_steps_and_at_the_last_allocation(schedule):
    config = AdaLoraConfig(**schedule)
    due = [step for step in range(config.total_step + 3) if is_allocated(config, step)]
    multiples = range(0, config.last_allocation + 1, config.deltaT)
    assert due == sorted({step for step in multiples if step > config.tinit} | {config.last_allocation})
    assert [step for step in range(config.total_step) if is_measured(config, step)] == [*range(config.last_allocation)]


def test_a_config_without_a_schedule_has_no_budgets():
    with pytest.raises(ValueError, match=r"total_step=None: set it to the number of optimizer steps of the training\."):
        budgets(AdaLoraConfig(inference_mode=True), 4)
    flat = AdaLoraConfig(inference_mode=True, total_step=9, target_r=12)
    with pytest.raises(ValueError, match=r"target_r=12: must be below init_r=12"):
        budgets(flat, 4)

"""The cost formula: where folding begins, and what it counts."""

import pytest

from interop.plans import ACCELERATOR_BALANCE, CPU_BALANCE, PLANS, Contraction, Plan, choose_plan

FREE_BYTES = {"itemsize": 4, "balance": 0.0}


def square(tokens, d=1024, **options):
    return Contraction((d, d), r=32, tokens=tokens, **options)


@pytest.mark.parametrize(
    ("tokens", "plan"),
    [(500, Plan(False, False)), (600, Plan(True, False)), (1000, Plan(True, False)), (1100, Plan(True, True))],
)
def test_by_arithmetic_alone_a_square_layer_folds_forward_from_half_its_width_and_backward_from_its_width(tokens, plan):
    assert choose_plan("auto", square(tokens), **FREE_BYTES) == plan


def test_multiply_adds_are_those_of_the_issue():  # T (4 D d + 3 d^2) factored, T 3 D d + 3 D d^2 folded
    T, D, d = 300, 192, 64
    layer = Contraction((D, d), r=16, tokens=T)
    factored = layer.factored_forward().products + layer.factored_backward().products
    folded = layer.folded_forward().products + layer.folded_backward().products
    assert factored == T * (4 * D * d + 3 * d * d)
    assert folded == T * 3 * D * d + 3 * D * d * d


def test_a_short_output_costs_more_factored_as_the_input_meets_the_long_basis_twice():
    wide, tall = (Contraction(shape, r=16, tokens=300) for shape in ((64, 192), (192, 64)))
    assert wide.factored_backward().products - tall.factored_backward().products == 300 * 64 * 192


def test_a_kept_weight_saves_one_product_and_only_if_it_was_made():
    kept, rebuilt = square(2048, keeps_weight=True), square(2048)
    assert rebuilt.folded_backward().products - kept.folded_backward().products == 1024**3
    # at 600 tokens backward folds only if W' is there already; at 400 no W' is made that could be kept
    assert choose_plan("auto", square(600, keeps_weight=True), **FREE_BYTES) == Plan(True, True)
    assert choose_plan("auto", square(400, keeps_weight=True), **FREE_BYTES) == Plan(False, False)


def test_without_a_gradient_for_the_input_the_weight_is_not_made_again():
    with_it, without = square(2048), square(2048, needs_input_grad=False)
    assert with_it.folded_backward().products - without.folded_backward().products == (2048 + 1024) * 1024**2


def test_without_the_frozen_product_folding_begins_later():
    assert choose_plan("auto", square(1000, frozen=False), **FREE_BYTES) == Plan(False, False)
    assert choose_plan("auto", square(1500, frozen=False), **FREE_BYTES) == Plan(True, False)


def test_products_that_use_zeros_fold_earlier():
    assert not choose_plan("auto", square(300), **FREE_BYTES).fold_forward
    assert choose_plan("auto", square(300, product_price=0.3), **FREE_BYTES).fold_forward


def test_few_tokens_are_not_worth_moving_the_weight_even_if_arithmetic_were_free():
    layer = square(16, product_price=0.0)
    assert choose_plan("auto", layer, itemsize=4, balance=0.0).fold_forward
    assert not choose_plan("auto", layer, itemsize=4, balance=CPU_BALANCE).fold_forward


@pytest.mark.parametrize("balance", [CPU_BALANCE, ACCELERATOR_BALANCE])
@pytest.mark.parametrize("shape", [(1024, 1024), (2816, 1024), (1024, 2816)])
def test_one_token_is_factored_and_many_are_folded(balance, shape):
    few, many = (Contraction(shape, r=32, tokens=tokens) for tokens in (1, 1 << 16))
    assert choose_plan("auto", few, itemsize=2, balance=balance) == Plan(False, False)
    assert choose_plan("auto", many, itemsize=2, balance=balance) == Plan(True, True)


@pytest.mark.parametrize("tokens", [1, 1 << 16])
def test_a_named_plan_is_taken_at_its_word(tokens):
    for plan, fold in (("factored", False), ("folded", True)):
        assert choose_plan(plan, square(tokens), itemsize=4, balance=CPU_BALANCE) == Plan(fold, fold)


def test_an_unknown_plan_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"plan='fold' is not known: choose one of \['auto', 'factored', 'folded'\]"):
        choose_plan("fold", square(1), itemsize=4, balance=CPU_BALANCE)
    assert PLANS == ("auto", "factored", "folded")

"""Once per step: micro-batches over one W' give the large batch's gradients. What a plan changes, and what not."""

import contextlib
import copy
import gc

import pytest
import torch
from tolerances import TOLERANCE
from torch import nn

from randlora_torch import RandLoraConfig, fold_once, get_peft_model, set_plan
from tests.torch.conftest import MODELS, TOKENS, X, config, layers_of, llama, loss_of, mlp, randomize

EXACT = TOLERANCE["float64", "gradient"]
every_model = pytest.mark.parametrize("kind", MODELS)


def adapted(kind="MLP", dtype=torch.float64, **fields):
    make, targets, *_ = MODELS[kind]
    return randomize(get_peft_model(make().to(dtype), config(targets, **fields)))


def in_float64(model):
    """The model with factors in float64 as well, so that only a wrong sum can make a difference."""
    return model.double()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found
    return found


def inputs_of(kind):
    return X.double() if kind == "MLP" else TOKENS


def total(model, batch):
    output = model(batch)
    return (getattr(output, "logits", output).double() ** 2).sum()


def by_large_batch(model, batch):
    total(model, batch).backward()
    return gradients(model)


def by_micro_batches(model, batch, **options):
    with fold_once(model):
        for part in batch.split(1):
            total(model, part).backward()
        assert all(layer.factors("default").lam.grad is None for _, layer in layers_of(model))
    return gradients(model)


@every_model
def test_micro_batches_over_one_weight_give_the_large_batchs_gradients(kind):
    model, batch = in_float64(adapted(kind)), inputs_of(kind)
    want = by_large_batch(model, batch)
    torch.testing.assert_close(by_micro_batches(model, batch), want, **EXACT)
    torch.testing.assert_close(by_large_batch(model, batch), want, rtol=0, atol=0)  # and nothing is left of it


def test_it_holds_with_trained_biases_two_adapters_checkpoints_and_inputs_without_gradient():
    model, batch = in_float64(adapted(bias="all")), inputs_of("MLP")
    want = by_large_batch(model, batch)
    assert any(name.endswith("bias") for name in want)
    got = {}
    with fold_once(model):
        for part in batch.split(1):
            total(lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), part).backward()
    got = gradients(model)
    torch.testing.assert_close(got, want, **EXACT)
    two = adapted()
    two.add_adapter("second", config(MODELS["MLP"][1], r=2))
    randomize(two, "second", seed=1).set_adapter(["default", "second"])
    two = in_float64(two)
    want = by_large_batch(two, batch)
    assert any("second" in name for name in want)
    torch.testing.assert_close(by_micro_batches(two, batch), want, **EXACT)


def test_dropout_in_the_branch_keeps_the_base_layer_apart_and_draws_anew_for_each_micro_batch():
    model, batch = in_float64(adapted(randlora_dropout=0.5)).train(), inputs_of("MLP")

    def run(once):
        torch.manual_seed(0)
        for part in batch.split(1):
            if once:
                total(model, part).backward()
            else:
                with fold_once(model):
                    total(model, part).backward()
        return gradients(model)

    torch.testing.assert_close(run(once=True), run(once=False), **EXACT)


def test_the_weight_is_made_once_for_all_micro_batches_and_its_gradient_is_projected_once(monkeypatch):
    from randlora_torch import contraction
    from randlora_torch import gradients as gradient_rules

    counts = {"made": 0, "projected": 0}
    add, project = contraction.add_product, gradient_rules.Operands.project

    def counting_add(*args, **kwargs):
        counts["made"] += 1
        return add(*args, **kwargs)

    def counting_project(self, *args):
        counts["projected"] += 1
        return project(self, *args)

    monkeypatch.setattr(contraction, "add_product", counting_add)
    monkeypatch.setattr(gradient_rules.Operands, "project", counting_project)
    model = adapted(dtype=torch.float32)
    with fold_once(model):
        for part in X.split(1):
            total(model, part).backward()
    assert counts == {"made": 2, "projected": 2}  # two layers, four micro-batches
    set_plan(model, "folded")
    counts.update(made=0, projected=0)
    for part in X.split(1):
        total(model, part).backward()
    assert counts == {"made": 12, "projected": 8}  # the first layer's input wants no gradient


def test_half_precision_sums_the_gradients_of_micro_batches_in_float32():
    model = adapted("Llama", torch.bfloat16)
    want = by_large_batch(in_float64(copy.deepcopy(model)), TOKENS)
    with fold_once(model):
        for part in TOKENS.split(1):
            total(model, part).backward()
        step = layers_of(model)[0][1].step
        kept = list(step._weights.values())
        assert {weight.weight.dtype for weight in kept} == {torch.bfloat16}
        assert {weight._grad.dtype for weight in kept} == {torch.float32}
    got = gradients(model)
    for name in want:
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error < 0.1, name


def stopped(model):
    with fold_once(model):
        total(model, X.double()).backward()
        raise KeyError


def test_an_exception_leaves_no_gradient_and_no_weight_behind():
    model = adapted()
    with pytest.raises(KeyError):
        stopped(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.step is None for _, layer in layers_of(model))


def stepping_inside(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with fold_once(model):
        total(model, X.double()).backward()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def test_an_optimizer_step_inside_the_block_is_found_out():
    with pytest.raises(RuntimeError, match=r"lambda or gamma changed since W' was made: call optimizer.step"):
        stepping_inside(adapted())


def test_blocks_do_not_nest_and_need_randlora_layers():
    model = adapted()
    with fold_once(model):
        with pytest.raises(ValueError, match="fold_once is active on this model already"):
            with fold_once(model):
                pass
        assert all(layer.step is not None for _, layer in layers_of(model))  # the outer one goes on
    for use in (lambda: fold_once(mlp()).__enter__(), lambda: set_plan(mlp(), "folded")):
        with pytest.raises(ValueError, match="the model has no RandLoRA layers: attach an adapter first"):
            use()


def test_second_derivatives_are_refused_where_gradients_are_only_summed():
    model, x = adapted(), X.double().requires_grad_()
    with fold_once(model):
        (grad,) = torch.autograd.grad(total(model, x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_without_gradients_a_block_keeps_the_weights_for_inference():
    model = adapted("Llama").eval()
    with torch.no_grad():
        want = model(TOKENS).logits
        with fold_once(model):
            torch.testing.assert_close(model(TOKENS).logits, want, **TOLERANCE["float64"])
            torch.testing.assert_close(model(TOKENS).logits, want, **TOLERANCE["float64"])


def test_every_plan_gives_the_same_loss_and_gradients():
    model = in_float64(adapted("Llama"))
    found = []
    for plan, keep in (("factored", False), ("folded", False), ("folded", True), ("auto", False)):
        set_plan(model, plan, keep_weight=keep)
        loss = loss_of(model)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], **TOLERANCE["float64"])
        torch.testing.assert_close(grads, found[0][1], **EXACT)


def test_a_plan_holds_for_layers_that_come_later_and_an_unknown_one_changes_nothing():
    model = get_peft_model(mlp(), config(["up"]))
    set_plan(model, "factored", keep_weight=True)
    with pytest.raises(ValueError, match=r"plan='fast' is not known: choose one of"):
        set_plan(model, "fast")
    model.add_adapter("second", config(["down"]))
    assert [(layer.plan, layer.keep_weight) for layer in (model.up, model.down)] == [("factored", True)] * 2


def kept_bytes(model):
    """Bytes that a forward pass keeps for backward beyond parameters, buffers and bases."""
    loss_of(model)  # from here on, the bases are as wide as the products
    held = [*model.parameters(), *model.buffers()]
    if hasattr(model, "randlora_A"):
        held += [*model.randlora_A._tensors.values(), *model.randlora_B._tensors.values()]
    own, kept = {tensor.untyped_storage().data_ptr() for tensor in held}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(kept.values())


def test_folded_layers_keep_their_inputs_and_keep_weight_keeps_the_weights_too():
    model = adapted("Llama", torch.float32)
    differentiated = [layer for path, layer in layers_of(model) if "layers.0.self_attn" not in path]  # in their inputs
    weights = sum(layer.base_layer.weight.nbytes for layer in differentiated)
    found = {}
    for plan, keep in (("factored", False), ("folded", False), ("folded", True)):
        set_plan(model, plan, keep_weight=keep)
        found[plan, keep] = kept_bytes(model)
    assert found["folded", False] == found["factored", False]
    assert found["folded", True] - found["folded", False] == weights


class More(nn.Linear):
    def forward(self, x):
        self.calls.append(1)
        return super().forward(x) + 1


@pytest.mark.parametrize("hook", ["forward hook", "forward replaced", "subclass"])
def test_a_base_layer_that_does_more_than_multiply_is_called(hook):
    model = adapted(dtype=torch.float32)
    set_plan(model, "folded")
    base, calls = model.up.base_layer, []
    if hook == "forward hook":
        base.register_forward_hook(lambda module, args, output: calls.append(1) or output + 1)
    elif hook == "forward replaced":
        base.forward = lambda x: calls.append(1) or nn.Linear.forward(base, x) + 1
    else:
        base.__class__ = type(
            "More", (nn.Linear,), {"forward": lambda self, x: calls.append(1) or nn.Linear.forward(self, x) + 1}
        )
    with torch.no_grad():
        want = nn.functional.linear(X, model.up.weight, base.bias) + 1
        torch.testing.assert_close(model.up(X), want, **TOLERANCE["float32", "forward"])
    assert calls == [1]


def test_many_steps_leave_no_memory_behind():
    model = adapted(dtype=torch.float32)

    def step():
        with fold_once(model):
            total(model, X).backward()
        model.zero_grad()
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    step()
    assert step() == step()


def test_twenty_steps_give_the_same_losses_in_every_plan_and_once_per_step():
    losses = {}
    for plan in ("factored", "folded", "auto", "once"):
        torch.manual_seed(0)
        model = get_peft_model(llama(), RandLoraConfig(r=4, target_modules=MODELS["Llama"][1]))
        set_plan(model, "auto" if plan == "once" else plan)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses[plan] = []
        for _ in range(20):
            with fold_once(model) if plan == "once" else contextlib.nullcontext():
                loss = model(TOKENS, labels=TOKENS).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[plan].append(loss.item())
    assert losses["factored"][0] - losses["factored"][-1] > 0.1
    for plan, values in losses.items():
        assert values == pytest.approx(losses["factored"], abs=1e-5), plan


def test_backward_within_autocast_multiplies_in_the_dtype_of_forward():
    model = randomize(get_peft_model(mlp(), config(["up", "down", "head"])))  # all that multiplies

    def gradients_within(context):
        with fold_once(model):
            loss = total(model, X)
            with context:
                loss.backward()
        return gradients(model)

    want = gradients_within(contextlib.nullcontext())
    got = gradients_within(torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(got, want, rtol=0, atol=0)

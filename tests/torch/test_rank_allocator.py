"""The allocator, its moment in training loops, and unfinished trainings that go on in another process."""

import copy

import numpy as np
import pytest
import torch
from crossing import cross
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import interop
from interop import AdaLoraConfig, AdapterFormatError
from randlora_torch import (
    AdaLoraCallback,
    AdaLoraLayer,
    RandLoraConfig,
    RankAllocator,
    extract,
    get_peft_model,
    load_adapter,
)
from randlora_torch.training_state import STATE_NAME
from tests.torch.conftest import TOKENS, X, assert_close, llama, load_llama, loss_of, mlp, output

SCHEDULE = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 3, "total_step": 12, "lora_alpha": 4}


def config(**fields):
    return AdaLoraConfig(**{**SCHEDULE, "target_modules": ["up", "down"], **fields})


def layers_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaLoraLayer)}


def adapted(seed=0, make=mlp, **fields):
    base = make()
    torch.manual_seed(seed)
    return get_peft_model(base, config(**fields))


class Run:
    """A training loop that can be left and taken up again."""

    def __init__(self, model, lr=3e-2):
        self.model = model.train()
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)

    def steps(self, first, last):
        allocations = []
        for step in range(first, last + 1):
            loss = loss_of(self.model) + self.model.orthogonal_loss()
            loss.backward()
            self.optimizer.step()
            allocations.append(self.model.update_and_allocate(step)["default"])
            self.optimizer.zero_grad()
        return allocations


def with_gradients(scores):
    """A model whose triplets get these scores, by layer, in the next step."""
    model = adapted(total_step=100, tinit=0, tfinal=10)
    for name, values in scores.items():
        layer = model.get_submodule(name)
        for part in layer.factors("default"):
            part.data.fill_(1.0)
            part.grad = torch.zeros_like(part)
        # After one step, importance and uncertainty are 0.15 g and 0.15 * 0.85 g of a gradient g.
        layer.lora_E["default"].grad[:, 0] = (torch.tensor(values) / (0.15 * 0.15 * 0.85)).sqrt()
    return model


def kept(model):
    return {name: list(rows) for name, rows in model.rankallocator.kept.items()}


def test_the_budget_falls_as_in_pefts_example_and_the_ranks_with_it():
    model = adapted(init_r=6, target_r=2, tinit=2, tfinal=3, total_step=12)
    found = Run(model).steps(1, 14)
    assert [allocation.budget for allocation in found] == [12, 12, 9, 6, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    assert [allocation.kept is not None for allocation in found] == [False] * 2 + [True] * 7 + [False] * 5
    assert [sum(map(sum, a.kept.values())) for a in found if a.kept is not None] == [9, 6, 5, 4, 4, 4, 4]
    assert sum(model.ranks().values()) == 4
    assert all((layer.lora_E["default"] != 0).sum() == model.ranks()[name] for name, layer in layers_of(model).items())


def test_the_least_important_triplets_of_all_layers_go():
    model = with_gradients({"up": [5.0, 1.0, 3.0, 4.0], "down": [2.0, 0.5, 7.0, 6.0]})
    allocator = RankAllocator(model, config(total_step=100, tinit=0, tfinal=10))
    assert allocator.budget(10) == 6
    allocator.update_and_allocate(model, 10)
    np.testing.assert_allclose(allocator.scores()["down"], [2.0, 0.5, 7.0, 6.0], rtol=1e-5)
    np.testing.assert_allclose(allocator.threshold, 1.0, rtol=1e-5)
    assert allocator.kept == {"up": (True, False, True, True), "down": (True, False, True, True)}
    for name, rows in allocator.kept.items():
        assert (model.get_submodule(name).lora_E["default"][:, 0] != 0).tolist() == list(rows)


def test_of_equal_scores_at_the_threshold_all_go():
    model = with_gradients({"up": [5.0, 1.0, 1.0, 4.0], "down": [1.0, 0.5, 7.0, 6.0]})
    allocation = model.update_and_allocate(10)["default"]
    assert allocation.budget == 6
    assert kept(model) == {"up": [True, False, False, True], "down": [False, False, True, True]}


def test_the_score_of_a_triplet_is_that_of_its_value_and_the_means_of_its_vectors():
    model = adapted()
    Run(model).steps(1, 2)
    allocator = model.rankallocator
    for name, (importances, uncertainties) in allocator.importance.items():
        A, E, B = (a * b for a, b in zip(importances, uncertainties, strict=True))
        want = [E[i, 0] + A[i].mean() + B[:, i].mean() for i in range(4)]
        torch.testing.assert_close(allocator.scores()[name], torch.stack(want), rtol=1e-5, atol=0)


def test_between_allocations_a_triplet_may_come_back_and_is_saved_while_it_is_there(tmp_path):
    model = adapted(deltaT=4, total_step=30)
    run = Run(model)
    run.steps(1, 8)
    at_allocation = model.ranks()
    assert sum(at_allocation.values()) < 8
    assert {
        name: int((layer.lora_E["default"] != 0).sum()) for name, layer in layers_of(model).items()
    } == at_allocation
    run.steps(9, 9)
    want = output(model)
    assert all((layer.lora_E["default"] != 0).all() for layer in layers_of(model).values())
    model.save_pretrained(tmp_path)
    assert_close(output(load_adapter(mlp(), tmp_path)), want)
    assert model.ranks() == at_allocation
    run.steps(10, 12)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(mlp(), tmp_path)
    assert loaded.ranks() == model.ranks()
    assert_close(output(loaded), output(model))
    assert sum(loaded.ranks().values()) < 8


def test_after_the_last_allocation_the_same_triplets_go_again_and_again():
    model = adapted()
    run = Run(model)
    run.steps(1, 9)
    final = kept(model)
    assert model.rankallocator.importance == {}
    for step in range(10, 16):
        run.steps(step, step)
        assert kept(model) == final
        for name, rows in final.items():
            E = model.get_submodule(name).lora_E["default"]
            assert (E[:, 0] != 0).tolist() == rows


def test_what_was_never_measured_is_not_taken_away():
    for step in (5, 9, 11):
        model = adapted().train()
        loss_of(model).backward()
        if step == 5:
            model.update_and_allocate(5)  # measures, then allocates
            continue
        with pytest.raises(
            ValueError, match=rf"step {step} takes 6 triplets away .* call update_and_allocate at every step"
        ):
            model.update_and_allocate(step)
        assert model.ranks() == {"up": 4, "down": 4}


def test_gradients_that_are_missing_or_not_finite():
    model = adapted().train()
    with pytest.raises(
        ValueError, match=r"adapter 'default' has no gradients: call update_and_allocate after loss\.backward"
    ):
        model.update_and_allocate(1)
    loss_of(model).backward()
    model.up.lora_A["default"].grad[0, 0] = torch.inf
    model.update_and_allocate(1)  # a step that a GradScaler passes over, too
    assert model.rankallocator.importance == {}
    model.up.lora_A["default"].grad = None
    model.down.lora_A["default"].grad.fill_(1)
    model.update_and_allocate(2)
    assert not model.rankallocator.importance["up"].exp_avg_ipt.A.any()
    assert model.rankallocator.importance["down"].exp_avg_ipt.A.all()


def test_adapters_in_half_precision_are_measured_in_float32():
    model = get_peft_model(mlp().bfloat16(), config(), autocast_adapter_dtype=False).train()
    assert model.up.lora_A["default"].dtype == torch.bfloat16
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 13):
        (model(X.bfloat16()).float().square().sum() + model.orthogonal_loss()).backward()
        optimizer.step()
        model.update_and_allocate(step)
        if step < 9:
            assert model.rankallocator.importance["up"].exp_avg_ipt.A.dtype == torch.float32
        optimizer.zero_grad()
    assert 0 < sum(model.ranks().values()) <= 2


def test_an_allocator_stands_alone_as_pefts_does():
    model = adapted().train()
    with pytest.raises(ValueError, match="no layer carries an AdaLoRA adapter called 'other'"):
        RankAllocator(model, config(), "other")
    allocator = RankAllocator(model, config(), "default")
    for step in range(1, 5):
        loss_of(model).backward()
        for p in model.parameters():
            p.data -= 1e-2 * (0 if p.grad is None else p.grad)
        allocator.update_and_allocate(model, step)
        model.zero_grad()
    twin = RankAllocator(model, config(), "default")
    twin.load_state_dict({key: value.clone() for key, value in allocator.state_dict().items()})
    assert (twin.step, twin.kept) == (4, allocator.kept)
    torch.testing.assert_close(twin.scores(), allocator.scores(), rtol=0, atol=0)


# Going on from a folder.


def state_of(run):
    tensors = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    return tensors, run.model.ranks(), run.model.peft_config["default"].rank_pattern


def assert_same_state(one, other):
    for a, b in zip(state_of(one), state_of(other), strict=True):
        if isinstance(a, dict) and a and torch.is_tensor(next(iter(a.values()))):
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
        else:
            assert a == b


@cross(stop=[1, 2, 5, 7, 8, 9, 10, 11], way=["load_adapter", "restore_adapter"], every=[3, 1])
def test_a_resumed_run_ends_at_the_bits_of_the_uninterrupted_one(tmp_path, way, stop, every):
    whole = Run(adapted(deltaT=every))
    whole.steps(1, 12)
    first = Run(adapted(deltaT=every))
    first.steps(1, stop)
    first.model.save_pretrained(tmp_path)
    if way == "load_adapter":
        model = load_adapter(mlp(), tmp_path, is_trainable=True)
    else:
        model = adapted(seed=9, deltaT=every)
        model.restore_adapter(tmp_path)
    second = Run(model)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert_same_state(first, second)
    second.steps(stop + 1, 12)
    assert_same_state(second, whole)


def test_a_run_that_was_resumed_from_a_pruned_adapter_is_resumed_exactly_too(tmp_path):
    def start():
        torch.manual_seed(3)
        return load_adapter(mlp(), tmp_path / "pruned", is_trainable=True)

    before = Run(adapted(total_step=20))
    before.steps(1, 5)
    before.model.save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned" / STATE_NAME).unlink()
    kept_at_first = before.model.ranks()
    whole, first = Run(start()), Run(start())
    assert whole.model.ranks() == kept_at_first != {"up": 4, "down": 4}
    whole.steps(6, 20)
    first.steps(6, 12)
    first.model.save_pretrained(tmp_path / "later")
    second = Run(load_adapter(mlp(), tmp_path / "later", is_trainable=True))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.steps(13, 20)
    assert_same_state(second, whole)
    pattern = whole.model.peft_config["default"].rank_pattern
    earlier = before.model.peft_config["default"].rank_pattern
    for name in pattern:
        assert len(pattern[name]) == 4
        assert all(old for old, new in zip(earlier[name], pattern[name], strict=True) if new)


def test_the_state_lies_beside_the_adapter_while_training_is_not_finished(tmp_path):
    run = Run(adapted())
    run.model.save_pretrained(tmp_path)
    assert not (tmp_path / STATE_NAME).exists()
    run.steps(1, 6)
    run.model.save_pretrained(tmp_path)
    assert (tmp_path / STATE_NAME).exists()
    want = output(run.model)
    assert_close(output(load_adapter(mlp(), tmp_path)), want)  # for inference, it is passed over
    assert load_adapter(mlp(), tmp_path).up.lora_A["default"].shape[0] == run.model.ranks()["up"]
    assert interop.load(tmp_path).config.rank("up") == run.model.ranks()["up"]
    run.steps(7, 12)
    run.model.save_pretrained(tmp_path)
    assert not (tmp_path / STATE_NAME).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_peft_passes_the_state_over(tmp_path):
    peft = pytest.importorskip("peft")
    run = Run(adapted())
    run.steps(1, 6)
    run.model.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(mlp(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(X), output(run.model))


def test_a_state_of_another_save_or_a_damaged_one_is_refused(tmp_path):
    run = Run(adapted())
    run.steps(1, 5)
    run.model.save_pretrained(tmp_path / "a")
    run.steps(6, 6)
    run.model.save_pretrained(tmp_path / "b")
    old = (tmp_path / "a" / STATE_NAME).read_bytes()
    (tmp_path / "b" / STATE_NAME).write_bytes(old)
    for attempt in (
        lambda: load_adapter(mlp(), tmp_path / "b", is_trainable=True),
        lambda: adapted().restore_adapter(tmp_path / "b"),
    ):
        with pytest.raises(AdapterFormatError, match="belongs to another save than the adapter beside it"):
            attempt()
    (tmp_path / "b" / STATE_NAME).write_bytes(old[: len(old) // 2])
    with pytest.raises(AdapterFormatError, match=r"is damaged .* delete it to go on from the adapter alone"):
        load_adapter(mlp(), tmp_path / "b", is_trainable=True)
    tensors = load_file(tmp_path / "a" / STATE_NAME)
    save_file({key: value for key, value in tensors.items() if not key.endswith("lora_E")}, tmp_path / "b" / STATE_NAME)
    with pytest.raises(AdapterFormatError, match="is damaged"):
        load_adapter(mlp(), tmp_path / "b", is_trainable=True)
    for changed, message in (
        ({"up.held": torch.tensor([3, 2, 1, 0])}, "not some of 0 to 3 in order"),
        ({"up.held": torch.tensor([0, 1, 2])}, r"up has shapes .* for 3 triplets"),
        ({"allocator.up.kept": torch.ones(3, dtype=torch.bool)}, r"up\.kept has another shape than \(4,\)"),
        ({"allocator.up.exp_avg_unc.B": torch.ones(2, 4)}, r"exp_avg_unc\.B has another shape"),
        ({"allocator.nowhere.kept": torch.ones(4)}, r"'nowhere\.kept'\] belong to no layer"),
        ({"allocator.step": torch.ones(2)}, "its step is no number"),
    ):
        save_file({**tensors, **changed}, tmp_path / "b" / STATE_NAME)
        with pytest.raises(AdapterFormatError, match=rf"is damaged \(.*{message}"):
            load_adapter(mlp(), tmp_path / "b", is_trainable=True)
    (tmp_path / "b" / STATE_NAME).unlink()
    again = Run(load_adapter(mlp(), tmp_path / "b", is_trainable=True))
    again.steps(7, 12)
    assert 0 < sum(again.model.ranks().values()) <= 2


def test_what_was_measured_is_forgotten_when_other_values_come_without_a_state():
    run, other = Run(adapted()), adapted(seed=3)
    run.steps(1, 5)
    assert sum(run.model.ranks().values()) < 8
    run.model.restore_adapter(extract(other))
    assert run.model.rankallocator.step is None
    assert run.model.rankallocator.importance == {}
    assert run.model.ranks() == {"up": 4, "down": 4}
    assert_close(output(run.model), output(other))


def test_a_frozen_adapter_leaves_no_state(tmp_path):
    run = Run(adapted())
    run.steps(1, 6)
    run.model.set_requires_grad("default", False)
    run.model.save_pretrained(tmp_path)
    assert not (tmp_path / STATE_NAME).exists()
    again = load_adapter(mlp(), tmp_path)
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_forgetting_to_allocate_is_said_when_the_trained_adapter_is_saved(tmp_path):
    model = adapted().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    with pytest.warns(
        UserWarning, match=r"ranks of adapter 'default' were never allocated, so all are 4: .*AdaLoraCallback"
    ):
        model.save_pretrained(tmp_path)


# Other people's loops.


def trainer(model, out, steps=12, **options):
    rows = [{"input_ids": row, "labels": row} for row in TOKENS] * 3
    common = {"learning_rate": 3e-2, "report_to": "none", "disable_tqdm": True}
    given = {
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": 4,
        "use_cpu": True,
        **common,
        **options,
    }
    arguments = TrainingArguments(str(out), dataloader_pin_memory=False, **given)
    return Trainer(model, arguments, train_dataset=rows, callbacks=[AdaLoraCallback()])


LLAMA = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted_llama(folder=None, kind="plain", seed=0, **fields):
    base = llama() if folder is None else load_llama(folder, kind)
    torch.manual_seed(seed)
    return get_peft_model(base, config(**{**LLAMA, **fields}))


def assert_equal_adapters(one, other):
    assert one.config.rank_pattern == other.config.rank_pattern is not None
    for name in one.factors:
        for a, b in zip(one.factors[name], other.factors[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_trainer_follows_the_schedule_and_resumes_to_the_same_bits(tmp_path, llama_folder, kind):
    model = adapted_llama(llama_folder, kind)
    whole = trainer(model, tmp_path)
    whole.train()
    assert 0 < sum(model.ranks().values()) <= 2
    assert model.rankallocator.step == 12
    for checkpoint, unfinished in (("checkpoint-4", True), ("checkpoint-8", True), ("checkpoint-12", False)):
        assert (tmp_path / checkpoint / STATE_NAME).exists() == unfinished
    again = adapted_llama(llama_folder, kind, seed=9)
    resumed = trainer(again, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal_adapters(extract(again), extract(model))


def test_a_trainer_that_accumulates_gradients_does_what_one_with_large_batches_does(tmp_path):
    common = {"save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0, "data_seed": 1}
    found = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = adapted_llama(orth_reg_weight=2.0)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        run = trainer(model, tmp_path, **options, **common)
        run.train()
        assert model.rankallocator.step == 12
        assert 0 < sum(model.ranks().values()) <= 4
        found.append([float(entry["loss"]) for entry in run.state.log_history if "loss" in entry])
    for losses in found[1:]:
        np.testing.assert_allclose(losses, found[0], rtol=1e-3)


def test_a_callback_without_its_model_or_its_time_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"makes 5 steps, but adapter 'default' reaches its ranks at step 9 .* total_step=5"
    ):
        trainer(adapted_llama(), tmp_path, steps=5).train()
    other = get_peft_model(llama(), RandLoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="a LlamaForCausalLM, carries no AdaLoRA adapter: attach one"):
        trainer(other, tmp_path).train()
    frozen = adapted_llama()
    frozen.set_requires_grad("default", False)
    with pytest.raises(ValueError, match="no adapter is in training"):
        AdaLoraCallback().on_train_begin(None, None, None, model=frozen)


def test_sfttrainer_takes_the_callback(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": TOKENS.tolist() * 3, "labels": TOKENS.tolist() * 3})
    common = {"max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 3e-2, "report_to": "none"}
    options = trl.SFTConfig(str(tmp_path), save_strategy="no", use_cpu=True, disable_tqdm=True, pad_token="a", **common)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b")
    model = adapted_llama()
    trl.SFTTrainer(
        model, options, train_dataset=data, processing_class=tokenizer, callbacks=[AdaLoraCallback()]
    ).train()
    assert model.rankallocator.step == 12
    assert 0 < sum(model.ranks().values()) <= 4

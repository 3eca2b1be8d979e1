"""The defects A1 to A12 of PEFT 0.21.2's AdaLoRA, each as a law that our stack keeps and PEFT breaks.

A law runs over both; the strict xfail proves that it sees the defect. All models are tiny.
"""

import warnings

import adalora_oracle
import numpy as np
import peft
import pytest
import torch
from defects import MLP, Stack, X, broken_in_peft, mlp
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import interop
import randlora_torch
from interop import AdaLoraConfig, SVDFactors
from randlora_torch.bases import to_numpy

pytestmark = pytest.mark.filterwarnings("ignore")
Failed = pytest.fail.Exception  # what pytest.raises raises if nothing was raised

OURS = Stack(
    "randlora", AdaLoraConfig, randlora_torch.get_peft_model, randlora_torch.load_adapter, randlora_torch.AdaLoraLayer
)
PEFT = Stack(
    "peft", peft.AdaLoraConfig, peft.get_peft_model, peft.PeftModel.from_pretrained, peft.tuners.adalora.AdaLoraLayer
)
SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 6}
TOKENS = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(9))


def law(reason, raises=AssertionError):
    return broken_in_peft(reason, raises, (OURS, PEFT))


def config(stack, **fields):
    return stack.Config(**{**SCHEDULE, "target_modules": ["lin0", "lin1"], **fields})


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=1, vocab_size=40, max_position_embeddings=16, initializer_range=0.2, **sizes)
    ).eval()


def llama_config(stack, **fields):
    return config(stack, **{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def update_and_allocate(stack, model, step):
    (model.base_model if stack.name == "peft" else model).update_and_allocate(step)


def loss_of(model):
    if any(name.endswith("lm_head") for name, _ in model.named_modules()):
        return model(input_ids=TOKENS, labels=TOKENS).loss
    return (model(X) - 1).square().mean()


def train(stack, model, steps=range(1, SCHEDULE["total_step"] + 1)):
    """Some steps of a training loop as PEFT's documentation has it."""
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=3e-2)
    for step in steps:
        loss_of(model).backward()
        optimizer.step()
        update_and_allocate(stack, model, step)
        optimizer.zero_grad()
    return model.eval()


def ranks(stack, model, name="default"):
    """How many triplets of each layer are not zero."""
    return {module: int((layer.lora_E[name] != 0).sum()) for module, layer in stack.layers(model).items()}


def pruned_folder(stack, make, given, folder):
    """An adapter that was trained to the end, saved by the stack itself; and its model."""
    model = train(stack, stack.attach(make(), given))
    model.save_pretrained(folder)
    return model


@law("A1, the loss of an adapter loaded for inference looks for a trainable one", AttributeError)
def test_a01_an_adapter_loaded_for_inference_gives_the_loss_of_labels_and_nothing_else(stack, tmp_path):
    pruned_folder(stack, llama, llama_config(stack), tmp_path)
    model = stack.load(llama(), tmp_path).eval()
    with torch.no_grad():
        output = model(input_ids=TOKENS, labels=TOKENS)
    logits = output.logits[:, :-1].reshape(-1, 40)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(logits, TOKENS[:, 1:].reshape(-1)))


@law("A1, regularization is added in eval mode, too")
def test_a01_the_regularization_is_part_of_the_loss_in_training_only(stack):
    model = stack.attach(llama(), llama_config(stack))  # dW = 0
    with torch.no_grad():
        base, evaluated = loss_of(llama()), loss_of(model.eval())
    torch.testing.assert_close(evaluated, base)
    assert loss_of(model.train()) > base + 0.5


@law("the regularization is left out of a model without a task type, and nothing says so")
def test_a01_the_regularization_does_not_depend_on_the_task_type(stack):
    losses = [
        loss_of(stack.attach(llama(), llama_config(stack, task_type=task)).train()) for task in (None, "CAUSAL_LM")
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)  # A and B are drawn anew


@law("A2, the budget is that of the unpruned layers", (RuntimeError, AssertionError))
def test_a02_training_goes_on_from_a_pruned_checkpoint(stack, tmp_path):
    given = config(stack, total_step=20)
    model = train(stack, stack.attach(mlp(), given), range(1, 7))
    before = ranks(stack, model)
    assert sum(before.values()) < 12
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("adalora_state*"):  # as PEFT leaves a folder
        file.unlink()
    again = stack.load(mlp(), tmp_path, is_trainable=True)
    assert ranks(stack, again) == before
    train(stack, again, range(7, 21))
    assert 0 < sum(ranks(stack, again).values()) <= 4


@law("A3, a target_r of init_r or more is found out in the first allocation", Failed)
def test_a03_a_target_that_ranks_cannot_fall_to_is_refused_at_construction(stack):
    with pytest.raises(ValueError, match="target_r=6: must be below init_r=6"):
        config(stack, target_r=6)


@law("A4, a gradient that is None is multiplied", TypeError)
def test_a04_allocating_after_the_gradients_were_cleared_is_refused_with_the_remedy(stack):
    model = stack.attach(mlp(), config(stack)).train()
    loss_of(model).backward()
    model.zero_grad()
    with pytest.raises(ValueError, match=r"call update_and_allocate after loss\.backward\(\) .* before zero_grad"):
        update_and_allocate(stack, model, 1)


@law("A4, a gradient that is None is multiplied", TypeError)
def test_a04_a_layer_that_took_no_part_counts_as_unimportant(stack):
    class Skips(MLP):
        def forward(self, x):
            return self.lin2(torch.relu(self.lin0(x)))

    model = stack.attach(mlp(kind=Skips), config(stack))
    train(stack, model)
    found = ranks(stack, model)
    assert found["lin1"] == 0
    assert 0 < found["lin0"] <= 4


@law("A5, adapters are told apart by a part of their names", (TypeError, AssertionError))
def test_a05_an_adapter_whose_name_begins_another_trains_alone(stack):
    model = stack.attach(mlp(), config(stack))
    waiting = config(stack, **({"inference_mode": True} if stack.name == "peft" else {}))
    model.add_adapter("default2", waiting)
    before = {name: layer.lora_A["default2"].clone() for name, layer in stack.layers(model).items()}
    model.set_adapter("default")
    train(stack, model)
    assert 0 < sum(ranks(stack, model).values()) <= 4
    for name, layer in stack.layers(model).items():
        torch.testing.assert_close(layer.lora_A["default2"], before[name], rtol=0, atol=0)


@law("A6, an adapter's name is cut out of the names of modules", KeyError)
def test_a06_an_adapter_may_be_called_like_a_module(stack, tmp_path):
    model = train(stack, stack.attach(mlp(), config(stack), "lin1"))
    model.save_pretrained(tmp_path)
    again = stack.load(mlp(), tmp_path / "lin1")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(X), model(X))


def with_an_empty_layer(stack, folder):
    """A folder of an adapter with a layer of rank 0, by the stack itself."""

    class Skips(MLP):
        def forward(self, x):
            return self.lin2(torch.relu(self.lin0(x))) + 0 * self.lin1(torch.relu(self.lin0(x))).sum()

    model = train(stack, stack.attach(mlp(kind=Skips), config(stack)))
    assert ranks(stack, model)["lin1"] == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return [str(warning.message) for warning in caught]


@law("A7, a tensor without numbers is taken for one that DeepSpeed did not gather")
def test_a07_a_layer_of_rank_0_is_saved_without_a_warning(stack, tmp_path):
    assert with_an_empty_layer(stack, tmp_path) == []
    sizes = {name: len(factors.E) for name, factors in interop.load(tmp_path).factors.items()}
    assert sizes["lin1"] == 0 < sizes["lin0"]


@law("A8, parameters on the meta device are indexed by a mask", NotImplementedError)
def test_a08_a_pruned_adapter_is_loaded_with_little_memory(stack, tmp_path):
    model = pruned_folder(stack, mlp, config(stack), tmp_path)
    again = stack.load(mlp(), tmp_path, low_cpu_mem_usage=True)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(X), model(X))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 2), groups=2)

    def forward(self, x):
        return self.conv(x)


@law("A9, the update of a grouped convolution has the size of an ungrouped one", RuntimeError)
def test_a09_a_grouped_convolution_is_adapted(stack):
    torch.manual_seed(0)
    x, base = torch.randn(2, 4, 5, 5), Grouped()
    model = stack.attach(base, config(stack, target_modules=["conv"], init_lora_weights=False))
    (layer,) = stack.layers(model).values()
    merged = nn.Conv2d(4, 6, (3, 2), groups=2, bias=False)
    with torch.no_grad():
        update = 6 / (6 + 1e-5) * layer.lora_B["default"] @ (layer.lora_A["default"] * layer.lora_E["default"])
        merged.weight.copy_(layer.base_layer.weight + update.reshape(merged.weight.shape))
        want = merged(x) + layer.base_layer.bias[:, None, None]
        torch.testing.assert_close(model.eval()(x), want)


QUANTIZATION = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def quantized(folder, kind, dtype=torch.float32):
    bnb = pytest.importorskip("randlora_torch.bnb")
    options = {"quantization_config": BitsAndBytesConfig(**QUANTIZATION[kind]), "device_map": "cpu"}
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    bnb.protect_from_repacking(model)
    return model


@law("A10, the rank is a tensor in float32, which makes the output one")
def test_a10_an_8_bit_layer_answers_in_the_dtype_of_its_base(stack, folder):
    model = stack.attach(quantized(folder, "8-bit", torch.bfloat16), llama_config(stack))
    layer = next(iter(stack.layers(model).values()))
    x = torch.randn(1, 3, 64, dtype=torch.bfloat16)
    assert layer.base_layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", QUANTIZATION)
@law("quantized layers do not merge", NotImplementedError)
def test_a10_quantized_layers_merge_and_unmerge(stack, folder, kind):
    model = stack.attach(quantized(folder, kind), llama_config(stack, init_lora_weights=False)).train()
    with torch.no_grad():
        for layer in stack.layers(model).values():
            layer.lora_E["default"].mul_(0.1)
        want, base = model(input_ids=TOKENS).logits, quantized(folder, kind).train()(input_ids=TOKENS).logits
        model.merge_adapter()
        merged = model(input_ids=TOKENS).logits
        model.unmerge_adapter()
        back = model(input_ids=TOKENS).logits
    assert (merged - want).norm() < 0.5 * (want - base).norm()
    torch.testing.assert_close(back, want, rtol=0, atol=0)


@law("A11, only one adapter of a model may train", ValueError)
def test_a11_two_adapters_train_at_once_each_to_its_own_ranks(stack):
    model = stack.attach(mlp(), config(stack))
    model.add_adapter("other", config(stack, init_r=4, target_r=1, target_modules=["lin1", "lin2"]))
    model.set_adapter(["default", "other"])
    train(stack, model)
    kept = {
        name: [layer.lora_E[name].ne(0).sum() for layer in stack.layers(model).values() if name in layer.lora_E]
        for name in ("default", "other")
    }
    assert 0 < sum(kept["default"]) <= 4
    assert 0 < sum(kept["other"]) <= 2


@law("A11, the Trainer does not call update_and_allocate, and nothing says so")
def test_a11_a_trainer_brings_the_ranks_to_their_target_or_says_that_it_did_not(stack, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 3e-2, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, use_cpu=True, **options)

    def trained(**more):
        model = stack.attach(llama(), llama_config(stack))
        Trainer(model, arguments, train_dataset=rows, **more).train()
        return model

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained().save_pretrained(tmp_path / "forgotten")
    assert any("ranks of adapter 'default' were never allocated" in str(warning.message) for warning in caught)
    with_callback = trained(callbacks=[randlora_torch.AdaLoraCallback()])
    assert 0 < sum(ranks(stack, with_callback).values()) <= 4


@law("A11, transformers' own add_adapter gives a model without update_and_allocate", AttributeError)
def test_a11_an_adapted_transformers_model_has_update_and_allocate(stack):
    model = llama()
    if stack.name == "peft":
        model.add_adapter(llama_config(stack))
    else:
        model = stack.attach(model, llama_config(stack))
    assert isinstance(model, LlamaForCausalLM)
    loss_of(model.train()).backward()
    model.update_and_allocate(1)


def test_a12_the_allocator_follows_the_formulas_by_hand_at_every_step():
    """PEFT's suite never calls `update_and_allocate` on a CPU; here a naive float64 loop says what it must do."""
    model = OURS.attach(mlp(), config(OURS, total_step=12, deltaT=2)).train()
    layers = OURS.layers(model)
    given = model.peft_config["default"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)

    def numbers(part=lambda parameter: parameter):
        return {
            name: SVDFactors(*(to_numpy(part(p)).astype(np.float64) for p in layer.factors("default")))
            for name, layer in layers.items()
        }

    state = adalora_oracle.start(numbers())
    for step in range(1, 14):
        loss_of(model).backward()
        optimizer.step()
        state, want = adalora_oracle.step(state, given, numbers(), numbers(lambda parameter: parameter.grad))
        model.update_and_allocate(step)
        for name, factors in numbers().items():
            np.testing.assert_allclose(factors.E, want[name].E, rtol=0, atol=0)
            allocator = model.rankallocator
            assert list(allocator.kept.get(name, (True,) * 6)) == state.mask[name]
            for got, wanted in zip(
                allocator.importance.get(name, ()), (state.ipt[name], state.unc[name]), strict=False
            ):
                for a, b in zip(got, wanted, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12)
        optimizer.zero_grad()
    assert sum(model.ranks().values()) == 4

"""Adapted models in two processes (gloo on the CPU): DDP, FSDP2 and the Trainer; and carried whole between processes.

`workers/parallel.py` runs once under torchrun, scenario after scenario; the tests look at what its processes found.
"""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interop
from interop import AdaLoraConfig, RandLoraConfig
from randlora_torch import RandLoraModel, extract, get_peft_model, load_adapter

WORKER = Path(__file__).with_name("workers") / "parallel.py"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH = torch.randint(40, (8, 6), generator=torch.Generator().manual_seed(2))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.2, **sizes))


def config(**fields):
    given = {"r": 3, "randlora_alpha": 1, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    return RandLoraConfig(init_weights=False, **given)  # r = 3 does not divide evenly among two processes


def adapted(**fields):
    torch.manual_seed(1)
    model = get_peft_model(llama(), config(**fields))
    model.add_adapter("unused", config(projection_prng_key=5))
    return model


def with_adalora():
    torch.manual_seed(1)
    schedule = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 4}
    return get_peft_model(llama(), AdaLoraConfig(**schedule, target_modules=["q_proj", "down_proj"])).train()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder that the processes wrote to, and by scenario what each of them found."""
    folder = tmp_path_factory.mktemp("parallel")
    models = {"ddp": adapted(), "once": adapted(), "fsdp": adapted(modules_to_save=["lm_head"]), "trainer": adapted()}
    models["adalora"] = with_adalora()
    for scenario, model in models.items():
        torch.save(model, folder / f"{scenario}.pt")
    torch.save(BATCH, folder / "batch.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, WORKER, folder], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in models}


@pytest.fixture(scope="module")
def ddp(found):
    return found[0], found[1]["ddp"]


@pytest.fixture(scope="module")
def fsdp(found):
    return found[0], found[1]["fsdp"]


@pytest.fixture(scope="module")
def alone():
    """One process on the whole batch: the mean of its halves' mean losses is its own, all rows being equally long."""
    return by_one_process(adapted())


def by_one_process(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=BATCH, labels=BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, torch.stack(losses), trainable(model)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_two_processes_with_half_a_batch_each_train_as_one_with_all_of_it(ddp, alone):
    _, (first, second) = ddp
    _, losses, want = alone
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, losses, **CLOSE)
    torch.testing.assert_close(first["trainable"], want, **CLOSE)
    assert losses[-1] < losses[0] - 0.05


def test_micro_batches_over_one_weight_train_under_ddp_as_one_process_does(found, alone):
    for process in found[1]["once"]:
        torch.testing.assert_close(process["trainable"], alone[2], **CLOSE)
        assert "parameters are sharded, so no W' can be kept whole: leave fold_once out" in process["sharded"]


def test_ddp_keeps_the_factors_of_all_processes_equal_from_the_start(ddp):
    _, (first, second) = ddp  # the second process started from other values
    torch.testing.assert_close(first["trainable"], second["trainable"], rtol=0, atol=0)


def test_ddp_neither_broadcasts_nor_synchronizes_the_bases(ddp):
    for found in ddp[1]:
        assert not found["bases are synchronized"]
        assert found["unused bases stayed"]  # the second process had changed its own


def test_only_the_main_process_writes(ddp):
    folder, (first, _) = ddp
    assert not (folder / "ddp-saved-by-1").exists()
    assert (folder / "ddp-saved-by-0" / "unused" / "adapter_config.json").exists()
    saved = load_adapter(llama(), folder / "ddp-saved-by-0", is_trainable=True)
    torch.testing.assert_close(trainable(saved), first["trainable"], rtol=0, atol=0)


def test_processes_that_share_their_gradients_keep_the_same_triplets(found):
    first, second = found[1]["adalora"]
    torch.testing.assert_close(first["trainable"], second["trainable"], rtol=0, atol=0)
    assert first["pattern"] == second["pattern"] is not None
    model = with_adalora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 9):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert model.peft_config["default"].rank_pattern == first["pattern"]
    torch.testing.assert_close(first["trainable"], trainable(model), rtol=1e-3, atol=1e-4)


def test_sharded_triplets_are_refused_by_name(found):
    for process in found[1]["adalora"]:
        for what in ("loss", "step"):
            assert "are sharded, and AdaLoRA needs them whole: train with DDP" in process[what]


@pytest.fixture(scope="module")
def alone_with_head():
    return by_one_process(adapted(modules_to_save=["lm_head"]))


def test_a_sharded_model_trains_as_one_process_does(fsdp, alone_with_head):
    _, (first, second) = fsdp
    _, losses, want = alone_with_head
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, losses, **CLOSE)
    for found in (first, second):
        torch.testing.assert_close(found["trainable"], want, **CLOSE)
        assert found["all parameters are sharded"]


def test_fsdp_leaves_the_bases_whole(fsdp):
    assert all(found["bases are whole"] for found in fsdp[1])


def test_all_processes_saving_a_sharded_model_write_one_complete_adapter(fsdp):
    folder, (first, second) = fsdp
    assert not (folder / "fsdp-saved-by-1").exists()
    adapter = interop.load(folder / "fsdp-saved-by-0")
    assert len(adapter.modules) == 6
    saved = load_adapter(llama(), folder / "fsdp-saved-by-0", is_trainable=True)
    torch.testing.assert_close(trainable(saved), first["trainable"], rtol=0, atol=0)
    with torch.no_grad():
        want = torch.cat([first["logits"], second["logits"]])
        torch.testing.assert_close(saved(BATCH).logits, want, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_restored_into_a_sharded_model(fsdp):
    for found in fsdp[1]:
        torch.testing.assert_close(found["restored"], found["trainable"], rtol=0, atol=0)
        assert found["still sharded"]
        assert any(not torch.equal(found["moved"][name], found["trainable"][name]) for name in found["moved"])


def test_merging_into_a_sharded_weight_is_refused(fsdp):
    for found in fsdp[1]:
        assert "its weight is sharded. Load the whole model on one device" in found["merging"]


def test_with_the_gathered_parameters_given_one_process_saves_alone(fsdp):
    folder, (first, _) = fsdp
    assert first["saved alone"] == "saved"
    saved = load_adapter(llama(), folder / "saved-alone", is_trainable=True)
    torch.testing.assert_close(trainable(saved), first["trainable"], rtol=0, atol=0)


def test_an_adapter_that_comes_after_the_sharding_is_refused_or_kept_equal(fsdp):
    first, second = (found["attached late"] for found in fsdp[1])
    if isinstance(first, str):
        assert "sharded" in first
    else:
        torch.testing.assert_close(first, second, **CLOSE)


def test_the_trainer_in_two_processes_writes_once_and_resumes_to_the_same_bits(found):
    folder, (first, second) = found[0], found[1]["trainer"]
    for each in (first, second):
        torch.testing.assert_close(each["again"], each["out"], rtol=0, atol=0)
    torch.testing.assert_close(first["out"], second["out"], rtol=0, atol=0)
    start = trainable(adapted())
    assert all(not torch.equal(first["out"][name], start[name]) for name in start)
    saved = load_adapter(llama(), folder / "out" / "checkpoint-4", is_trainable=True)
    torch.testing.assert_close(trainable(saved), first["out"], rtol=0, atol=0)


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file])
def test_a_model_carried_whole_is_the_same_and_trains_apart(carry):
    model = adapted(modules_to_save=["lm_head"])
    again = carry(model)
    assert type(again) is type(model)
    assert isinstance(again, RandLoraModel)
    with torch.no_grad():
        want = model(BATCH).logits
        torch.testing.assert_close(again(BATCH).logits, want, rtol=0, atol=0)
    layers = [again.model.layers[i].mlp.down_proj for i in range(2)]
    assert layers[0].randlora_B is layers[1].randlora_B is again.randlora_B  # one copy of its own, shared
    assert again.randlora_B["default"].data_ptr() != model.randlora_B["default"].data_ptr()
    by_one_process(again, steps=1)
    with torch.no_grad():
        torch.testing.assert_close(model(BATCH).logits, want, rtol=0, atol=0)
        assert not torch.equal(again(BATCH).logits, want)
    again.set_adapter("unused")
    assert model.active_adapters == ["default"]
    assert extract(again, "unused").modules == extract(model, "unused").modules

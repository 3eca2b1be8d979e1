"""Adapted models in the training loops of others: transformers' Trainer, TRL's SFTTrainer, accelerate."""

import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import interop
from interop import RandLoraConfig
from randlora_torch import FoldOnceCallback, extract, get_peft_model, load_adapter
from randlora_torch.step import StepWeight

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
WORKERS = Path(__file__).with_name("workers")

LINES = [
    "the adapter is small and the base is frozen",
    "the base is large and stays as it is",
    "two small factors scale a random basis",
    "a random basis is drawn once from a seed",
    "the seed stands in the file of the adapter",
    "the file is read again and nothing is lost",
]
STEPS = 6
HOSTS = [(host, kind) for host in ("Trainer", "SFTTrainer") for kind in ("plain", "nf4")]
every_host = pytest.mark.parametrize("finished", HOSTS, ids=["-".join(host) for host in HOSTS], indirect=True)
every_base = pytest.mark.parametrize("kind", ["plain", "nf4"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama as a user has it: config, weights and a tokenizer in one folder."""
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "</s>"]))
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    heads = {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(initializer_range=0.2, **sizes, **heads, **ids)).save_pretrained(folder)
    return folder


def load_base(folder, kind="plain"):
    if kind == "plain":
        return AutoModelForCausalLM.from_pretrained(folder)
    options = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")


CONFIG = {"r": 8, "randlora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def config(**fields):
    return RandLoraConfig(**{**CONFIG, **fields})


def adapted(folder, kind="plain", name="default", **fields):
    return get_peft_model(load_base(folder, kind), config(**fields), name)


def rows(folder):
    """Six examples of equal length, for a Trainer without a tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [tokenizer(line)["input_ids"][:7] for line in LINES]
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(out):
    common = {"output_dir": str(out), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 3e-2}
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "report_to": "none"}
    return {**common, **saving, "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}


def trainer_for(model, folder, out, host="Trainer", **options):
    given = {**arguments(out), **options}
    if host == "Trainer":
        data = rows(folder)
        return Trainer(model, TrainingArguments(**given), train_dataset=data, eval_dataset=data[:2])
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": LINES})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return trl.SFTTrainer(model, trl.SFTConfig(**given), train_dataset=data, processing_class=tokenizer)


def factors(model, name="default"):
    """Copies of all that an adapter trains, by name."""
    adapter = extract(model, name)
    pairs = {f"{layer}.{part}": getattr(pair, part) for layer, pair in adapter.factors.items() for part in pair._fields}
    return {key: tensor.detach().clone() for key, tensor in (pairs | adapter.saved_weights).items()}


def frozen(model):
    """Copies of everything that no adapter trains: packed weights and their quantization too."""
    state = model.state_dict()
    return {key: value.clone() for key, value in state.items() if "randlora_" not in key}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def differ(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(3, 15)[None]).logits.float()


@torch.no_grad()
def mean_loss(model, folder):
    ids = torch.tensor([row["input_ids"] for row in rows(folder)])
    return model.eval()(ids, labels=ids).loss.item()


class Finished:
    """One uninterrupted training, which several tests look at."""

    def __init__(self, host, kind, folder, out):
        self.host, self.kind, self.folder, self.out = host, kind, folder, out
        self.model = adapted(folder, kind, randlora_dropout=0.1)
        self.base_before, self.start = frozen(self.model), factors(self.model)
        self.loss_before = mean_loss(self.model, folder)
        self.trainer = trainer_for(self.model, folder, out, host)
        self.trainer.train()


@pytest.fixture(scope="module")
def finished(request, folder, tmp_path_factory):
    if request.param not in _finished:
        _finished[request.param] = Finished(*request.param, folder, tmp_path_factory.mktemp("-".join(request.param)))
    return _finished[request.param]


_finished = {}  # trainings are shared by tests, and pytest forgets all but the last parameter of a fixture


@every_host
def test_training_lowers_the_loss_and_leaves_every_frozen_bit_alone(finished):
    found = losses(finished.trainer)
    assert len(found) == STEPS
    assert all(map(math.isfinite, found))
    assert mean_loss(finished.model, finished.folder) < 0.8 * finished.loss_before
    assert_same(frozen(finished.model), finished.base_before)
    quantized_by_trl = (finished.host, finished.kind) == ("SFTTrainer", "nf4")
    dtypes = {parameter.dtype for parameter in finished.model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.bfloat16 if quantized_by_trl else torch.float32}  # TRL converts them, after QLoRA's paper


@every_host
def test_a_checkpoint_holds_the_adapter_and_no_weights_of_the_model(finished):
    checkpoints = sorted(path.name for path in finished.out.iterdir() if path.is_dir())
    assert checkpoints == [f"checkpoint-{step}" for step in range(2, STEPS + 1, 2)]
    names = {path.name for path in (finished.out / "checkpoint-2").iterdir()}
    of_trainer = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    of_tokenizer = {"tokenizer.json", "tokenizer_config.json"} if finished.host == "SFTTrainer" else set()
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | of_trainer | of_tokenizer
    adapter = interop.load(finished.out / f"checkpoint-{STEPS}")
    assert len(adapter.modules) == 6
    assert (finished.out / "checkpoint-2" / "adapter_model.safetensors").stat().st_size < 200_000


@every_host
def test_resuming_with_a_fresh_model_and_trainer_ends_at_the_same_bits(finished, tmp_path):
    model = adapted(finished.folder, finished.kind, randlora_dropout=0.1)
    trainer = trainer_for(model, finished.folder, tmp_path, finished.host)
    trainer.train(resume_from_checkpoint=str(finished.out / "checkpoint-2"))
    assert trainer.state.global_step == STEPS
    assert_same(factors(model), factors(finished.model))
    assert differ(factors(model), finished.start)
    assert losses(trainer)[2:] == losses(finished.trainer)[2:]


@every_host
def test_what_the_trainer_saves_loads_in_peft_with_the_same_logits(finished, tmp_path):
    finished.trainer.save_model(tmp_path)
    assert not list(tmp_path.glob("model*"))
    want = logits(load_adapter(load_base(finished.folder), tmp_path))
    got = logits(peft.PeftModel.from_pretrained(load_base(finished.folder), tmp_path))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if (finished.host, finished.kind) == ("Trainer", "plain"):
        torch.testing.assert_close(want, logits(finished.model), rtol=0, atol=0)
    assert (want - logits(load_base(finished.folder))).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("plain", "new"), ("nf4", "loaded")])
def test_a_users_script_resumes_in_a_process_of_its_own(kind, how, folder, tmp_path):
    """The Trainer is imported only after the adapter is attached, as a script may well do."""
    uninterrupted = adapted(folder, kind)
    trainer_for(uninterrupted, folder, tmp_path / "out").train()
    given = {"config": CONFIG, "rows": rows(folder), "arguments": arguments(tmp_path / "again")}
    places = {"folder": folder, "checkpoint": tmp_path / "out" / "checkpoint-2", "out": tmp_path / "resumed"}
    job = {"kind": kind, "how": how, **given, **{name: str(path) for name, path in places.items()}}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, WORKERS / "resume.py", tmp_path / "job.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = load_adapter(load_base(folder, kind), tmp_path / "resumed")
    assert_same(factors(resumed), factors(uninterrupted))


def test_the_best_checkpoint_is_loaded_at_the_end(folder, tmp_path):
    model, scores = adapted(folder), itertools.cycle([1.0, 3.0, 2.0])
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = trainer_for(model, folder, tmp_path, eval_strategy="steps", eval_steps=2, **choice)
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert_same(factors(model), factors(load_adapter(load_base(folder), tmp_path / "checkpoint-4")))
    assert differ(factors(model), factors(load_adapter(load_base(folder), tmp_path / "checkpoint-6")))


def with_three_adapters(folder, seed):
    """Two adapters that train, of different r and targets, and one that only waits."""
    torch.manual_seed(seed)
    model = adapted(folder, init_weights=False)
    model.add_adapter("second", config(r=5, target_modules=["o_proj", "v_proj"], init_weights=False))
    model.add_adapter("waiting", config(r=4, sparse=True, target_modules=["up_proj"], init_weights=False))
    model.set_adapter(["default", "second"])
    return model


def test_several_adapters_are_saved_in_folders_of_their_names_and_all_are_restored(folder, tmp_path):
    model = with_three_adapters(folder, seed=1)
    start = {name: factors(model, name) for name in model.randlora_adapters}
    trainer_for(model, folder, tmp_path / "out", learning_rate=1e-3).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    held = {path.parent.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("adapter_model.safetensors")}
    assert held == {".", "second", "waiting"}
    assert not list(checkpoint.rglob("model.safetensors"))
    again = with_three_adapters(folder, seed=2)  # other starting values, which restoring must replace
    trainer_for(again, folder, tmp_path / "again", learning_rate=1e-3).train(resume_from_checkpoint=str(checkpoint))
    assert again.active_adapters == ["default", "second"]
    for name in start:
        assert_same(factors(again, name), factors(model, name))
        assert differ(factors(model, name), start[name]) == (name != "waiting")


def test_an_adapter_of_another_name_is_saved_in_its_folder_and_restored(folder, tmp_path):
    model = adapted(folder, name="chat")
    trainer_for(model, folder, tmp_path / "out").train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert (checkpoint / "chat" / "adapter_model.safetensors").exists()
    again = adapted(folder, name="chat")
    trainer_for(again, folder, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert_same(factors(again, "chat"), factors(model, "chat"))


def test_trained_modules_are_resumed_along(folder, tmp_path):
    model = adapted(folder, modules_to_save=["lm_head"])
    base = frozen(load_base(folder))
    trainer_for(model, folder, tmp_path / "out").train()
    again = adapted(folder, modules_to_save=["lm_head"])
    trainer_for(again, folder, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    trained = factors(again)
    assert_same(trained, factors(model))
    assert not torch.equal(trained["base_model.model.lm_head.weight"], base["lm_head.weight"])


class Regression(nn.Module):
    """A model that transformers knows nothing about, with a loss as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 1)

    def forward(self, x, labels):
        return {"loss": (self.down(torch.relu(self.up(x))).squeeze(-1) - labels).square().mean()}


def regression_trainer(model, out):
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(12, generator=generator), "labels": torch.tensor(float(i))} for i in range(6)]
    saving = {"max_steps": 4, "save_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    batch = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "remove_unused_columns": False}
    return Trainer(model, TrainingArguments(output_dir=out, **saving, **batch), train_dataset=data)


def test_training_an_adapted_module_of_ones_own_resumes_too(tmp_path):
    def model():
        return get_peft_model(Regression(), config(r=4, target_modules=["up", "down"]))

    first, again = model(), model()
    regression_trainer(first, tmp_path / "out").train()
    regression_trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same(factors(again), factors(first))


def ordinary(folder, peft_adapter):
    model = load_base(folder)
    if not peft_adapter:
        return model
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("peft_adapter", [False, True], ids=["a whole model", "PEFT's LoRA"])
def test_models_without_our_adapters_are_saved_and_resumed_as_before(peft_adapter, folder, tmp_path):
    adapted(folder)  # from here on, the Trainer of this process is taught
    assert hasattr(Trainer._load_from_checkpoint, "_restores")
    model, again = ordinary(folder, peft_adapter), ordinary(folder, peft_adapter)
    trainer_for(model, folder, tmp_path / "out", learning_rate=1e-3).train()
    file = "adapter_model.safetensors" if peft_adapter else "model.safetensors"
    assert (tmp_path / "out" / "checkpoint-2" / file).exists()
    resumed = trainer_for(again, folder, tmp_path / "again", learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same(again.state_dict(), model.state_dict())


def test_an_unpickled_model_resumes_where_nothing_else_taught_the_trainer(folder, tmp_path, monkeypatch):
    model, checkpoint = adapted(folder), tmp_path / "out" / "checkpoint-2"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    trainer_for(model, folder, tmp_path / "out").train()
    for method in ("_load_from_checkpoint", "_load_best_model"):  # as they are in a process that attached no adapter
        monkeypatch.setattr(Trainer, method, getattr(Trainer, method).__wrapped__)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    trainer_for(again, folder, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert_same(factors(again), factors(model))


def gradients(model, folder, checkpointing=None):
    torch.manual_seed(0)  # of the dropout, which the recomputation must repeat
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    ids = torch.tensor([row["input_ids"] for row in rows(folder)])
    model.train()(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("host", "kind", "clip"),
    [("Trainer", "plain", 0.0), ("Trainer", "plain", 1e-3), ("SFTTrainer", "plain", 1.0), ("SFTTrainer", "nf4", 1.0)],
)
def test_the_callback_folds_once_per_step_and_trains_as_without_it(host, kind, clip, folder, tmp_path, monkeypatch):
    made, make = [], StepWeight.__init__
    monkeypatch.setattr(StepWeight, "__init__", lambda *args: made.append(1) or make(*args))
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "max_grad_norm": clip,
    }
    options.update(optim="sgd", learning_rate=1e-2, save_strategy="no", bf16=False)
    found = {}
    for callbacks in ((FoldOnceCallback(),), ()):
        torch.manual_seed(0)
        model = adapted(folder, kind, init_weights=False)
        start = factors(model)
        trainer = trainer_for(model, folder, tmp_path / str(len(callbacks)), host, **options)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()  # six examples: the second step of an epoch has two micro-batches instead of four
        logged = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        moved = torch.cat([(value - start[name]).flatten() for name, value in factors(model).items()])
        found[len(callbacks)] = (logged, moved)
    assert len(made) == 3 * 6
    bound = 0.5 if kind == "nf4" else 1e-3  # 4-bit layers compute in bfloat16, folded or not
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=bound / 4)
    assert (found[1][1] - found[0][1]).norm() < bound * found[0][1].norm()


@every_base
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_gradients_that_it_would_be_without(use_reentrant, kind, folder, factored):
    def model():
        torch.manual_seed(3)
        return adapted(folder, kind, init_weights=False, randlora_dropout=0.3)

    checkpointed, kept = model(), model()
    got, want = gradients(checkpointed, folder, {"use_reentrant": use_reentrant}), gradients(kept, folder)
    assert checkpointed.is_gradient_checkpointing
    assert len(want) == 12
    assert all(grad is not None and grad.abs().max() > 0 for grad in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


@every_base
def test_training_in_bfloat16_autocast_lowers_the_loss_and_keeps_float32_factors(kind, folder, tmp_path):
    model = adapted(folder, kind)
    before = mean_loss(model, folder)
    trainer_for(model, folder, tmp_path, bf16=True, max_steps=12, save_strategy="no").train()
    assert mean_loss(model, folder) < 0.5 * before
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


@every_base
def test_accelerate_trains_unwraps_saves_and_restores_its_state(kind, folder, tmp_path):
    ids = torch.tensor([row["input_ids"] for row in rows(folder)])

    def prepared():
        model = adapted(folder, kind)
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def step(accelerator, model, optimizer):
        loss = model.train()(ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    first = accelerator, model, _ = prepared()
    found = [step(*first) for _ in range(3)]
    accelerator.save_state(tmp_path / "state")
    found += [step(*first) for _ in range(3)]
    assert found[-1] < 0.8 * found[0]
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "adapter", save_function=accelerator.save)
    saved = load_adapter(load_base(folder, kind), tmp_path / "adapter")
    assert_same(factors(saved), factors(accelerator.unwrap_model(model)))
    second = prepared()
    # bitsandbytes writes quantization states into the state dict that it does not take back: with PEFT it is the same.
    second[0].load_state(tmp_path / "state", **({} if kind == "plain" else {"strict": False}))
    assert [step(*second) for _ in range(3)] == found[3:]
    assert_same(factors(second[1]), factors(saved))

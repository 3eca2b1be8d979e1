"""Batches whose rows use different adapters: `adapter_names` in calls and in `generate`."""

import pytest
import torch
from crossing import cross
from torch import nn

from randlora_torch import RandLoraLayer, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    MODELS,
    assert_close,
    assert_same,
    config,
    load_llama,
    mlp,
    randomize,
    relative_error,
)

ROWS = ["a", "__base__", "b", "a", "b"]
TOKENS = torch.randint(1, 40, (5, 6), generator=torch.Generator().manual_seed(4))
INPUTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))


def company(kind="Llama", first=None, second=None, model=None):
    """A model with the adapters "a" and "b", which differ in all they may differ in; "a" is active."""
    make, targets, _, _ = MODELS[kind]
    model = randomize(get_peft_model(model or make(), config(targets, **(first or {})), "a"), "a")
    get_peft_model(model, config(targets[:1], r=2, sparse=True, projection_prng_key=3, **(second or {})), "b")
    randomize(model, "b", seed=1)
    model.set_adapter("a")
    return model.eval()


def logits(model, rows=slice(None), **options):
    with torch.no_grad():
        if isinstance(model, PLAIN):
            return model(INPUTS[rows], **options)
        return model(TOKENS[rows], **options).logits


PLAIN = type(mlp())


def row_by_row(model, names=ROWS):
    """The logits of each row alone, with its own adapter set."""
    found = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                found.append(logits(model, slice(i, i + 1)))
        else:
            model.set_adapter(name)
            found.append(logits(model, slice(i, i + 1)))
    model.set_adapter("a")
    return torch.cat(found)


@pytest.mark.parametrize("kind", MODELS)
def test_each_row_is_computed_with_its_own_adapter(kind):
    model = company(kind)
    want = row_by_row(model)
    alone = logits(model)
    assert_close(logits(model, adapter_names=ROWS), want)
    others = ["b", "__base__", "b", "__base__", "a"]
    assert_close(logits(model, adapter_names=others), row_by_row(model, others))
    assert min(relative_error(alone[i], want[i]) for i in (1, 2)) > 0.01
    assert_same(logits(model), alone)
    assert all(module.rows is None for module in model.modules() if isinstance(module, RandLoraLayer))


def test_which_adapters_are_active_or_their_order_in_the_batch_does_not_matter():
    model = company()
    want = logits(model, adapter_names=ROWS)
    for active in ("b", ["a", "b"], []):
        model.set_adapter(active)
        assert_same(logits(model, adapter_names=ROWS), want)
    model.set_adapter("a")
    assert_close(logits(model, adapter_names=["a"] * 5), logits(model))
    with model.disable_adapter():
        base = logits(model)
    assert_same(logits(model, adapter_names=["__base__"] * 5), base)


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_quantized_and_half_precision_models_too(llama_folder, kind, dtype):
    pytest.importorskip("bitsandbytes")
    model = company(model=load_llama(llama_folder, kind, dtype))
    got, want = logits(model, adapter_names=ROWS), row_by_row(model)
    assert got.dtype == dtype
    assert relative_error(got, want) < (1e-5 if (kind, dtype) == ("plain", torch.float32) else 2e-2)


SAVED = {
    "one has a head of its own": ({"modules_to_save": ["head"]}, {}),
    "both have": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
    "different modules": ({"modules_to_save": ["head"]}, {"modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("saved", SAVED)
def test_rows_use_the_trained_modules_of_their_adapters(saved):
    model = company("MLP", *SAVED[saved])
    want = row_by_row(model)
    assert_close(logits(model, adapter_names=ROWS), want)
    model.set_adapter("b")
    assert_close(logits(model, adapter_names=ROWS), want)


def test_rows_use_the_embeddings_and_the_output_layers_of_their_adapters():
    fields = {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = company("Llama", fields, {"modules_to_save": ["embed_tokens"]})
    assert_close(logits(model, adapter_names=ROWS), row_by_row(model))


def generated(model, rows=slice(None), **options):
    ids = TOKENS[rows]
    mask = torch.ones_like(ids)
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, **options)


GENERATED = {
    "Llama": ("Llama", {}),
    "GPT-2": ("GPT-2", {}),
    "Llama with modules": ("Llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
}
WAYS = {"greedy": {}, "beams": {"num_beams": 2}, "sequences": {"num_beams": 3, "num_return_sequences": 2}}


@cross(model=GENERATED, options=WAYS)
def test_each_row_is_generated_with_its_own_adapter(model, options):
    kind, fields = model
    model = company(kind, fields, {"modules_to_save": fields["modules_to_save"][:1]} if fields else {})
    per_row = options.get("num_return_sequences", 1)
    want = []
    for i, name in enumerate(ROWS):
        if name == "__base__":
            with model.disable_adapter():
                want.append(generated(model, slice(i, i + 1), **options))
        else:
            model.set_adapter(name)
            want.append(generated(model, slice(i, i + 1), **options))
    want = torch.cat(want)
    model.set_adapter("a")
    got = generated(model, adapter_names=ROWS, **options)
    assert_same(got, want)
    assert got.shape[0] == per_row * len(ROWS)
    assert not torch.equal(got, generated(model, **options))


def test_what_cannot_be_a_mixed_batch_is_refused_and_the_model_goes_on_working():
    model = company("MLP")
    want = logits(model)
    refused = r"adapter_names works for inference with adapters enabled and unmerged: call model\.eval\(\),"
    with pytest.raises(ValueError, match=r"adapter_names has 3 entries for a batch of 5 rows: pass one per row\."):
        logits(model, adapter_names=["a", "b", "a"])
    with pytest.raises(ValueError, match=r"adapter 'c' is not attached: the model has \['a', 'b'\]\."):
        logits(model, adapter_names=["a", "b", "c", "a", "b"])
    with pytest.raises(ValueError, match=refused):
        logits(model.train(), adapter_names=ROWS)
    model.eval().merge_adapter(["a"])
    with pytest.raises(ValueError, match=refused):
        logits(model, adapter_names=ROWS)
    model.unmerge_adapter()
    model.disable_adapter_layers()
    with pytest.raises(ValueError, match=refused):
        logits(model, adapter_names=ROWS)
    model.enable_adapter_layers()
    assert_same(logits(model), want)


def test_adapters_that_train_biases_cannot_share_a_batch():
    model = company("MLP", {"bias": "all"})
    with pytest.raises(
        ValueError, match=r"adapter 'a' trains biases, which cannot differ between the rows of a batch\."
    ):
        logits(model, adapter_names=ROWS)


def test_rows_of_other_adapters_do_not_get_the_biases_of_the_active_one():
    model = company("MLP", {"bias": "all"})
    rows = ["b", "__base__", "b", "b", "__base__"]
    assert_close(logits(model, adapter_names=rows), row_by_row(model, rows))


def test_an_empty_list_of_names_is_refused():
    with pytest.raises(ValueError, match="adapter_names has 0 entries for a batch of 5 rows"):
        logits(company("MLP"), adapter_names=[])


def test_a_call_with_fewer_names_than_rows_is_refused_also_if_they_divide():
    with pytest.raises(ValueError, match=r"adapter_names has 2 entries for a batch of 4 rows"):
        logits(company("MLP"), slice(4), adapter_names=["a", "b"])


def test_a_trained_module_that_is_called_by_keyword_serves_mixed_batches():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(input=self.up(x))

    model = randomize(get_peft_model(Keywords(), config(["up"], modules_to_save=["head"]), "a"), "a").eval()
    load_adapter(model, extract(randomize(model, "a", seed=2), "a"), "b")
    assert_close(model(INPUTS, adapter_names=["a"] * 5), model(INPUTS))

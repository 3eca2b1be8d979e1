"""What real models and their users do around adapted layers: read weights, tie them, record, nest, copy, pickle."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

import interop
from interop import RandLoraConfig
from randlora_torch import Linear, extract, get_peft_model, load_adapter

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def config(targets="all-linear", **fields):
    return RandLoraConfig(r=4, randlora_alpha=8, target_modules=targets, **fields)


def llama(kind=LlamaForCausalLM, **fields):
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES, vocab_size=40, **fields)).eval()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)).eval()


def adapted(model, targets="all-linear", **fields):
    return get_peft_model(model, config(targets, init_weights=False, **fields))


def inputs():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def ids():
    return torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))


def test_models_that_read_the_weight_of_a_layer_work():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    model = get_peft_model(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), config())
    model(input_ids=ids(), labels=ids()).loss.backward()


def test_the_fast_path_of_a_transformer_encoder_computes_with_the_adapter():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    model = adapted(base)
    slow = model.train()(x)
    with torch.no_grad():
        fast = model.eval()(x)
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-4, atol=1e-5)


def test_the_weight_of_an_adapted_layer_is_what_it_computes_with():
    model = adapted(net())
    x = inputs()
    torch.testing.assert_close(nn.functional.linear(x, model[0].weight, model[0].bias), model[0](x))
    with model.disable_adapter():
        assert model[0].weight is model[0].base_layer.weight


def test_hidden_states_are_still_recorded():
    model = llama(LlamaModel)
    count = len(model(ids(), output_hidden_states=True).hidden_states)
    assert len(get_peft_model(model, config())(ids(), output_hidden_states=True).hidden_states) == count


def test_merging_into_a_tied_head_leaves_the_embedding_alone_and_unmerging_ties_it_again():
    model = adapted(llama(tie_word_embeddings=True), ["lm_head"])
    embedding = model.model.embed_tokens.weight
    before, want = embedding.detach().clone(), model(ids()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids()).logits, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(embedding, before)
    model.unmerge_adapter()
    assert model.lm_head.base_layer.weight is embedding


def test_a_linear_layer_with_a_forward_of_its_own_is_no_target():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.1

    model = nn.Sequential(Scaled(16, 8), nn.Linear(8, 4))
    assert extract(get_peft_model(model, config())).modules == ("1",)
    with pytest.raises(ValueError, match="It matches '0', which is not a linear layer"):
        get_peft_model(nn.Sequential(Scaled(16, 8), nn.Linear(8, 4)), config(["0"]))


def test_dropout_of_a_later_adapter_is_off_in_eval_mode():
    source = extract(adapted(net(), randlora_dropout=0.5))
    model = load_adapter(load_adapter(net(), source), source, "b")
    model.set_adapter("b")
    assert torch.equal(model(inputs()), model(inputs()))


def test_disable_adapter_can_be_nested():
    model, want = adapted(net()), net()(inputs())
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        torch.testing.assert_close(model(inputs()), want)
        with pytest.raises(ValueError, match="nothing can be merged while adapters are disabled"):
            model.merge_adapter()
    assert not torch.allclose(model(inputs()), want)


def test_a_model_whose_part_is_adapted_is_refused():
    model = llama()
    get_peft_model(model.model, config(["q_proj"]))
    with pytest.raises(ValueError, match=r"a part of this model, with 'model\.layers\.0\.self_attn\.q_proj', carries"):
        get_peft_model(model, config(["v_proj"]), "b")


def test_another_adapter_cannot_be_set_over_a_merged_one_and_names_count_once():
    model = adapted(net())
    load_adapter(model, extract(model), "b")
    want = model(inputs())
    model.set_adapter(["default", "default"])
    torch.testing.assert_close(model(inputs()), want)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(model(inputs()), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged into the base weights: unmerge_adapter"):
        model.set_adapter("b")


def test_a_layer_under_two_names_is_adapted_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(x)

    model = Twice()
    want = model(inputs())
    adapted(model, ["a"])
    assert isinstance(model.b, Linear)
    assert model.a is model.b
    assert not torch.allclose(model(inputs()), want)


def test_a_converted_adapter_does_not_follow_further_training():
    model = adapted(net())
    kept = interop.convert(model, to="peft")
    before = kept.factors["0"].lam.copy()
    with torch.no_grad():
        model[0].factors("default").lam.add_(1.0)
    assert (kept.factors["0"].lam == before).all()


@pytest.mark.parametrize("name", ["/elsewhere/a", "a\\b", "..", ""])
def test_adapter_names_cannot_be_paths(name):
    with pytest.raises(ValueError, match="must be a non-empty name without dots and slashes"):
        get_peft_model(net(), config(), name)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_an_adapted_model_can_be_copied_and_saved_whole(how):
    model = adapted(net())
    if how == "deepcopy":
        again = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert type(again) is type(model)
    assert torch.equal(again(inputs()), model(inputs()))
    assert extract(again).modules == extract(model).modules


def test_save_pretrained_takes_a_single_name_and_writes_no_pickles(tmp_path):
    model = adapted(net())
    model.save_pretrained(tmp_path, selected_adapters="default", safe_serialization=True)
    assert interop.load(tmp_path).modules == ("0", "2")
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)

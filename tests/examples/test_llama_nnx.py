import json
import re

import base_model
import jax.numpy as jnp
import llama_nnx
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import randlora_jax

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
VARIANTS = {
    "one key head per query head": {},
    "grouped queries": {"num_key_value_heads": 2},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim apart from hidden_size": {"head_dim": 32, "num_key_value_heads": 1},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "another rope_theta and eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 0.1},
}


@pytest.fixture(autouse=True)
def one_torch_thread():
    """On a busy machine two OpenMP threads wait for each other, up to forty times longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_llama(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1, **options)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for param in model.parameters():  # biases start at 0 and norms at 1, where mistakes would not show
            if param.ndim == 1:
                param.add_(0.2 * torch.randn_like(param))
    return model


def random_tokens(length=50):
    return np.random.default_rng(0).integers(97, size=(2, length)).astype(np.int32)


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


@pytest.fixture
def folder(tmp_path):
    random_llama(num_key_value_heads=2).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, *, drop=(), add=None):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in drop} | (add or {}), folder / "model.safetensors")


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_transformers(options, tmp_path):
    reference = random_llama(**options)
    reference.save_pretrained(tmp_path)
    logits = llama_nnx.load_llama(tmp_path)(jnp.asarray(random_tokens()))
    np.testing.assert_allclose(logits, torch_logits(reference, random_tokens()), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_demo_base_is_read_with_its_own_loss(tmp_path):
    result = base_model.train_base(tmp_path, steps=2, seed=1)
    assert result.losses[0] == pytest.approx(np.log(256), abs=0.1)
    assert result.held_out_loss < result.losses[0]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = random_tokens(40)
    with torch.no_grad():
        expected = base_model.next_token_loss(reference, batch).item()
    loss = llama_nnx.next_token_loss(llama_nnx.load_llama(tmp_path), jnp.asarray(batch))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_sharded_folder_gives_the_logits_of_a_single_file(folder, tmp_path_factory):
    sharded = tmp_path_factory.mktemp("sharded")
    random_llama(num_key_value_heads=2).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tokens = jnp.asarray(random_tokens())
    np.testing.assert_array_equal(llama_nnx.load_llama(sharded)(tokens), llama_nnx.load_llama(folder)(tokens))


def test_bfloat16_files_are_read_exactly_in_float32_and_computed_in_bfloat16_on_request(tmp_path):
    random_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    # Loaded anew, because .to(bfloat16) also rounds the rotary frequencies, which no file holds.
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = jnp.asarray(random_tokens())
    expected = torch_logits(reference, random_tokens())
    np.testing.assert_allclose(llama_nnx.load_llama(tmp_path)(tokens), expected, rtol=0, atol=1e-5)
    low = llama_nnx.load_llama(tmp_path, jnp.bfloat16)
    logits = low(tokens)
    assert {leaf.dtype for _, leaf in nnx.to_flat_state(nnx.state(low))} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, rtol=0, atol=0.1)  # bfloat16 has 8 bits


def test_every_layer_has_the_name_it_has_in_torch(folder):
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    model = llama_nnx.load_llama(folder)
    linears = {name: m for name, m in reference.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {".".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear)}
    assert found.keys() == linears.keys()
    for name, module in found.items():
        np.testing.assert_array_equal(module.kernel[...], linears[name].weight.detach().numpy().T)


def test_loss_is_the_loss_of_transformers_and_so_is_the_gradient_of_every_kernel(folder):
    tokens = random_tokens(33)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = reference(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long()).loss
    expected.backward()
    model = llama_nnx.load_llama(folder)
    loss, grads = nnx.jit(nnx.value_and_grad(llama_nnx.next_token_loss))(model, jnp.asarray(tokens))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    kernels = {path[:-1]: grad[...] for path, grad in nnx.to_flat_state(grads) if path[-1] == "kernel"}
    assert len(kernels) == 15
    for path, grad in kernels.items():
        want = reference.get_submodule(".".join(map(str, path))).weight.grad.numpy().T
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
def test_a_position_does_not_see_those_after_it(folder):
    model = llama_nnx.load_llama(folder)
    tokens = random_tokens(20)
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    before, after = model(jnp.asarray(tokens)), model(jnp.asarray(changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 0.1


def test_an_optimizer_step_with_nnx_lowers_the_loss(folder):
    model = llama_nnx.load_llama(folder)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    tokens = jnp.asarray(random_tokens(20))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(llama_nnx.next_token_loss)(model, tokens)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_a_config_written_by_transformers_4_is_read_like_one_by_version_5(scaling, folder):
    new = {"rope_type": "default"} if scaling is None else scaling
    edit_config(folder, rope_parameters=new | {"rope_theta": 5e5})
    want = llama_nnx.LlamaConfig.from_json(folder / "config.json")
    old = None if scaling is None else {name: value for name, value in scaling.items() if name != "rope_theta"}
    edit_config(folder, rope_parameters=None, rope_theta=5e5, rope_scaling=old)
    assert llama_nnx.LlamaConfig.from_json(folder / "config.json") == want
    assert want.rope.theta == 5e5


def test_a_config_without_head_counts_is_completed(folder):
    edit_config(folder, num_key_value_heads=None, head_dim=None)
    config = llama_nnx.LlamaConfig.from_json(folder / "config.json")
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)


def test_missing_and_left_over_tensors_are_listed_together(folder):
    lost, extra = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[lost]
    edit_tensors(folder, drop=[lost], add={extra: tensor})
    message = (
        f"the tensors do not fit config.json. Missing: ['{lost}']. Left over: ['{extra}']. The folder is incomplete"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        llama_nnx.load_llama(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    edit_config(folder, intermediate_size=128)
    message = r"model\.layers\.0\.mlp\.\w+_proj\.weight has .*\(.*96.*\).* config\.json wants \(.*128.*\)"
    with pytest.raises(ValueError, match=message):
        llama_nnx.load_llama(folder)


def test_tensors_that_follow_from_the_config_may_be_in_the_file(tmp_path):
    reference = random_llama(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    edit_tensors(tmp_path, add={"lm_head.weight": head} | inv_freq)
    logits = llama_nnx.load_llama(tmp_path)(jnp.asarray(random_tokens()))
    np.testing.assert_allclose(logits, torch_logits(reference, random_tokens()), rtol=0, atol=1e-5)
    edit_tensors(tmp_path, add={"lm_head.weight": head + 1})
    with pytest.raises(ValueError, match=r"Left over: \['lm_head\.weight'\]"):  # tied to something else
        llama_nnx.load_llama(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral', but this example supports only 'llama'."),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but this example supports only 'silu'."),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config={'load_in_4bit': True}, but this"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn', but this example supports"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message, folder):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        llama_nnx.load_llama(folder)


def test_a_folder_without_weights_says_what_it_lacks(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        llama_nnx.load_llama(folder)


def test_the_layouts_for_transformers_names_leave_its_kernels_their_names(folder):
    layouts = randlora_jax.name_layouts(llama_nnx.load_llama(folder), "huggingface")
    modules = transformers.LlamaForCausalLM.from_pretrained(folder).named_modules()
    linear = [name for name, layer in modules if isinstance(layer, torch.nn.Linear)]
    assert {name: layout.modules for name, layout in layouts.items()} == {name: (name,) for name in linear}

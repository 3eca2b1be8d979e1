"""Adapted models under torch's transformations: torch.compile without graph breaks, torch.func, torch.export.

The aot_eager backend traces forward and backward as inductor does, and generates no code, which takes most of the time.
"""

import io
import shutil

import pytest
import torch
from tolerances import TOLERANCE
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

CLOSE = TOLERANCE["float32", "forward"]
CLOSE_GRADIENTS = TOLERANCE["float32", "gradient"]
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def randlora(unchecked, monkeypatch):
    """The package without the suite's type checks."""
    for method in ("_load_from_checkpoint", "_load_best_model"):  # which this second package may wrap
        monkeypatch.setattr(Trainer, method, getattr(Trainer, method))
    torch._dynamo.reset()
    return unchecked


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.2, **sizes))


MODELS = {
    "MLP": (mlp, ["0", "2"], lambda model: model(X)),
    "Llama": (llama, ["q_proj", "v_proj", "down_proj"], lambda model: model(IDS, use_cache=False).logits),
}


def config(randlora, targets=("0", "2"), **fields):
    given = {"r": 4, "randlora_alpha": 1, "target_modules": list(targets), "init_weights": False, **fields}
    return randlora.RandLoraConfig(**given)


def adapted(randlora, kind="MLP", adapters=1, **fields):
    """A model with one or two active adapters, which differ in r, seed and targets, and random factors."""
    make, targets, _ = MODELS[kind]
    torch.manual_seed(1)
    model = randlora.get_peft_model(make(), config(randlora, targets, **fields))
    if adapters == 2:
        model.add_adapter("b", config(randlora, targets[:-1], r=3, projection_prng_key=7))
        model.set_adapter(["default", "b"])
    return model


def compiled(model, **options):
    return torch.compile(model, **{"fullgraph": True, "backend": "aot_eager", **options})


def output_and_gradients(model, run, trained):
    output = run(model)
    output.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in trained.named_parameters() if parameter.requires_grad}
    trained.zero_grad()
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    return output.detach(), gradients


def assert_equals_eager(transformed, model, run, *, close=CLOSE, close_gradients=CLOSE_GRADIENTS, cold=False):
    """Same output and gradients; with `cold`, the compiled model is the first to compute at all."""
    order = [transformed, model] if cold else [model, transformed]
    (first, first_gradients), (second, second_gradients) = (output_and_gradients(m, run, model) for m in order)
    torch.testing.assert_close(first, second, **close)
    assert len(first_gradients) > 0
    torch.testing.assert_close(first_gradients, second_gradients, **close_gradients)


@pytest.mark.parametrize(
    "adapters", [pytest.param(1, id="one adapter", marks=pytest.mark.slow), pytest.param(2, id="two active adapters")]
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_compiled_model_computes_the_output_and_the_gradients_of_the_eager_one(kind, adapters, randlora):
    model = adapted(randlora, kind, adapters)
    assert_equals_eager(compiled(model), model, MODELS[kind][2])


def test_a_compiled_model_computes_with_the_codes_of_ternary_bases(randlora):
    model = adapted(randlora, very_sparse=True)
    assert model.randlora_B.stored("default").dtype == torch.int8
    assert_equals_eager(compiled(model), model, MODELS["MLP"][2])


def test_the_loss_of_a_llama_compiles_with_the_labels(randlora):
    model = adapted(randlora, "Llama")
    assert_equals_eager(compiled(model), model, lambda model: model(input_ids=IDS, labels=IDS).loss)


def test_a_compiled_model_follows_every_change_of_what_is_in_force(randlora):
    model = adapted(randlora, adapters=2)
    fast, seen = compiled(model), []

    def check():
        with torch.no_grad():
            seen.append(model(X))
            torch.testing.assert_close(fast(X), seen[-1], **CLOSE)

    check()
    for names in ("b", "default"):
        model.set_adapter(names)
        check()
    with model.disable_adapter():
        check()
        torch.testing.assert_close(seen[-1], mlp()(X))
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()
    model.add_adapter("c", config(randlora, ["0"], r=2))
    model.set_adapter("c")
    check()
    model.delete_adapter("c")
    check()
    distinct = [seen[i] for i in (0, 1, 2, 3, 6)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(distinct) for b in distinct[:i])


@pytest.mark.slow
def test_a_compiled_llama_follows_set_adapter(randlora):
    model, run = adapted(randlora, "Llama", adapters=2), MODELS["Llama"][2]
    fast = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(fast), run(model), **CLOSE)
    model.set_adapter("b")
    assert_equals_eager(fast, model, run)


def test_training_steps_and_restored_values_compile_nothing_anew(randlora, tmp_path):
    model, twin, counter = adapted(randlora), adapted(randlora), CompileCounterWithBackend("aot_eager")
    model.save_pretrained(tmp_path)
    fast = compiled(model, backend=counter)
    for each in (fast, twin):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            each(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(fast(X), twin(X), **CLOSE)
    model.restore_adapter(tmp_path)
    torch.testing.assert_close(fast(X), adapted(randlora)(X), **CLOSE)
    assert counter.frame_count == 1


def test_batches_of_changing_size_compile_once_for_all_sizes(randlora):
    model, counter = adapted(randlora), CompileCounterWithBackend("aot_eager")
    fast = compiled(model, backend=counter)
    for rows in (5, 3, 2, 4):
        torch.testing.assert_close(fast(X[:rows]), model(X[:rows]), **CLOSE)
    assert counter.frame_count == 2  # the first size, then any


@pytest.mark.slow
def test_a_model_compiles_with_all_sizes_symbolic(randlora):
    model = adapted(randlora)
    assert_equals_eager(compiled(model, dynamic=True), model, MODELS["MLP"][2])


def test_a_compiled_model_keeps_no_copy_of_the_bases_in_the_dtype_it_computes_in(randlora):
    model = adapted(randlora)
    fast = compiled(model)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(X)

    close, close_gradients = TOLERANCE["bfloat16", "forward"], TOLERANCE["bfloat16", "gradient"]
    assert_equals_eager(fast, model, run, close=close, close_gradients=close_gradients, cold=True)
    assert model.randlora_A._copies == model.randlora_B._copies == {}
    assert_equals_eager(fast, model, MODELS["MLP"][2])  # and float32 still computes in float32


def test_a_compiled_model_drops_inputs_while_training_only(randlora):
    model = adapted(randlora, randlora_dropout=0.5).train()
    fast = compiled(model)
    with torch.no_grad():
        thinned, other = fast(X), fast(X)
        assert not torch.equal(thinned, other)
        fast.eval()
        torch.testing.assert_close(fast(X), adapted(randlora)(X), **CLOSE)


def test_trained_modules_and_biases_compile_too(randlora):
    model = randlora.get_peft_model(mlp(), config(randlora, ["0"], modules_to_save=["2"], bias="all"))
    assert_equals_eager(compiled(model), model, MODELS["MLP"][2])


def test_a_4_bit_model_compiles_without_graph_breaks(randlora):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes, options = ((64, 128), (128, 64)), {"quant_type": "nf4", "compute_dtype": torch.float32}
    torch.manual_seed(0)
    base = nn.Sequential(*(bitsandbytes.nn.Linear4bit(*size, **options) for size in sizes)).to("cpu")
    model = randlora.get_peft_model(base, config(randlora, ["0", "1"], r=16))
    x = torch.randn(4, 64)
    assert_equals_eager(compiled(model), model, lambda model: model(x))


def test_a_mixed_batch_runs_compiled_where_it_can(randlora):
    model, rows = adapted(randlora, adapters=2).eval(), ["b", "default", "__base__", "b", "default"]
    fast = compiled(model, fullgraph=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(X, adapter_names=rows), model(X, adapter_names=rows), **CLOSE)
        torch.testing.assert_close(fast(X), model(X), **CLOSE)


def test_a_compiled_model_saves_its_adapter(randlora, tmp_path):
    fast = compiled(adapted(randlora))
    fast(X)
    fast.save_pretrained(tmp_path)
    torch.testing.assert_close(randlora.load_adapter(mlp(), tmp_path)(X), fast(X), **CLOSE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_code_generated_by_inductor_computes_the_same(randlora):
    model = adapted(randlora, adapters=2)
    fast = compiled(model, backend="inductor", options={"compile_threads": 1})  # processes take longer to start
    assert_equals_eager(fast, model, MODELS["MLP"][2])


def parameters(model):
    """What is trained and what is frozen, by name, as torch.func wants it."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    trained = {name: value for name, value in named.items() if "randlora_" in name}
    return trained, {name: value for name, value in named.items() if name not in trained}


def by_function(model):
    """`f(trained, x)` of an adapted model."""
    _, frozen = parameters(model)
    return lambda trained, x: functional_call(model, (trained, frozen), (x,))


def ensemble(randlora, size=3):
    """Models that share base and bases and differ in their factors."""
    models = [adapted(randlora) for _ in range(size)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "randlora_" in name:
                nn.init.normal_(parameter)
    return models


def loss(output):
    return output.square().sum()


def backward(model, x):
    return output_and_gradients(model, lambda model: model(x), model)[1]


def test_gradients_by_torch_func_are_those_of_backward(randlora):
    model = adapted(randlora)
    f, (trained, _) = by_function(model), parameters(model)
    got = grad(lambda trained: loss(f(trained, X)))(trained)
    torch.testing.assert_close(got, backward(model, X), **CLOSE_GRADIENTS)


def test_vmap_over_the_factors_of_an_ensemble_is_a_loop_over_its_models(randlora):
    models = ensemble(randlora)
    f = by_function(models[0])
    stacked = {name: torch.stack([parameters(m)[0][name] for m in models]) for name in parameters(models[0])[0]}
    outputs = vmap(f, in_dims=(0, None))(stacked, X)
    torch.testing.assert_close(outputs, torch.stack([model(X) for model in models]), **CLOSE)
    gradients = vmap(grad(lambda trained: loss(f(trained, X))))(stacked)
    for i, model in enumerate(models):
        want = backward(model, X)
        for name in want:
            torch.testing.assert_close(gradients[name][i], want[name], **CLOSE_GRADIENTS)


def test_the_stacked_state_of_an_ensemble_holds_parameters_only(randlora):
    models = ensemble(randlora)
    stacked, buffers = stack_module_state(models)
    assert buffers == {}
    outputs = vmap(lambda state: functional_call(models[0], state, (X,)))(stacked)
    torch.testing.assert_close(outputs, torch.stack([model(X) for model in models]), **CLOSE)


def test_per_sample_gradients_are_the_gradients_of_each_sample_alone(randlora):
    model = adapted(randlora)
    f, (trained, _) = by_function(model), parameters(model)
    each = vmap(grad(lambda trained, row: loss(f(trained, row[None]))), in_dims=(None, 0))(trained, X)
    for i, row in enumerate(X):
        want = backward(model, row[None])
        torch.testing.assert_close({name: value[i] for name, value in each.items()}, want, **CLOSE_GRADIENTS)


def test_the_jacobian_contracted_with_an_upstream_gradient_is_that_of_backward(randlora):
    model = adapted(randlora)
    f, (trained, _) = by_function(model), parameters(model)
    jacobian = jacrev(lambda trained: f(trained, X))(trained)  # (batch, out, *shape) of each
    upstream = 2 * model(X).detach()  # of the sum of squares
    got = {name: torch.einsum("bo,bo...->...", upstream, value) for name, value in jacobian.items()}
    torch.testing.assert_close(got, backward(model, X), **CLOSE_GRADIENTS)


def test_an_exported_model_computes_the_same_for_every_batch_size_and_after_a_trip_to_disk(randlora):
    model = adapted(randlora, adapters=2).eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for loaded in (program, torch.export.load(buffer)):
        for rows in (5, 2):
            torch.testing.assert_close(loaded.module()(X[:rows]), model(X[:rows]), **CLOSE)


def test_an_exported_llama_computes_the_same(randlora):
    model = adapted(randlora, "Llama").eval()
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=False)
        got = program.module()(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(got, model(IDS, use_cache=False).logits, **CLOSE)

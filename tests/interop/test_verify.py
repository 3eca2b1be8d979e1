"""`verify` and `diff` in numpy alone; with the stacks and models: tests/cross/test_verify_stacks.py."""

import dataclasses
import json
import tracemalloc

import numpy as np
import oracle
import pytest
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter

import interop
from interop import Factors, diff, save, verify
from interop.compare import layer_differences, same_numbers


def with_factor(adapter, module, change):
    """The adapter with another lambda in one layer."""
    lam, gamma = adapter.factors[module]
    return dataclasses.replace(adapter, factors={**adapter.factors, module: Factors(change(lam), gamma)})


def exact_difference(a, b, module):
    """Relative Frobenius distance of two updates, from the naive sums."""
    one, other = (
        oracle.delta_weight(
            *adapter.bases, *adapter.factors[module], scaling=adapter.config.scaling, shape=LAYERS[module]
        )
        for adapter in (a, b)
    )
    return np.linalg.norm(one - other) / max(np.linalg.norm(one), np.linalg.norm(other)), one, other


@pytest.mark.parametrize("module", LAYERS)
def test_differences_are_those_of_the_naive_sums(module):
    a, b = draw_adapter(0), draw_adapter(1, projection_prng_key=7, r=3)
    found = layer_differences(a, module, {"b": b})["b"]
    relative, one, other = exact_difference(a, b, module)
    np.testing.assert_allclose(found.relative, relative, rtol=1e-12)
    np.testing.assert_allclose([found.norm_a, found.norm_b], [np.linalg.norm(one), np.linalg.norm(other)], rtol=1e-12)
    cosine = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-9)


@pytest.mark.parametrize("draw", [draw_adapter, draw_adalora])
def test_the_same_adapter_passes_without_a_product_where_no_stack_is_asked_for(tmp_path, draw):
    save(draw(), tmp_path / "a")
    save(draw(), tmp_path / "b", bases="none")
    found = verify(tmp_path / "a", tmp_path / "b", stacks=())
    assert found.passed
    assert [(layer.module, layer.identical, layer.norm, layer.errors) for layer in found.layers] == [
        (module, True, None, {"numpy": 0.0}) for module in sorted(LAYERS)
    ]


@pytest.mark.parametrize("module", LAYERS)
def test_one_changed_number_is_found_in_its_layer_and_nowhere_else(module):
    def one_ulp(lam):
        lam = lam.copy()
        lam[0, 0] = np.nextafter(lam[0, 0], np.float32(np.inf))
        return lam

    a = draw_adapter()
    found = verify(a, with_factor(a, module, one_ulp), stacks=(), tolerance=0.0)
    assert not found.passed
    assert {layer.module for layer in found.layers if not layer.identical} == {module}
    assert {layer.module for layer in found.layers if layer.errors["numpy"] > 0} == {module}
    assert verify(a, with_factor(a, module, one_ulp), stacks=()).passed  # within the default tolerance
    assert not verify(a, with_factor(a, module, lambda lam: lam * np.float32(1.001)), stacks=()).passed


def test_the_same_update_in_other_numbers_passes():
    """lambda twice as large under half the alpha, and an update that both write by other bases."""
    a = draw_adapter()
    b = dataclasses.replace(a, config=dataclasses.replace(a.config, randlora_alpha=a.config.randlora_alpha / 2))
    for module in LAYERS:
        b = with_factor(b, module, lambda lam: lam * 2)
        assert not same_numbers(a, b, module)
    found = verify(a, b, stacks=(), tolerance=1e-14)
    assert found.passed
    assert not any(layer.identical for layer in found.layers)
    assert found.layers[0].norm == pytest.approx(np.linalg.norm(a.delta_weight("block.0.down")))


def test_other_bases_are_noticed_though_all_factors_are_equal(tmp_path):
    a = draw_adapter()
    b = dataclasses.replace(draw_adapter(projection_prng_key=5), factors=a.factors)
    save(a, tmp_path / "a")
    save(b, tmp_path / "b")
    assert not verify(tmp_path / "a", tmp_path / "b", stacks=()).passed
    assert all(layer.relative > 0.5 for layer in diff(tmp_path / "a", tmp_path / "b").layers)


def test_another_scaling_is_another_update_of_the_same_numbers():
    a = draw_adapter()
    b = dataclasses.replace(a, config=dataclasses.replace(a.config, randlora_alpha=a.config.randlora_alpha * 1.5))
    found = verify(a, b, stacks=())
    assert not found.passed
    assert [layer.errors["numpy"] for layer in found.layers] == pytest.approx([1 / 3] * 3)
    assert diff(a, b).fields == {"randlora_alpha": (640, 960.0)}


def test_layers_and_tensors_that_only_one_has_are_listed(tmp_path):
    extra = {"base_model.model.head.weight": np.ones((2, 2), np.float32)}
    a = dataclasses.replace(draw_adapter(modules_to_save=["head"]), saved_weights=extra)
    fewer = {name: shape for name, shape in LAYERS.items() if name != "block.0.up"}
    b = draw_adapter(shapes={**fewer, "block.1.mix": (8, 7), "new": (12, 12)})
    found = verify(a, b, stacks=())
    assert found.problems == [
        "block.0.up: only in A",
        "new: only in B",
        "block.1.mix: a layer of shape (8, 8) in A, (8, 7) in B",
        "base_model.model.head.weight: only in A",
    ]
    assert [layer.module for layer in found.layers] == ["block.0.down"]
    assert not found.passed
    other = {"base_model.model.head.weight": np.zeros((2, 2), np.float32)}
    found = verify(a, dataclasses.replace(a, saved_weights=other), stacks=())
    assert found.problems == ["base_model.model.head.weight: other numbers in A than in B"]
    assert all(layer.identical for layer in found.layers)
    assert not found.passed
    assert not diff(a, dataclasses.replace(a, saved_weights=other)).same


def test_the_table_says_what_was_compared_and_what_is_wrong():
    a = draw_adapter()
    lines = str(verify(a, with_factor(a, "block.0.up", np.negative), stacks=())).splitlines()
    assert lines[0].split() == ["module", "shape", "norm", "of", "dW", "numpy"]
    assert [line.split()[-1] for line in lines[1:4]] == ["identical", "2.0e+00", "identical"]
    assert lines[-1] == "NOT the same: 3 layers, relative errors may be 1e-05"


def test_results_are_json():
    a, b = draw_adapter(), draw_adapter(1)
    assert json.loads(json.dumps(verify(a, b, stacks=()).to_dict()))["passed"] is False
    found = json.loads(json.dumps(diff(a, b).to_dict()))
    assert found["same"] is False
    assert found["layers"][0]["shape"] == [6, 12]


def test_diff_compares_methods_seeds_and_ranks_by_their_updates():
    a, b = draw_adapter(), draw_adalora(kept=KEPT)
    found = diff(a, b)
    assert found.fields == {"method": ("RandLoRA", "AdaLoRA")}
    layers = {layer.module: layer for layer in found.layers}
    assert (layers["block.0.down"].norm_b, layers["block.0.down"].cosine) == (0.0, 0.0)  # rank 0 is left
    one, other = a.delta_weight("block.1.mix"), b.delta_weight("block.1.mix")
    relative = np.linalg.norm(one - other) / np.linalg.norm(one)
    assert layers["block.1.mix"].relative == pytest.approx(relative, rel=1e-12)
    assert not found.same
    assert "3 of 3 common layers differ" in str(found)


def test_diff_names_the_fields_that_differ_but_no_bookkeeping():
    a = draw_adapter()
    b = dataclasses.replace(draw_adapter(sparse=True, inference_mode=True, peft_version="1"), factors=a.factors)
    assert diff(a, b).fields == {"sparse": (False, True)}
    same = diff(a, a)
    assert same.same
    assert same.fields == {}
    assert str(same).endswith("the same update")


def test_two_models_are_compared_by_their_logits():
    a = draw_adapter()
    x = np.arange(6.0)
    one = lambda x: x * 10  # noqa: E731
    assert verify(a, a, stacks=(), models=(one, one), inputs=x).logits_error == 0
    off = lambda x: x * 10 + (x == 3) * 0.5  # noqa: E731
    found = verify(a, a, stacks=(), models=(one, off), inputs=x)
    assert found.logits_error == pytest.approx(0.01)  # 0.5 of a largest logit of 50
    assert not found.passed
    with pytest.raises(ValueError, match="logits of shapes \\(6,\\) and \\(3,\\), which cannot be compared"):
        verify(a, a, stacks=(), models=(one, lambda x: x[:3]), inputs=x)
    with pytest.raises(ValueError, match="models has 1 entries and inputs is None: give two models, and inputs"):
        verify(a, a, stacks=(), models=(one,))


def test_an_adapter_that_does_not_know_its_shapes_says_what_to_do(tmp_path):
    save(draw_adapter(save_projection=False), tmp_path)
    unbound = dataclasses.replace(interop.load(tmp_path), bases=None, shapes=None)
    with pytest.raises(ValueError, match=r"no bases yet: give it its model's layer shapes, adapter\.bind\(shapes\)"):
        verify(unbound, with_factor(unbound, "block.0.up", np.negative), stacks=())
    other = dataclasses.replace(unbound, config=dataclasses.replace(unbound.config, projection_prng_key=5))
    for compare in (lambda a, b: verify(a, b, stacks=()), diff):  # equal factors, but bases that nobody knows yet
        with pytest.raises(ValueError, match="no bases yet"):
            compare(unbound, other)
    with pytest.raises(TypeError, match="holds no adapter"):
        verify(3, 4)


def test_folders_are_compared_a_layer_at_a_time(tmp_path):
    shapes = {f"layers.{i}.q": (128, 128) for i in range(60)}
    adapter = draw_adapter(shapes=shapes, r=1)
    save(adapter, tmp_path / "a")
    changed = {name: Factors(lam, gamma * 2) for name, (lam, gamma) in adapter.factors.items()}
    save(dataclasses.replace(adapter, factors=changed), tmp_path / "b")
    size = sum(part.nbytes for factors in adapter.factors.values() for part in factors)
    del adapter, changed
    tracemalloc.start()
    found = diff(tmp_path / "a", tmp_path / "b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [layer.relative for layer in found.layers] == pytest.approx([0.5] * 60)
    layer = 8 * 128 * 128  # dW in float64
    assert size > 20 * layer
    assert peak < 12 * layer

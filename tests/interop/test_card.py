"""The model card: facts only, always the same text, no name breaks out of it, and it never fails a save."""

import ast
import dataclasses
import json
import os
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from strategies import KEPT, draw_adalora, draw_adapter

from interop import Bases, Factors, load, save
from interop.card import CARD_NAME, MARK, model_card
from tests.interop.folders import same_arrays

BASE = {"base_model_name_or_path": "org/Base-1.5_x", "task_type": "CAUSAL_LM"}


def snippets(card):
    return re.findall(r"(?ms)^```python\n(.*?)^```$", card)


def facts(card):
    return dict(re.findall(r"(?m)^\| ([a-z, ]+) \| (.*) \|$", card))


def front(card):
    return re.match(r"(?s)---\n(.*?)\n---\n", card)[1]


@pytest.mark.parametrize(
    "adapter", [draw_adapter(**BASE), draw_adalora(kept=KEPT, **BASE)], ids=["RandLoRA", "AdaLoRA"]
)
def test_it_is_the_same_text_for_the_same_adapter(tmp_path, adapter):
    save(adapter, tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    text = (tmp_path / "a" / CARD_NAME).read_bytes()
    assert text == (tmp_path / "b" / CARD_NAME).read_bytes() == model_card(adapter).encode()
    assert text.decode().isascii()


def test_it_states_the_facts_of_a_randlora_adapter():
    adapter = draw_adapter(**BASE, projection_prng_key=7, randlora_alpha=12.25)
    card = model_card(adapter)
    assert front(card) == 'base_model: "org/Base-1.5_x"\nlibrary_name: peft\ntags:\n- randlora'
    assert "# RandLoRA adapter for `org/Base-1.5_x`\n" in card
    assert facts(card) == {
        "r, alpha": "4, 12.25",
        "bases": "dense, seed 7, in the file",
        "recipe of the bases": "`torch>=2.12`",
        "trainable parameters": f"{adapter.num_trainable:,d} in 3 layers",
        "stored as": "float32",
    }
    assert "- `block.0.down` (6 x 12)\n- `block.0.up` (12 x 6)\n- `block.1.mix` (8 x 8)\n" in card
    assert card.endswith("## Other trained tensors\n\n- none\n")


def test_it_states_the_facts_of_an_adalora_adapter():
    adapter = draw_adalora(kept=KEPT, dtype=ml_dtypes.bfloat16, lora_alpha=3)
    card = model_card(adapter)
    assert front(card) == "library_name: peft\ntags:\n- adalora\n- randlora"
    assert "# AdaLoRA adapter\n" in card
    assert facts(card) == {
        "ranks": "6 in all, 0 to 4 a layer; training began with 4 each",
        "alpha": "3",
        "trainable parameters": "106 in 3 layers",
        "stored as": "bfloat16",
    }
    assert "randlora_jax.attach(model, " in card


FACTS = {
    "in the file": (draw_adapter(), "dense, seed 0, in the file", "`torch>=2.12`"),
    "rebuilt": (draw_adapter(save_projection=False), "dense, seed 0, rebuilt from the seed", "`torch>=2.12`"),
    "sparse": (draw_adapter(sparse=True), "sparse, seed 0, in the file", "`torch>=2.12`"),
    "very sparse": (draw_adapter(very_sparse=True), "very sparse, seed 0, in the file", "`torch>=2.12`"),
    "old torch": (
        draw_adapter(recipe="torch<=2.11", save_projection=False),
        "dense, seed 0, rebuilt from the seed",
        "`torch<=2.11`",
    ),
    "from elsewhere": (dataclasses.replace(draw_adapter(), recipe=None), "dense, in the file", "unknown"),
    "not known yet": (
        dataclasses.replace(draw_adapter(save_projection=False), bases=None, shapes=None, recipe=None),
        "dense, seed 0, rebuilt from the seed",
        "unknown",
    ),
}


@pytest.mark.parametrize("case", FACTS)
def test_what_it_says_of_the_bases_is_so(case):
    adapter, bases, recipe = FACTS[case]
    found = facts(model_card(adapter))
    assert (found["bases"], found["recipe of the bases"]) == (bases, recipe)
    draws = "It draws the bases itself" in model_card(adapter)
    assert draws == (adapter.bases is None or not adapter.config.save_projection) & (adapter.recipe is not None)


def test_bases_that_were_changed_have_no_recipe_in_the_card_either(tmp_path):
    adapter = draw_adapter()
    changed = Bases(*(basis.astype(np.float32) * np.float32(2) for basis in adapter.bases))
    save(dataclasses.replace(adapter, bases=changed), tmp_path)
    assert facts((tmp_path / CARD_NAME).read_text())["recipe of the bases"] == "unknown"


CLASSES = {
    "AutoModelForCausalLM": {"task_type": "CAUSAL_LM"},
    "AutoModelForSeq2SeqLM": {"task_type": "SEQ_2_SEQ_LM"},
    "AutoModelForSequenceClassification": {"task_type": "SEQ_CLS"},
    "AutoModelForTokenClassification": {"task_type": "TOKEN_CLS"},
    "LlamaForCausalLM": {
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}
    },
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_snippets_name_the_class_and_the_base_model(name):
    in_torch, in_jax = snippets(model_card(draw_adapter(base_model_name_or_path="org/base", **CLASSES[name])))
    assert f'from transformers import {name}\n\nmodel = {name}.from_pretrained("org/base")\n' in in_torch
    assert 'randlora_torch.load_adapter(model, "path/to/this/folder")\n' in in_torch
    assert 'randlora_jax.attach(model, "path/to/this/folder")' in in_jax
    for code in (in_torch, in_jax):
        ast.parse(code)


NO_CLASS = [
    {},
    {"task_type": "FEATURE_EXTRACTION"},
    {"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}},
    {"auto_mapping": {"base_model_class": 5, "parent_library": "transformers.x"}},
    {"auto_mapping": {"base_model_class": "X\nimport os", "parent_library": "transformers.x"}},
    {"auto_mapping": {"base_model_class": "import_module", "parent_library": "transformers.x"}},
    {"auto_mapping": {"base_model_class": "A; import os", "parent_library": "transformers.x"}},
    {"auto_mapping": {"parent_library": ["transformers."]}},
]


@pytest.mark.parametrize("fields", NO_CLASS, ids=str)
def test_a_class_that_is_not_known_is_left_open(fields):
    code = snippets(model_card(draw_adapter(**fields)))[0]
    assert "model = ...  # the base model" in code
    assert "import os" not in code
    ast.parse(code)


HOSTILE = [
    'x"\nlicense: mit\n',
    "x\n---\n# Mine\n",
    "a`b`c",
    "```\nimport os",
    "<script>alert(1)</script>",
    "](http://evil)",
    "![x](http://evil/x.png)",
    "a|b",
    "\x1b[2J",
    "\u202etxt.exe",
    "\u2028",
    "*/ ' \" {}",
    "$front",
    "x" * 10_000,
    " ",
    "{{ x }}",
    "& &amp;",
    "#",
    "!!python/object:os",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_of_a_base_model_is_left_out(name):
    card = model_card(draw_adapter(base_model_name_or_path=name, task_type="CAUSAL_LM"))
    assert card == model_card(draw_adapter(base_model_name_or_path=None, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("name", ["/home/me/model", "C:\\models\\llama", "./model", "a b/c", "größe/x", "a/b/c", "~/m"])
def test_a_path_stands_in_the_snippet_but_not_where_the_hub_reads_a_name(name):
    card = model_card(draw_adapter(base_model_name_or_path=name, task_type="CAUSAL_LM"))
    assert "base_model" not in front(card)
    call = next(node for node in ast.walk(ast.parse(snippets(card)[0])) if isinstance(node, ast.Call))
    assert call.args[0].value == name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_of_a_layer_or_tensor_stays_in_its_line_as_code(name):
    saved = {f"{name}.bias": np.ones(1, np.float32)}
    plain = model_card(dataclasses.replace(draw_adapter(shapes={"x": (6, 4)}), saved_weights=dict.fromkeys(["x"], 0)))
    card = model_card(dataclasses.replace(draw_adapter(shapes={name: (6, 4)}), saved_weights=saved))
    assert len(card.splitlines()) == len(plain.splitlines())
    assert front(card) == front(plain)
    for line, rest in zip((card.splitlines()[-5], card.splitlines()[-1]), (r" \(6 x 4\)", ""), strict=True):
        assert line.isprintable()
        code = re.fullmatch(rf"- (`+)( ?)(.*)\2\1{rest}", line)
        assert code[1] not in re.findall("`+", code[3])
        assert not code[3].startswith("`") or code[2]


# Beside the adapter


def test_somebody_elses_readme_is_never_touched(tmp_path):
    contents = (b"", b"mine", b"\xff\xfe", MARK[:-4].encode(), b"x" * 100_000 + MARK.encode())
    for content in contents:
        (tmp_path / CARD_NAME).write_bytes(content)
        save(draw_adapter(), tmp_path)
        assert (tmp_path / CARD_NAME).read_bytes() == content


def test_our_own_is_written_anew_with_what_stands_before_the_mark_gone(tmp_path):
    save(draw_adapter(), tmp_path)
    save(draw_adapter(r=2), tmp_path)
    assert (tmp_path / CARD_NAME).read_text() == model_card(draw_adapter(r=2))


def test_without_the_mark_it_is_yours(tmp_path):
    save(draw_adapter(), tmp_path)
    yours = (tmp_path / CARD_NAME).read_text().replace(MARK, "Mine.")
    (tmp_path / CARD_NAME).write_text(yours)
    save(draw_adapter(r=2), tmp_path)
    assert (tmp_path / CARD_NAME).read_text() == yours


def test_it_can_be_left_out(tmp_path):
    save(draw_adapter(), tmp_path, model_card=False)
    assert CARD_NAME not in os.listdir(tmp_path)


def test_each_adapter_of_a_folder_has_its_own(tmp_path):
    save(draw_adapter(), tmp_path)
    save(draw_adapter(r=2), tmp_path, adapter_name="b")
    assert (tmp_path / CARD_NAME).read_text() == model_card(draw_adapter())
    assert (tmp_path / "b" / CARD_NAME).read_text() == model_card(draw_adapter(r=2))


@pytest.mark.parametrize("call", ["replace", "write"])
def test_a_card_that_cannot_be_written_is_a_warning_and_the_adapter_is_saved(tmp_path, monkeypatch, call):
    real = os.replace

    def refuse(source, target):
        if str(target).endswith(CARD_NAME):
            raise OSError(28, "No space left on device")
        real(source, target)

    if call == "replace":
        monkeypatch.setattr(os, "replace", refuse)
    else:
        monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: refuse("", CARD_NAME))
    message = (
        r"the adapter was saved, but not its README\.md \(\[Errno 28\] No space left .*\)\. model_card=False silences"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        save(draw_adapter(), tmp_path)
    assert caught[0].filename == __file__
    same_arrays(load(tmp_path).factors, draw_adapter().factors)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_saved_adapter_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(draw_adapter(**BASE), tmp_path)


def test_numbers_of_any_size_are_written(tmp_path):
    lam = {name: Factors(*pair) for name, pair in draw_adapter().factors.items()}
    adapter = dataclasses.replace(draw_adapter(randlora_alpha=10**300, projection_prng_key=2**64 - 1), factors=lam)
    save(adapter, tmp_path)
    assert facts((tmp_path / CARD_NAME).read_text())["r, alpha"] == f"4, {10**300}"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["randlora_alpha"] == 10**300

import pytest

from interop import RandLoraConfig, resolve_targets

LLAMA = tuple(
    f"model.layers.{i}.{name}"
    for i in range(3)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
)
LAYERS = (*LLAMA, "lm_head")


def resolve(layers=LAYERS, *, output_layers=("lm_head",), other_modules=(), **fields):
    return resolve_targets(RandLoraConfig(**fields), layers, output_layers=output_layers, other_modules=other_modules)


def ending(*suffixes, layers=LAYERS):
    return tuple(name for name in layers if name.endswith(suffixes))


SELECTIONS = [
    ({"target_modules": ["q_proj"]}, ending("q_proj")),
    ({"target_modules": ["v_proj", "q_proj"]}, ending("q_proj", "v_proj")),
    ({"target_modules": ["mlp.up_proj"]}, ending("up_proj")),
    ({"target_modules": ["lm_head"]}, ("lm_head",)),
    ({"target_modules": ["model.layers.1.mlp.up_proj"]}, ("model.layers.1.mlp.up_proj",)),
    ({"target_modules": ["q_proj", "model.layers.0.self_attn.q_proj"]}, ending("q_proj")),
    ({"target_modules": r".*\.(q|v)_proj"}, ending("q_proj", "v_proj")),
    ({"target_modules": r".*layers\.[02]\.mlp\.up.*"}, ending("0.mlp.up_proj", "2.mlp.up_proj")),
    ({"target_modules": "lm_head"}, ("lm_head",)),
    ({"target_modules": "all-linear"}, LLAMA),
    ({"target_modules": "ALL-Linear"}, LLAMA),
    ({"target_modules": "all-linear", "exclude_modules": ["up_proj", "mlp.down_proj"]}, ending("q_proj", "v_proj")),
    (
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        ending("1.self_attn.q_proj", "2.self_attn.q_proj"),
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ending("1.self_attn.q_proj")),
    ({"target_modules": ["v_proj"], "layers_to_transform": [0, 2]}, ending("0.self_attn.v_proj", "2.self_attn.v_proj")),
    ({"target_modules": ["up_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}, ending("2.mlp.up_proj")),
    (
        {"target_modules": ["up_proj"], "layers_to_transform": 2, "layers_pattern": ["h", "layers"]},
        ending("2.mlp.up_proj"),
    ),
]


@pytest.mark.parametrize(("fields", "chosen"), SELECTIONS, ids=lambda value: str(value)[:60])
def test_targets_are_the_layers_a_config_means_in_the_order_of_the_model(fields, chosen):
    assert chosen
    assert resolve(**fields) == chosen
    assert resolve(LAYERS[::-1], **fields) == chosen[::-1]


def test_a_suffix_matches_whole_segments_only():
    assert resolve(("a.q_proj", "a.xq_proj", "q_proj", "q_proj.inner"), target_modules=["q_proj"]) == (
        "a.q_proj",
        "q_proj",
    )


def test_dots_of_a_list_entry_are_no_wildcards():
    with pytest.raises(ValueError, match="matches none"):
        resolve(("mlpxup_proj",), target_modules=["mlp.up_proj"])


def test_a_layer_named_twice_is_adapted_once():
    assert resolve(("x.q",), target_modules=["q", "x.q"]) == ("x.q",)


NO_MATCH = r"matches none of the 13 adaptable layers\."
ENDINGS = r"Adaptable layers end in: q_proj, v_proj, up_proj, down_proj, lm_head\.$"
NOT_FOUND = r"matches no targeted layer: the indices found are"
MISTAKES = [
    ({}, rf"target_modules=None: name the layers to adapt, or use 'all-linear'\. {ENDINGS}"),
    ({"target_modules": ["q_prj"]}, rf"target_modules entry 'q_prj' {NO_MATCH} Did you mean 'q_proj'\? {ENDINGS}"),
    (
        {"target_modules": ["q_proj", "mlp.upproj"]},
        rf"'mlp\.upproj' {NO_MATCH} Did you mean 'mlp\.up_proj'\? {ENDINGS}",
    ),
    ({"target_modules": ["zzz"]}, rf"target_modules entry 'zzz' {NO_MATCH} {ENDINGS}"),
    (
        {"target_modules": "q_proj"},
        rf"'q_proj' {NO_MATCH} A string is a regular expression for the whole name; for a suffix write \['q_proj'\]\.$",
    ),
    ({"target_modules": r".*\.c_attn"}, rf"target_modules entry '\.\*\\\\\.c_attn' {NO_MATCH}"),
    ({"target_modules": r".*\.(q|v)"}, rf"entry '\.\*\\\\\.\(q\|v\)' {NO_MATCH}"),  # must match to the end of the name
    ({"target_modules": "("}, r"target_modules='\(' is not a valid regular expression: missing \)"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": "["},
        r"exclude_modules='\[' is not a valid regular expression: ",
    ),
    ({"target_modules": ["q_proj"], "exclude_modules": ["head"]}, rf"exclude_modules entry 'head' {NO_MATCH}"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        r"target_modules=\('q_proj',\) with exclude_modules=\('q_proj',\), modules_to_save=None and"
        rf" layers_to_transform=None leaves no layer to adapt\. {ENDINGS}",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]},
        rf"layers_to_transform=\[7\] {NOT_FOUND} \[0, 1, 2\] \(layers_pattern=None\)\. Correct the indices or",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "blocks"},
        rf"layers_to_transform=\[0\] {NOT_FOUND} \[\] \(layers_pattern='blocks'\)",
    ),
    ({"target_modules": ["lm_head"], "layers_to_transform": 0}, rf"layers_to_transform=\[0\] {NOT_FOUND} \[\]"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "("},
        r"layers_pattern='\(' is not a valid regular expression",
    ),
    (
        {"target_modules": r".*\.q_proj", "layers_to_transform": 1},
        r"layers_to_transform=1 needs target_modules to be a list: a regular expression, .*can name the layer indices",
    ),
    (
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        r"layers_pattern='layers' selects among layers_to_transform: set that too, or drop this\.",
    ),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_what_matches_nothing_is_named_with_a_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        resolve(**fields)


def test_a_module_that_is_no_linear_layer_is_named_as_such():
    with pytest.raises(
        ValueError, match=r"entry 'conv' matches none .* It matches 'stem\.conv', which is not a linear la"
    ):
        resolve(other_modules=("stem.norm", "stem.conv"), target_modules=["conv"])
    with pytest.raises(
        ValueError, match=r"It matches 'stem\.norm', which is not a linear layer\. Adaptable layers end in"
    ):
        resolve(other_modules=("stem.norm",), target_modules=r"stem\..*")


def test_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match=r"leaves no layer to adapt\. The model has no adaptable layer\."):
        resolve((), target_modules="all-linear")
    with pytest.raises(
        ValueError, match=r"matches none of the 0 adaptable layers\. The model has no adaptable layer\."
    ):
        resolve((), target_modules=["q"])


def test_the_listing_of_many_layer_kinds_is_cut():
    with pytest.raises(ValueError, match=r"kind0, .*kind19, \.\.\.\.$") as caught:
        resolve([f"m.kind{i}" for i in range(25)], target_modules=["nothing_like_it"])
    assert "kind20" not in str(caught.value)

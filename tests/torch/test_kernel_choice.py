"""Which way computes: decisions from results and times that are given, and where kernels cannot be used at all."""

import importlib.util
import logging

import pytest
import torch
from stacks import without_type_checks
from torch import nn

from randlora_torch import fused, kernel_choice
from randlora_torch.kernel_choice import TORCH, Call, Chooser, agree, set_kernels

CALL = Call("fold", (8, 4), 2, "bfloat16", "bfloat16", "bfloat16", "cuda:0")
RIGHT = torch.linspace(-2, 2, 12).reshape(4, 3)
X = torch.ones(())


class Way:
    """A way to compute that takes a given time, counts its calls, and may fail."""

    def __init__(self, milliseconds, result=RIGHT, error=None):
        self.milliseconds, self.result, self.error, self.seen = milliseconds, result, error, []

    def __call__(self, *arguments):
        self.seen.append(arguments)
        if self.error is not None:
            raise self.error
        return self.result


def chooser_of(ways):
    """A chooser whose clock knows how long the ways take: it runs what it times, and looks which of them ran."""

    def milliseconds(run):
        before = {name: len(way.seen) for name, way in ways.items()}
        run()
        (ran,) = (way for name, way in ways.items() if len(way.seen) > before[name])
        return ran.milliseconds

    return Chooser(milliseconds)


def choose(ways, call=CALL, **options):
    chooser = chooser_of(ways)
    way = chooser.choose(call, ways, lambda: (X,), **options)
    return chooser, next(name for name, each in ways.items() if each is way)


@pytest.mark.parametrize(("triton", "chosen"), [(0.5, "a"), (0.9, "a"), (0.91, TORCH), (1.0, TORCH), (3.0, TORCH)])
def test_triton_is_taken_if_it_is_at_least_a_tenth_faster(triton, chosen):
    chooser, name = choose({TORCH: Way(1.0), "a": Way(triton)})
    assert name == chosen
    choice = chooser.made[CALL]
    assert (choice.call, choice.chosen, choice.milliseconds) == (CALL, chosen, {TORCH: 1.0, "a": triton})
    reason = "no kernel is at least 10% faster" if chosen == TORCH else f"takes {triton:.2f} of torch's time"
    assert choice.reason == reason


def test_the_fastest_tiles_are_taken_of_those_whose_result_is_right():
    ways = {
        TORCH: Way(1.0),
        "slow": Way(0.8),
        "wrong": Way(0.1, RIGHT + 1),
        "fast": Way(0.5),
        "ill": Way(0, error=OSError()),
    }
    chooser, name = choose(ways)
    assert name == "fast"
    assert chooser.made[CALL].milliseconds == {TORCH: 1.0, "slow": 0.8, "fast": 0.5}


def test_it_is_tried_once_for_each_kind_of_call_with_arguments_drawn_for_it():
    ways, drawn = {TORCH: Way(1.0), "a": Way(0.5)}, []

    def draw():
        drawn.append(X)
        return (X,)

    chooser = chooser_of(ways)
    other = CALL._replace(shape=(4, 8))
    for call in (CALL, other, CALL, other, CALL):
        assert chooser.choose(call, ways, draw) is ways["a"]
    assert len(drawn) == 2
    assert list(chooser.made) == [CALL, other]
    assert all(arguments == (X,) for way in ways.values() for arguments in way.seen)


def test_what_cannot_be_compiled_is_computed_by_torch_and_said_once(caplog):
    ways = {TORCH: Way(1.0), "a": Way(0.1, error=RuntimeError("no ptxas here"))}
    chooser = chooser_of(ways)
    with caplog.at_level(logging.WARNING):
        for shape in ((8, 4), (4, 8), (8, 4)):
            assert chooser.choose(CALL._replace(shape=shape), ways, lambda: (X,)) is ways[TORCH]
    assert [record.name for record in caplog.records] == ["randlora_torch.kernel_choice"]
    assert "RuntimeError: no ptxas here" in caplog.text
    assert {choice.reason for choice in chooser.made.values()} == {"RuntimeError: no ptxas here"}


def test_a_kernel_that_computes_something_else_is_never_used(caplog):
    wrong = RIGHT.clone()
    wrong[3, 1] += 1
    with caplog.at_level(logging.WARNING):
        chooser, name = choose({TORCH: Way(1.0), "a": Way(0.1, wrong)})
    assert name == TORCH
    assert chooser.made[CALL].reason == "its result is not torch's"
    assert "its result is not torch's" in caplog.text


def test_an_error_of_torch_is_nobodys_to_catch():
    with pytest.raises(OSError, match="out of luck"):
        choose({TORCH: Way(1.0, error=OSError("out of luck")), "a": Way(0.1)})


def test_nothing_is_run_where_nothing_may_be_tried_but_what_was_chosen_before_is_used():
    ways = {TORCH: Way(1.0), "a": Way(0.5)}
    chooser, name = choose(ways, may_try=False)
    assert (name, chooser.made) == (TORCH, {})
    assert [way.seen for way in ways.values()] == [[], []]
    chooser.choose(CALL, ways, lambda: (X,))
    assert chooser.choose(CALL, ways, lambda: (X,), may_try=False) is ways["a"]


@pytest.mark.parametrize(("kernels", "chosen"), [("torch", TORCH), ("triton", "a")])
def test_an_explicit_setting_measures_nothing(kernels, chosen):
    ways = {TORCH: Way(1.0), "a": Way(9.0), "b": Way(0.1)}
    chooser = chooser_of(ways)
    chooser.kernels = kernels
    assert chooser.choose(CALL, ways, lambda: (X,)) is ways[chosen]
    assert [way.seen for way in ways.values()] == [[], [], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_agree_if_they_differ_by_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    want = torch.randn(3000, 40, generator=generator, dtype=torch.float64)
    tolerance = kernel_choice._TOLERANCE[str(dtype).removeprefix("torch.")]
    rounded = want.to(dtype)
    assert agree(rounded, want, tolerance)
    assert agree((rounded, rounded), (want, want), tolerance)
    for row, column in ((0, 0), (1500, 7), (2999, 39)):
        wrong = rounded.clone()
        wrong[row, column] += 1
        assert not agree(wrong, want, tolerance)
        assert not agree((rounded, wrong), (want, want), tolerance)
        wrong[row, column] = torch.nan
        assert not agree(wrong, want, tolerance)


@pytest.fixture
def settings(monkeypatch):
    """The module's own chooser, as it was."""
    monkeypatch.setattr(kernel_choice.chooser, "kernels", "auto")
    return kernel_choice.chooser


def test_kernels_are_set_by_name(settings):
    for name in ("torch", "auto"):
        set_kernels(name)
        assert settings.kernels == name
    message = r"kernels='cuda' is not known: choose one of \['auto', 'triton', 'torch'\]"
    with without_type_checks(), pytest.raises(ValueError, match=message):
        set_kernels("cuda")


def test_triton_cannot_be_set_where_it_is_not_installed(settings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs Triton, which torch installs with its builds for GPUs"):
        set_kernels("triton")
    assert settings.kernels == "auto"


def parts(dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (8, 4), "bases_A": (2, 4), "bases_B": (8, 2, 2), "lam": (2, 2), "gamma": (2, 4)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()} | options


def kernels_for(dtype=torch.float32, **options):
    return fused._kernels_for(*parts(**options).values(), dtype=dtype)


@pytest.fixture
def as_if_the_cpu_had_kernels(monkeypatch, settings):
    monkeypatch.setattr(fused, "_DEVICES", ("cpu",))
    monkeypatch.setattr(fused, "_kernels", lambda: fused)
    assert kernels_for() is fused


@pytest.mark.usefixtures("as_if_the_cpu_had_kernels")
class TestKernelsAreLeftAlone:
    def test_in_deterministic_mode_unless_asked_for(self, settings):
        torch.use_deterministic_algorithms(True)
        try:
            assert kernels_for() is None
            settings.kernels = "triton"
            assert kernels_for() is fused
        finally:
            torch.use_deterministic_algorithms(False)

    def test_where_torch_is_set(self, settings):
        settings.kernels = "torch"
        assert kernels_for() is None

    def test_while_torch_compiles(self):
        def double(x):
            return 2 * x if fused._kernels_for(x, x, x[:, None], dtype=x.dtype) is None else x

        torch._dynamo.reset()
        assert torch.equal(torch.compile(double, backend="eager", fullgraph=True)(RIGHT), 2 * RIGHT)

    def test_under_transformations_of_functions(self):
        given = parts().values()

        def double(x):
            return 2 * x if fused._kernels_for(*given, dtype=x.dtype) is None else x

        assert torch.equal(torch.func.vmap(double)(RIGHT), 2 * RIGHT)

    def test_for_what_is_differentiated_again(self):
        gamma = torch.randn(2, 4, requires_grad=True)
        assert kernels_for(gamma=gamma) is None
        with torch.no_grad():
            assert kernels_for(gamma=nn.Parameter(gamma)) is fused

    def test_for_other_dtypes_devices_classes_and_strides(self):
        assert kernels_for(dtype=torch.float64) is None
        assert kernels_for(weight=torch.zeros(8, 4, dtype=torch.float64)) is None
        assert kernels_for(lam=torch.zeros(2, 2, device="meta")) is None
        assert kernels_for(lam=nn.Parameter(torch.zeros(2, 2)).as_subclass(Tagged)) is None
        assert kernels_for(bases_B=torch.zeros(2, 8, 2).transpose(0, 1)) is None
        assert kernels_for(bases_B=torch.zeros(9, 2, 2)[:8]) is fused


class Tagged(torch.Tensor):
    pass


def test_on_the_cpu_torch_computes(settings):
    given = parts()
    options = {"scaling": 2.0, "dtype": torch.float32}
    folded = fused.fold(**given, **options, out_features=8, torch_way=lambda lam, gamma: lam @ gamma)
    assert torch.equal(folded, given["lam"] @ given["gamma"])
    given["grad_weight"] = given.pop("weight")
    projected = fused.project(**given, **options, torch_way=lambda grad, lam, gamma: (grad, lam @ gamma))
    assert projected[0] is given["grad_weight"]
    assert torch.equal(projected[1], folded)
    assert kernel_choice.kernel_choices() == []

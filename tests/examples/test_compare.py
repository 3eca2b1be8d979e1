"""The comparisons of RandLoRA and LoRA: a few steps of everything, and the results that the documentation shows."""

import ast
import json
import statistics

import pytest

import interop
from tests.examples.running import EXAMPLES, docstring, run

DOCS = EXAMPLES.parent / "docs"
RANDLORA = ["RandLoRA, dense", "RandLoRA, sparse", "RandLoRA, very sparse"]
METHODS = {"full fine-tuning", "LoRA", *RANDLORA, "AdaLoRA"}
STACKS = {"flax": "11_compare_flax.py", "torch": "12_compare_torch.py"}
SHAPES = {  # (out, in) of the adapted weights
    "flax": [(64, 64)] * 8 + [(256, 64)] * 2 + [(64, 256)] * 2,
    "torch": [(96, 96)] * 8 + [(320, 96)] * 4 + [(96, 320)] * 2,
}


@pytest.fixture(scope="module", params=STACKS)
def compared(request, tmp_path_factory):
    """The stack, the folder that its example wrote, and the lines that it printed."""
    name, folder = STACKS[request.param], tmp_path_factory.mktemp(request.param)
    lines = run(name, folder, JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # to compile faster
    return request.param, folder / "runs" / name.removesuffix(".py"), lines


def runs_of(out):
    return {run["method"]: run for run in json.loads((out / "results.json").read_text())["runs"]}


def randlora_count(stack, r):
    return sum(interop.shapes.count_trainable(shape, r) for shape in SHAPES[stack])


def lora_count(stack, rank):
    return sum(rank * (out + inputs) for out, inputs in SHAPES[stack])


def budgets(stack):
    """Rank of LoRA and r of RandLoRA that the example compares."""
    tree = ast.parse((EXAMPLES / STACKS[stack]).read_text(encoding="utf-8"))
    (node,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "BUDGETS"]
    return ast.literal_eval(node)


def table(text):
    """The rows of the only table, each a list of cells; the head first."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("| ---")]


def test_every_method_is_trained_and_counted(compared):
    stack, out, lines = compared
    assert f"\n    {lines[-1]}\n" in docstring(STACKS[stack]) + "\n"
    runs = runs_of(out)
    assert set(runs) == METHODS
    assert all(len(run["scores"]) == len(run["trainable"]) == 2 for run in runs.values())
    for name in RANDLORA:
        assert runs[name]["trainable"] == [randlora_count(stack, runs[name]["r"])] * 2
    assert runs["LoRA"]["trainable"] == [lora_count(stack, runs["LoRA"]["r"])] * 2
    smallest, largest = (f(map(sum, SHAPES[stack])) + 1 for f in (min, max))  # of one triplet
    triplets = len(SHAPES[stack]) * runs["AdaLoRA"]["r"]
    assert all(triplets * smallest <= count <= triplets * largest for count in runs["AdaLoRA"]["trainable"])
    assert runs["full fine-tuning"]["trainable"][0] > sum(out * inputs for out, inputs in SHAPES[stack])


def test_training_changes_each_model(compared):
    """By as little as few steps do, but every method and seed to other numbers than the base and the other seed."""
    stack, out, _ = compared
    result = json.loads((out / "results.json").read_text())
    if stack == "torch":  # accuracies of a few steps may be equal
        assert all(len({result["base"], *run["scores"]}) == 3 for run in result["runs"])
    assert all(len(run["sweep"]) == len(result["rates"]) == 2 for run in result["runs"])
    assert all(run["rate"] in result["rates"] for run in result["runs"])


@pytest.mark.parametrize("stack", STACKS)
def test_the_methods_of_a_budget_train_equally_many_parameters(stack):
    for rank, r in budgets(stack).items():
        assert randlora_count(stack, r) == pytest.approx(lora_count(stack, rank), rel=0.01)


def test_the_table_is_made_of_the_raw_numbers(compared):
    stack, out, lines = compared
    text = (out / "results.md").read_text()
    assert set(text.splitlines()) <= set(lines)
    digits, rows = {"flax": 1, "torch": 3}[stack], {row[0]: row for row in table(text)[1:]}
    assert float(rows.pop("base, not adapted")[4]) > 0
    for name, trained in runs_of(out).items():
        scores = [statistics.median(trained["scores"]), *sorted(trained["scores"])]
        shown = [f"{statistics.median(trained['trainable']):,.0f}", f"{trained['rate']:g}"]
        shown += [f"{number:.{digits}f}" for number in scores]
        assert rows[name][1:7] == [str(trained["r"] or ""), *shown]
    assert rows["LoRA"][7] == "1.00"
    assert rows.keys() == METHODS


def test_the_picture_is_drawn(compared):
    picture = (compared[1] / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


@pytest.mark.parametrize("stack", STACKS)
def test_the_page_shows_the_results_of_the_example_as_it_is(stack):
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    result = (DOCS / "comparison" / f"{stack}.md").read_text(encoding="utf-8")
    shown = [line for line in result.splitlines() if line and not line.startswith("#")]
    assert len(shown) > 10
    assert "\n".join(line for line in shown if line.startswith("|")) in page
    assert all(line in page for line in shown)
    assert f"comparison/{stack}.png" in page
    assert (DOCS / "comparison" / f"{stack}.png").read_bytes().startswith(b"\x89PNG")
    rows = {(row[0], row[1]) for row in table(result)[1:]}
    want = {("base, not adapted", ""), ("full fine-tuning", "")}
    for rank, r in budgets(stack).items():
        want |= {("LoRA", str(rank)), ("AdaLoRA", str(rank)), *((name, str(r)) for name in RANDLORA)}
    assert rows == want

"""Layouts of all kernels of a model, read from the jaxpr of its forward pass.

Each parameter is followed through the trace as a `Track`, which knows where its axes have gone. A matrix product with
data (a value computed from the inputs) settles what they are: contracted axes are inputs, batched, scanned and indexed
ones number separate weights, the rest are outputs. Whatever else happens to a parameter is kept as the reason why it
is no kernel. Names of modules play no part, so any framework and any way to write a layer will do.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import Jaxpr

from randlora_jax.layout_rules import Parameter
from randlora_jax.layouts import Layout, module_name, path_parts
from randlora_jax.naming import Rules, apply_rules, read_rules
from randlora_jax.quantized import is_quantized
from randlora_jax.tracing.array_rules import ARRAY_RULES
from randlora_jax.tracing.propagation import CONTROL_FLOW, Findings, Propagation, Value
from randlora_jax.tracing.tracks import Track


@dataclasses.dataclass(frozen=True, eq=False)
class InferredLayouts(Mapping[str, Layout]):
    """Layouts of the kernels of a model by dotted name, to be passed on as `layouts`; printing it gives a table.

    Attributes:
        layouts: Layout of each parameter that can be adapted.
        refused: What each of the other parameters is instead, by name.
        shapes: Shapes of all parameters by name.
    """

    layouts: Mapping[str, Layout]
    refused: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def named(self, rules: Rules) -> "InferredLayouts":
        """These layouts with the names that rules give the weights in adapter files, and the axes that they speak of.

        Args:
            rules: One of `LAYOUTS`, a YAML file, or a list of `LayoutRule`. One without axes is for kernels found by
                the trace only; one with all axes also makes a kernel of what was refused.

        Raises:
            ValueError: as `name_layouts`, or a rule contradicts the trace.
        """
        parsed, table = read_rules(rules)
        parameters = [Parameter(name, None, shape) for name, shape in self.shapes.items()]
        named = apply_rules(parsed, parameters, self.layouts, table=table)
        refused = {name: reason for name, reason in self.refused.items() if name not in named}
        return dataclasses.replace(self, layouts={**self.layouts, **named}, refused=refused)

    def __getitem__(self, name: str) -> Layout:
        return self.layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layouts)

    def __len__(self) -> int:
        return len(self.layouts)

    def __str__(self) -> str:
        """A table with one line for each parameter, kernels first."""
        rows = [(name, _in_words(layout)) for name, layout in self.layouts.items()]
        rows += [(name, f"refused: {reason}") for name, reason in self.refused.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def infer_layouts(fn: Callable[..., Any], params: Any, *inputs: Any) -> InferredLayouts:
    """Find the kernels among `params` and their layouts, by an abstract trace of `fn(params, *inputs)`.

    What the forward pass does not run is not found, so trace the model as it is used, without gradients: a backward
    pass contracts the other axes. Data are `inputs` only; an array that `fn` closes over counts as a constant.

    Args:
        fn: The forward pass: `model.apply` for linen, `lambda state, x: nnx.merge(graphdef, state)(x)` for NNX.
            It sees an array in place of a quantized kernel.
        params: A pytree of arrays or ShapeDtypeStructs. Leaves without a shape are passed on as they are.
        *inputs: Pytrees of arrays or ShapeDtypeStructs; other leaves, such as a flag, are passed on as they are.

    Returns:
        Layouts by the names that `init` and `attach` use, and a reason for every other parameter.

    Raises:
        ValueError: two parameters have one name.

    >>> import jax, jax.numpy as jnp
    >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
    >>> print(infer_layouts(lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"], params, jnp.ones((2, 4))))
    up       in (0,), out (1,)
    up.bias  refused: only added to activations, never in a matrix product
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_one_leaf)
    leaves, (data, data_tree) = [leaf for _, leaf in paths], jax.tree.flatten(inputs)
    arrays, data_arrays = _arrays(leaves), _arrays(data)

    def forward(arrays: dict[int, Any], data_arrays: dict[int, Any]) -> list[Any]:
        given = jax.tree.unflatten(data_tree, [data_arrays.get(i, leaf) for i, leaf in enumerate(data)])
        out = fn(jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]), *given)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    names = _distinct([module_name(path_parts(paths[i][0])) for i in arrays])
    shapes = {name: tuple(array.shape) for name, array in zip(names, arrays.values(), strict=True)}
    return _read(jax.make_jaxpr(forward)(arrays, data_arrays).jaxpr, shapes)


def _read(jaxpr: Jaxpr, shapes: dict[str, tuple[int, ...]]) -> InferredLayouts:
    """Follow the parameters, which are the first inputs of the jaxpr, and judge each by what was found."""
    values = [Value(tracks=(Track.start(name, shape),)) for name, shape in shapes.items()]
    values += [Value(data=True)] * (len(jaxpr.invars) - len(values))
    walk = Propagation({**ARRAY_RULES, **CONTROL_FLOW}, {name: Findings() for name in shapes})
    for result in walk.run(jaxpr, values):
        walk.end(result.tracks, "returned")
    layouts: dict[str, Layout] = {}
    refused: dict[str, str] = {}
    for name, findings in walk.findings.items():
        verdict = _judge(findings)
        if isinstance(verdict, Layout):
            layouts[name] = verdict
        else:
            refused[name] = verdict
    return InferredLayouts(layouts, refused, shapes)


def _judge(findings: Findings) -> Layout | str:
    """The layout of a parameter, or why it has none."""
    products = list(findings.with_data)
    if findings.convolved:
        return "the kernel of a convolution"
    if findings.looked_up:
        tied = f", tied to a matrix product with {_in_words(products[0])}" if products else ""
        return f"an embedding table (rows are looked up){tied}"
    if len(products) > 1:
        return f"used in different ways: {'; and '.join(map(_in_words, products))}"
    if products:
        return products[0]
    if any(isinstance(reading, Layout) for reading in findings.without_data):
        return "multiplied by another parameter or a constant, never by data: pass its Layout if it is a kernel"
    if findings.without_data:
        return next(iter(findings.without_data))
    if findings.ends:
        return f"only {' and '.join(findings.ends)}, never in a matrix product"
    return "not used"


def _in_words(reading: Layout | str) -> str:
    if isinstance(reading, str):
        return reading
    text = f"in {reading.in_axes}, out {reading.out_axes}" + f", stack {reading.stack_axes}" * bool(reading.stack_axes)
    text += f", times {reading.scale}" * (reading.scale != 1) + ", interleaved" * reading.interleaved
    return text + (f": {_shortened(reading.modules)}" if reading.modules else "")


def _shortened(names: tuple[str | None, ...]) -> str:
    shown = [str(name) for name in (names if len(names) < 4 else (*names[:2], "...", names[-1]))]
    return ", ".join(shown)


def _is_one_leaf(node: Any) -> bool:
    """Whether a node stands for one kernel. Asked of its class, as an nnx.Variable answers for its value."""
    return is_quantized(node) or hasattr(type(node), "dequantize")


def _arrays(leaves: list[Any]) -> dict[int, Any]:
    """The leaves that are traced, by position, with abstract arrays in place of quantized kernels."""
    return {
        i: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) if _is_one_leaf(leaf) else leaf
        for i, leaf in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }


def _distinct(names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two parameters are called {name!r}: rename one, or its leaf.")
    return names

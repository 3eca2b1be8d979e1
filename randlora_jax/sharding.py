"""Where an adapter lies on a mesh: partition specs for its factors and bases, derived from the kernels' own.

gamma's columns follow the short side of its kernel. B is sharded by rows, over those mesh axes of the kernels' long
sides that divide it most. lambda and A are small and replicated. Of AdaLoRA, A's columns follow the inputs of its
kernel, B's rows the outputs, and E is replicated. Optimizer states follow the factors.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from interop.adalora import SVDFactors
from interop.bases import Bases
from interop.delta import Factors
from randlora_jax.adalora_adapter import AdaLoraAdapter
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.kernels import AnyFactors, named_leaves
from randlora_jax.layouts import IN_OUT, Layout, module_name

Tree = TypeVar("Tree")
AdapterOfKind = TypeVar("AdapterOfKind", bound=RandLoraAdapter | AdaLoraAdapter)
MeshAxes = tuple[str, ...]
AnyMesh = Mesh | AbstractMesh


def adapter_specs(adapter: AdapterOfKind, specs: Mapping[str, PartitionSpec], mesh: AnyMesh) -> AdapterOfKind:
    """The adapter with a `PartitionSpec` in place of each array.

    An array whose axis the mesh does not divide evenly is replicated along it.

    Args:
        adapter: An adapter whose shapes are known.
        specs: Specs of the kernels by `adapter.modules`; a kernel without one counts as replicated.
        mesh: The mesh whose axes the specs name.

    Raises:
        ValueError: the adapter does not know its shapes.
    """
    if adapter.shapes is None:
        raise ValueError("the adapter does not know the shapes of its layers: load_adapter(source, params) finds them.")
    layouts = dict(adapter.layouts)
    factors: dict[str, Any] = {}
    long_sides: collections.Counter[MeshAxes | None] = collections.Counter()
    given: Any = adapter  # of either kind
    for name, shape in adapter.shapes:
        parts: AnyFactors = adapter.factors[name]
        out, inp = _mesh_axes(specs.get(name, PartitionSpec()), layouts.get(name, IN_OUT))
        if isinstance(parts, SVDFactors):
            factors[name] = _triplet_specs(parts, _even(out, shape[0], mesh), _even(inp, shape[1], mesh))
            continue
        long, short = (out, inp) if shape[0] >= shape[1] else (inp, out)
        gamma, stacked = parts.gamma, parts.lam.ndim - 2
        columns = _even(short, gamma.shape[-1], mesh)
        factors[name] = Factors(PartitionSpec(), PartitionSpec(*[None] * (stacked + 1), columns))
        long_sides[_even(long, given.bases.B.shape[0], mesh)] += 1
    if given.bases is None:
        return dataclasses.replace(given, factors=factors)
    del long_sides[None]
    rows = max(long_sides, key=lambda axes: (_devices(axes or (), mesh), long_sides[axes]), default=None)
    spec_B = jax.tree.map(lambda _: PartitionSpec(rows), given.bases.B)
    return dataclasses.replace(given, factors=factors, bases=Bases(PartitionSpec(), spec_B))


def adapter_shardings(adapter: AdapterOfKind, params: Any) -> AdapterOfKind | None:
    """The adapter with a `NamedSharding` in place of each array, to go with the shardings that its kernels have.

    `jax.device_put(adapter, shardings)` places the adapter; `shardings.trainable` is what a training step's
    `out_shardings` should say, lest XLA chooses others for its outputs, which costs a second compilation.

    Returns:
        None if no adapted kernel lies on a mesh.

    Raises:
        ValueError: the adapted kernels lie on different meshes.
    """
    return _shardings(adapter, named_leaves(params))


def like_kernels(adapter: AdapterOfKind, leaves: Iterable[tuple[tuple[str, ...], Any]]) -> AdapterOfKind:
    """The adapter on the mesh of the parameters, given as paths and leaves; as it is if they lie on one device."""
    shardings = _shardings(adapter, leaves)
    return adapter if shardings is None else jax.device_put(adapter, shardings)


def shardings_of(tree: Tree) -> Tree:
    """The sharding of every array in a tree, such as an optimizer state, for `out_shardings`.

    None, which leaves the choice to XLA, for an array that lies where it does by default only, such as the step count
    of an optimizer state.
    """
    return jax.tree.map(lambda leaf: leaf.sharding if getattr(leaf, "committed", True) else None, tree)


def pin(tree: Tree, shardings: Tree) -> Tree:
    """The same values with the given shardings, inside jit: in a mesh with automatic and with explicit axes alike."""

    def place(leaf: jax.Array, sharding: Any) -> jax.Array:
        if not isinstance(sharding, NamedSharding):  # a single device
            return leaf
        if AxisType.Explicit in sharding.mesh.axis_types:
            return jax.sharding.reshard(leaf, sharding)
        return jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(place, tree, shardings, is_leaf=lambda leaf: leaf is None)


def _triplet_specs(factors: SVDFactors, out: MeshAxes | None, inp: MeshAxes | None) -> SVDFactors:
    stacked = [None] * (factors.E.ndim - 2)
    return SVDFactors(PartitionSpec(*stacked, None, inp), PartitionSpec(), PartitionSpec(*stacked, out, None))


def _shardings(adapter: AdapterOfKind, leaves: Iterable[tuple[tuple[str, ...], Any]]) -> AdapterOfKind | None:
    named = {module_name(parts): getattr(leaf, "sharding", None) for parts, leaf in leaves}
    spread = {
        name: sharding
        for name, sharding in named.items()
        if name in adapter.factors and isinstance(sharding, NamedSharding)
    }
    if not spread:
        return None
    meshes = {sharding.mesh: name for name, sharding in spread.items()}
    if len(meshes) > 1:
        on = ", ".join(f"{name!r} on {dict(mesh.shape)}" for mesh, name in meshes.items())
        raise ValueError(f"the adapted kernels lie on different meshes: {on}. Put them on one, or adapt fewer.")
    (mesh,) = meshes
    specs = adapter_specs(adapter, {name: sharding.spec for name, sharding in spread.items()}, mesh)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def _mesh_axes(spec: PartitionSpec, layout: Layout) -> tuple[MeshAxes, MeshAxes]:
    """Mesh axes of the rows (out) and columns (in) of the torch weight: those of the outermost axis of each group."""
    entries = {axis: entry for axis, entry in enumerate(spec) if entry is not None}
    groups = (entries.get(axes[0], ()) for axes in (layout.out_axes, layout.in_axes))
    out, inp = ((entry,) if isinstance(entry, str) else tuple(entry) for entry in groups)
    return out, inp


def _even(axes: MeshAxes, size: int, mesh: AnyMesh) -> MeshAxes | None:
    """The mesh axes if they divide `size` evenly, else None."""
    return axes if axes and size % _devices(axes, mesh) == 0 else None


def _devices(axes: MeshAxes, mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)

"""Orbax checkpoints of a training run: the factors, the optimizer's state, and a description of what they belong to.

The base model and the bases are not written, only checksums of them. Where those are others, a checkpoint is refused.
Needs the extra `orbax`; no other module imports this one.
"""

import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interop.errors import AdapterFormatError, bulleted
from randlora_jax.provenance import FORMAT, VERSION, describe, differences
from randlora_jax.selection import AnyAdapter

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError("orbax-checkpoint is not installed: pip install 'randlora[orbax]'.") from error

_DESCRIPTION = "adapter"  # the item of a checkpoint that holds no arrays


class Restored(NamedTuple):
    """What training goes on from: `step` updates were made, and gave `trainable` and `opt_state`."""

    step: int
    trainable: Any
    opt_state: Any


class AdapterCheckpoints:
    """The checkpoints of one run in one directory, on `orbax.checkpoint.CheckpointManager`.

    Saving happens in the background; leaving the `with` block, or `close`, waits for it and raises what went wrong. A
    process that is killed meanwhile leaves the earlier checkpoints whole. With several processes, call everything in
    all of them; arrays may be spread over them.

    The resumed run equals the uninterrupted one bit for bit if its step is compiled for the same shardings: on a mesh,
    give the step `out_shardings` (`randlora_jax.sharding`).

    Attributes:
        manager: The `CheckpointManager`, e.g. for `wait_until_finished`, `delete` or `reached_preemption`.

    Args:
        directory: Of the run; a path, or a URL that Orbax knows, such as "gs://...".
        adapter: Of the run, as `init`, `load_adapter` or `extract` gives it.
        params: What it adapts: a pytree of parameters or an NNX model. Checksums of the adapted kernels go into the
            checkpoints and are compared with theirs; they are computed where the kernels lie. None leaves this out.
        max_to_keep: How many checkpoints stay, the newest ones; None keeps all.
        save_interval_steps: `save` writes at steps that this divides, and at the first call in an empty directory.

    Raises:
        AdapterFormatError: the directory holds checkpoints of another adapter or base model, or of other software.
        ValueError: the adapter does not know its shapes, or `params` lacks an adapted kernel.

    Example:
        with AdapterCheckpoints("checkpoints", adapter, params, max_to_keep=2) as checkpoints:
            start, trainable, state = checkpoints.restore(adapter.trainable, optimizer.init(adapter.trainable))
            for step in range(start, steps):
                trainable, state, loss = train_step(trainable, state, adapter, params, batches[step])
                checkpoints.save(step + 1, trainable, state)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        adapter: AnyAdapter,
        params: Any,
        *,
        max_to_keep: int | None = None,
        save_interval_steps: int = 1,
    ) -> None:
        self._directory = _absolute(directory)
        self._description = describe(adapter, params)
        self._size = sum(leaf.size for leaf in jax.tree.leaves(adapter.trainable))
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, save_interval_steps=save_interval_steps)
        self.manager = ocp.CheckpointManager(self._directory, options=options)
        try:
            if self.steps:
                self._read_description(self.steps[-1])
        except BaseException:
            self.manager.close()
            raise

    def __enter__(self) -> "AdapterCheckpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps there is a checkpoint of, oldest first."""
        return tuple(sorted(self.manager.all_steps()))

    def restore(self, trainable: Any, opt_state: Any = None, *, step: int | None = None) -> Restored:
        """The newest checkpoint, or step 0 with what is given if there is none yet.

        Args:
            trainable: A pytree with the arrays that training starts from, such as `adapter.trainable` or
                `nnx.state(model, RandLoraParam)`. What is restored has its structure, dtypes and shardings.
            opt_state: Likewise; None restores `trainable` only, e.g. for `adapter.with_trainable(...)`.
            step: Which checkpoint, if not the newest.

        Raises:
            AdapterFormatError: the checkpoint is of another adapter, base model or optimizer, or of other software.
            ValueError: there is no checkpoint of that step.
        """
        self.manager.wait_until_finished()
        if step is None and not self.steps:
            return Restored(0, trainable, opt_state)
        if step is not None and step not in self.steps:
            raise ValueError(f"step={step}: {self._directory} has checkpoints of {self.steps}. None takes the newest.")
        step = self.steps[-1] if step is None else step
        description = self._read_description(step)
        given = {"trainable": trainable} | ({} if opt_state is None else {"opt_state": opt_state})
        differing = [line for item in given for line in _differing_arrays(item, description[item], given[item])]
        if differing:
            raise AdapterFormatError(
                bulleted(f"step {step} in {self._directory} holds other arrays than those given", differing)
                + "\nMake the optimizer as in the run that wrote it, and give arrays of its dtypes."
            )
        targets = {item: _targets(tree) for item, tree in given.items()}
        args = {item: ocp.args.StandardRestore(arrays) for item, arrays in targets.items() if arrays}
        read = self.manager.restore(step, args=ocp.args.Composite(**args)) if args else {}
        restored = {item: _like(tree, read[item] if item in args else {}) for item, tree in given.items()}
        return Restored(step, restored["trainable"], restored.get("opt_state"))

    def save(self, step: int, trainable: Any, opt_state: Any, *, force: bool = False) -> bool:
        """Write a checkpoint in the background, if `save_interval_steps` says so.

        Args:
            step: Number of updates made. Nothing is written if it is the newest checkpoint's.
            trainable: See `restore`.
            opt_state: The optimizer's state, and whatever else training depends on, e.g. `(state, key)`.
            force: Write at any step, e.g. after the last.

        Returns:
            Whether a checkpoint is being written.

        Raises:
            ValueError: there is a later checkpoint, or `trainable` is not the adapter's.
        """
        step = operator.index(step)
        newest = max(self.steps, default=None)
        if newest is not None and step < newest:
            raise ValueError(
                f"step={step}: {self._directory} has a checkpoint of a later step, {newest}. Go on in another"
                f" directory, or remove the later ones with checkpoints.manager.delete(step)."
            )
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(trainable))
        if size != self._size:
            raise ValueError(
                f"trainable holds {size:,d} numbers, the adapter trains {self._size:,d}: pass adapter.trainable as it"
                " was updated, or nnx.state(model, RandLoraParam). The base model and the bases are not saved."
            )
        if step == newest or not (force or self.manager.should_save(step)):
            return False
        given = {"trainable": trainable, "opt_state": opt_state}
        items = {item: _stored(tree) for item, tree in given.items()}
        description = self._description | {item: _kinds(tree) for item, tree in given.items()}
        args = {item: ocp.args.StandardSave(arrays) for item, arrays in items.items() if arrays}
        args[_DESCRIPTION] = ocp.args.JsonSave(description)
        return self.manager.save(step, args=ocp.args.Composite(**args), force=True)

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            Exception: what went wrong in the background.
        """
        self.manager.close()

    def _read_description(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself, compared with this run."""
        place = f"step {step} in {self._directory}"
        try:
            args = ocp.args.Composite(**{_DESCRIPTION: ocp.args.JsonRestore()})
            read = self.manager.restore(step, args=args)[_DESCRIPTION]
        except (KeyError, FileNotFoundError, ValueError) as error:
            raise AdapterFormatError(f"{place} is no checkpoint of an adapter: give another directory.") from error
        if not isinstance(read, dict) or read.get("format") != FORMAT:
            raise AdapterFormatError(f"{place} is no checkpoint of an adapter: give another directory.")
        if read.get("version") != VERSION:
            raise AdapterFormatError(
                f"{place} has format version {read.get('version')!r}, this release reads {VERSION}. Read it with the"
                " release of randlora that wrote it, and carry the adapter over with save_pretrained."
            )
        differing = differences(read, self._description)
        if differing:
            raise AdapterFormatError(
                bulleted(f"{place} is a checkpoint of another adapter or base model", differing)
                + "\nUse the config and the base model of the run that wrote it, or give another directory."
            )
        return read


def _absolute(directory: str | os.PathLike[str]) -> str:
    """The directory as Orbax wants it, unless it is none or a single checkpoint."""
    path = os.fspath(directory)
    if "://" in path:
        return path
    path = os.path.abspath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise AdapterFormatError(f"{path} is a file: give the directory that holds, or is to hold, the checkpoints.")
    if os.path.exists(os.path.join(path, "_CHECKPOINT_METADATA")):
        raise AdapterFormatError(f"{path} is a single checkpoint: give its parent, and step= in restore.")
    return path


def _differing_arrays(item: str, saved: dict[str, str], tree: Any) -> list[str]:
    given = _kinds(tree)
    return [
        f"{item} {name}: {saved.get(name, 'none')} in the checkpoint, {given.get(name, 'none')} given"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
    ]


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, whatever containers they are in."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/") or "array": leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(f"two of the {len(leaves)} arrays have one path; the paths are {list(named)}. Rename a key.")
    return named


def _kinds(tree: Any) -> dict[str, str]:
    """Dtype and shape of each array."""
    named = {name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for name, leaf in _named(tree).items()}
    for name, leaf in named.items():
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU":
            raise ValueError(f"{name} is {leaf.tolist()!r}: a checkpoint holds arrays and numbers. Leave it out.")
    return {name: f"{leaf.dtype}{leaf.shape}" for name, leaf in named.items()}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_local(leaf: Any) -> bool:
    """Whether each process has an array of its own; Orbax takes arrays that belong to all of them."""
    return jax.process_count() > 1 and leaf.is_fully_addressable


def _stored(tree: Any) -> dict[str, jax.Array | np.ndarray]:
    """The arrays that Orbax gets: the bits of random keys, and numpy's for Python numbers and what each process has.

    It takes none of size zero, as a layer's are of which no triplet is left.
    """

    def store(leaf: Any) -> jax.Array | np.ndarray:
        leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        return leaf if isinstance(leaf, jax.Array) and not _is_local(leaf) else np.asarray(leaf)

    return {name: store(leaf) for name, leaf in _named(tree).items() if np.size(leaf)}


def _targets(tree: Any) -> dict[str, jax.ShapeDtypeStruct | np.ndarray]:
    """What Orbax is to read: arrays on devices where a sharding was chosen, numpy's elsewhere.

    An array that lies on a device by default only, such as an optax counter made outside of jit, would else be bound to
    that device, and could not be used along with arrays on a mesh.
    """

    def target(leaf: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct | np.ndarray:
        if isinstance(leaf, jax.Array) and leaf.committed:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        return np.empty(leaf.shape, leaf.dtype)

    return {name: target(leaf) for name, leaf in _stored(tree).items()}


def _like(tree: Any, arrays: Mapping[str, jax.Array | np.ndarray]) -> Any:
    """The arrays in the containers of `tree`."""

    def like(leaf: Any, array: jax.Array | np.ndarray) -> Any:
        if _is_key(leaf):
            return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array):
            return jnp.asarray(array)
        return array if isinstance(leaf, np.ndarray) else type(leaf)(array)

    leaves = [like(leaf, arrays[name]) if np.size(leaf) else leaf for name, leaf in _named(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)

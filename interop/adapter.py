"""`Adapter`: config, factors and bases in numpy, keyed by torch module name, in torch's (out, in) coordinates.

Conversion between stacks is renaming arrays to and from this form; it never transposes or rescales a factor.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from interop import adalora
from interop.adalora import AdaLoraConfig, SVDFactors
from interop.bases import BFLOAT16, DEFAULT_RECIPE, FLOAT16, Bases, cut_bases, make_bases
from interop.config import RandLoraConfig
from interop.delta import Factors, product_blocks
from interop.errors import AdapterFormatError, bulleted
from interop.fields import AdapterConfig
from interop.shapes import MAX_SIDE, Dims, bases_shapes, factor_shapes, num_bases, shared_dims

FLOAT_DTYPES = (np.dtype(np.float32), BFLOAT16, FLOAT16)  # what factors and bases may be stored in


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A RandLoRA or AdaLoRA adapter without a framework: what PEFT's two files hold, and what they leave to the model.

    Attributes:
        config: The adapter's `RandLoraConfig` or `AdaLoraConfig`.
        factors: lambda and gamma of each adapted layer, or AdaLoRA's A, E and B, of which only the triplets are held
            that `config.rank_pattern` leaves; by torch module name, in the dtype they are stored in.
        bases: The one pair of frozen bases, or None for a file without them that was not bound to a model yet. AdaLoRA
            has none.
        recipe: Name of the recipe that made the bases (`interop.RECIPES`), None if no recipe is known to.
        shapes: (out, in) of each adapted layer; None if the file does not say and no model was seen yet. The weight of
            a convolution counts as (out, in * height * width).
        saved_weights: Other tensors of the file that the config accounts for (trained biases, modules_to_save), under
            the keys they have there.

    Raises:
        AdapterFormatError: the parts do not fit together; every misfit is listed.
    """

    config: Any  # RandLoraConfig or AdaLoraConfig
    factors: Mapping[str, Any]  # Factors or SVDFactors
    bases: Bases | None = None
    recipe: str | None = None
    shapes: Mapping[str, tuple[int, int]] | None = None
    saved_weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sort the modules by name and check that all parts fit together."""
        kind = factors_kind(self.config)
        foreign = [name for name in sorted(self.factors) if len(self.factors[name]) != len(kind._fields)]
        if foreign:
            raise AdapterFormatError(
                bulleted(f"a layer has {' and '.join(kind._fields)} in {self.config.METHOD}, unlike these", foreign)
            )
        object.__setattr__(self, "factors", {name: kind(*self.factors[name]) for name in sorted(self.factors)})
        if self.shapes is not None:
            shapes = {name: (int(out), int(inp)) for name, (out, inp) in sorted(self.shapes.items())}
            object.__setattr__(self, "shapes", shapes)
        problems = list(_misfits(self))
        if problems:
            raise AdapterFormatError(bulleted("the adapter is inconsistent", problems))
        if self.shapes is None and kind is SVDFactors:
            shapes = {name: (len(factors.B), factors.A.shape[1]) for name, factors in self.factors.items()}
            object.__setattr__(self, "shapes", shapes)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.factors)

    @property
    def num_trainable(self) -> int:
        """Count of trainable numbers."""
        return sum(part.size for pair in self.factors.values() for part in pair)

    def delta_weight(self, module: str, shape: tuple[int, int] | None = None) -> np.ndarray:
        """The update of one layer in torch's (out, in) orientation, computed in float64.

        RandLoRA: `s * B (lambda * A * gamma)` (arXiv:2502.00987), AdaLoRA: `s * B (E * A)` (arXiv:2303.10512); see
        `interop.delta`.

        Args:
            module: One of `adapter.modules`.
            shape: (out, in) of the layer; may be left out if `adapter.shapes` is known.

        Raises:
            KeyError: `module` is not adapted.
            ValueError: the shape is unknown or does not fit, or the adapter has no bases.
        """
        shape = resolve_shape(self, module, shape)
        delta = np.empty(shape)
        for where, block in self.delta_blocks(module, shape):
            delta[where] = block
        return delta

    def delta_blocks(
        self, module: str, shape: tuple[int, int] | None = None, *, size: int = 1024
    ) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
        """`delta_weight` in blocks along the longer side, and where each belongs, so that it need not exist as a whole.

        Args:
            module: See `delta_weight`.
            shape: See `delta_weight`.
            size: Length of a block.

        Raises:
            KeyError, ValueError: see `delta_weight`.
        """
        shape = resolve_shape(self, module, shape)
        return product_blocks(self.factors[module], self.bases, shape, scaling=self.config.scaling, size=size)

    def layer(self, module: str, shape: tuple[int, int] | None = None) -> "Adapter":
        """An adapter of this one layer, with no more of the bases than it uses, for what takes layer after layer.

        Raises:
            KeyError, ValueError: see `delta_weight`.
        """
        shape = resolve_shape(self, module, shape)
        factors = {module: type(self.factors[module])(*map(np.asarray, self.factors[module]))}
        config, bases = self.config.with_targets((module,)), self.bases
        if isinstance(config, AdaLoraConfig):
            config = config.with_kept({module: config.kept(module)})
        elif bases is not None:
            bases = cut_bases(bases, Dims(max(shape), min(shape)))
        return Adapter(config=config, factors=factors, bases=bases, recipe=None, shapes={module: shape})

    def bind(self, shapes: Mapping[str, tuple[int, int]]) -> "Adapter":
        """This adapter on a model: (out, in) of each adapted layer known and checked, the bases made if missing.

        Args:
            shapes: (out, in) by module name, of (at least) the adapted layers of the model.

        Raises:
            AdapterFormatError: the model lacks an adapted layer, or one has another shape; all are listed.
        """
        missing = lacking(self, shapes)
        if missing:
            raise AdapterFormatError(missing)
        known = {name: (int(out), int(inp)) for name in self.factors for out, inp in [shapes[name]]}
        expected = self.shapes or {}
        wrong = [
            f"{name}: the model has {shape}, the adapter was made for {expected[name]}"
            for name, shape in known.items()
            if name in expected and expected[name] != shape
        ]
        if wrong:
            raise AdapterFormatError(bulleted("the adapter was made for another base model", wrong))
        bound = dataclasses.replace(self, shapes=known)
        if self.bases is None and isinstance(self.config, RandLoraConfig):
            recipe = self.recipe or DEFAULT_RECIPE
            made = make_bases(self.config, **shared_dims(known.values())._asdict(), recipe=recipe)
            bound = dataclasses.replace(bound, bases=made, recipe=recipe)
        return bound


def lacking(adapter: Adapter, shapes: Mapping[str, Any]) -> str:
    """What to say of the adapted layers that a model of these layers lacks; "" if it lacks none."""
    missing = [name for name in adapter.factors if name not in shapes]
    if not missing:
        return ""
    have = f"it has {len(shapes)} linear layers" + (f", such as {next(iter(shapes))!r}" if shapes else "")
    return bulleted(f"the model lacks these adapted layers ({have})", missing)


def factors_kind(config: AdapterConfig) -> type[Factors] | type[SVDFactors]:
    """What holds the trainable part of one layer."""
    return SVDFactors if isinstance(config, AdaLoraConfig) else Factors


def init_adapter(
    config: RandLoraConfig | AdaLoraConfig,
    shapes: Mapping[str, tuple[int, int]],
    *,
    recipe: str = DEFAULT_RECIPE,
    rng: np.random.Generator | None = None,
) -> Adapter:
    """A new adapter for layers of the given (out, in) shapes, with PEFT's starting values in float32.

    `init_weights=True`: lambda = 0 and gamma = 1/max(n, min(out, in)), so dW = 0. `init_weights=False`:
    lambda ~ N(0, 1) and gamma = 1/max(out, in). AdaLoRA, which always draws: see `AdaLoraConfig.init_lora_weights`.

    Raises:
        ValueError: `shapes` is empty, values are drawn without `rng`, the bases cannot be made, or AdaLoRA's config has
            no schedule or a rank pattern.
    """
    if isinstance(config, AdaLoraConfig):
        return _init_adalora(config, shapes, rng)
    bases = make_bases(config, **shared_dims(shapes.values())._asdict(), recipe=recipe)
    factors = {}
    for name, shape in shapes.items():
        shape_lam, shape_gamma = factor_shapes(shape, config.r)
        if config.init_weights:
            lam = np.zeros(shape_lam, np.float32)
        elif rng is not None:
            lam = rng.standard_normal(shape_lam, np.float32)
        else:
            raise ValueError("init_weights=False draws lambda at random: pass rng=numpy.random.default_rng(seed).")
        factors[name] = Factors(lam, np.full(shape_gamma, gamma_start(config, shape), np.float32))
    return Adapter(config=config, factors=factors, bases=bases, recipe=recipe, shapes=dict(shapes))


def _init_adalora(
    config: AdaLoraConfig, shapes: Mapping[str, tuple[int, int]], rng: np.random.Generator | None
) -> Adapter:
    if rng is None:
        raise ValueError("AdaLoRA draws A and B at random: pass rng=numpy.random.default_rng(seed).")
    if config.rank_pattern is not None:
        raise ValueError("rank_pattern is a result of training: a new adapter starts with rank_pattern=None.")
    config.require_schedule()
    return Adapter(
        config=config,
        factors={name: adalora.init_factors(config, shape, rng) for name, shape in sorted(shapes.items())},
        shapes=dict(shapes),
    )


def gamma_start(config: RandLoraConfig, shape: tuple[int, int]) -> float:
    """What PEFT starts every entry of gamma with, in a layer of shape (out, in); see `init_adapter`."""
    _, shape_gamma = factor_shapes(shape, config.r)
    return 1 / max(shape_gamma if config.init_weights else shape)


def resolve_shape(adapter: Any, module: str, shape: tuple[int, int] | None) -> tuple[int, int]:
    """(out, in) of one layer of an adapter of any stack: the recorded one, or the given one if it fits.

    Raises:
        KeyError: `module` is not adapted.
        ValueError: the shape is unknown or does not fit, or the adapter has no bases.
    """
    if module not in adapter.factors:
        count = len(adapter.factors)
        raise KeyError(f"module {module!r} is not adapted; adapter.modules lists the {count} that are.")
    if isinstance(adapter.config, AdaLoraConfig):
        recorded = dict(adapter.shapes)[module]
        if shape not in (None, recorded):
            raise ValueError(f"shape={shape} does not fit {module!r}: it must be {recorded}.")
        return recorded
    if adapter.bases is None:
        raise ValueError("this adapter has no bases yet: give it its model's layer shapes, adapter.bind(shapes).")
    recorded = dict(adapter.shapes or ()).get(module)
    given = recorded if shape is None else shape
    if given is None:
        raise ValueError(f"the shape of {module!r} is not recorded in this adapter: pass shape=(out, in).")
    out, inp = given
    min_dim, max_dim = adapter.factors[module].gamma.shape[-1], adapter.bases.dims.max_dim
    if min_dim != min(out, inp) or max(out, inp) > max_dim or (out, inp) != (recorded or (out, inp)):
        limits = recorded or f"(out, in) with short side {min_dim}, long side at most {max_dim}"
        raise ValueError(f"shape={(out, inp)} does not fit {module!r}: it must be {limits}.")
    return out, inp


def _misfits(adapter: Adapter) -> Iterable[str]:
    """Every way in which the parts of an adapter contradict each other."""
    shapes = adapter.shapes
    if not adapter.factors:
        yield "it adapts no layer"
    if "" in adapter.factors:
        yield "a layer has an empty name; the file has no place for it (is the model itself a layer? wrap it)"
    if shapes is not None and set(shapes) != set(adapter.factors):
        yield f"{sorted(set(shapes) ^ set(adapter.factors))} have factors or a shape, but not both"
    for name, shape in (shapes or {}).items():
        if not all(0 < side <= MAX_SIDE for side in shape):
            yield f"{name}: the sides of its shape {shape} must lie between 1 and {MAX_SIDE}"
    parts = {
        f"{name}.{field}": part for name, pair in adapter.factors.items() for field, part in pair._asdict().items()
    }
    for name, array in {**parts, **(adapter.bases._asdict() if adapter.bases else {})}.items():
        if array.dtype not in FLOAT_DTYPES:
            yield f"{name} is {array.dtype}: store it as float32, bfloat16 or float16"
    yield from (adalora.misfits if isinstance(adapter.config, AdaLoraConfig) else _misfits_of_factors)(adapter)


def _misfits_of_factors(adapter: Adapter) -> Iterable[str]:
    r, shapes = adapter.config.r, adapter.shapes
    for name, (lam, gamma) in adapter.factors.items():
        n, min_dim = gamma.shape if gamma.ndim == 2 else (0, 0)
        if lam.shape != (r, n) or min_dim < 1 or n != num_bases(min_dim, r):
            yield (
                f"{name}: lambda {lam.shape} and gamma {gamma.shape} do not fit r={r};"
                f" for a short side m they are ({r}, ceil(m/{r})) and (ceil(m/{r}), m)"
            )
        elif shapes and name in shapes and min(shapes[name]) != min_dim:
            yield f"{name}: gamma {gamma.shape} does not fit a layer of shape {shapes[name]}"
    if adapter.bases is not None:
        yield from _misfits_of_bases(adapter, adapter.bases)


def _misfits_of_bases(adapter: Adapter, bases: Bases) -> Iterable[str]:
    r = adapter.config.r
    if bases.A.ndim != 3 or bases.B.ndim != 3:
        yield f"bases A {bases.A.shape} and B {bases.B.shape} must have 3 axes: (r, 1, min_dim) and (max_dim, n, r)"
        return
    wanted = bases_shapes(bases.dims, r)
    if (bases.A.shape, bases.B.shape) != wanted:
        yield f"bases A {bases.A.shape} and B {bases.B.shape} do not fit r={r}: expected {wanted[0]} and {wanted[1]}"
    for name, (_, gamma) in adapter.factors.items():
        if gamma.ndim == 2 and gamma.shape[1] > bases.dims.min_dim:
            yield f"{name}: its short side {gamma.shape[1]} exceeds that of the bases, {bases.dims.min_dim}"
    for name, shape in (adapter.shapes or {}).items():
        if max(shape) > bases.dims.max_dim:
            yield f"{name}: its long side {max(shape)} exceeds that of the bases, {bases.dims.max_dim}"

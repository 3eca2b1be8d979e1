"""x times W + dW by either plan: against the oracle and autodiff, what backward keeps, and what "auto" chooses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from crossing import cross
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from stacks import CASES, DTYPES, SCALING, Case, draw_layer, every_case, few_cases, formula, without_type_checks
from tolerances import TOLERANCE

from interop import Bases
from interop.plans import PLANS
from randlora_jax import RandLoraConfig, adapted_linear, apply_delta, layer_bases
from randlora_jax import linen_linear as explicit_linen
from randlora_jax.nnx_linear import RandLoraBases, RandLoraLinear
from tests.jax.programs import equations

EACH = ("factored", "folded")
both_sides = pytest.mark.parametrize("case", [CASES["wide"], CASES["tall"]], ids=["wide", "tall"])
each_plan = pytest.mark.parametrize("plan", EACH)
OPTIONS = ("scaling", "plan", "keep_weight", "dtype")
linear = jax.jit(adapted_linear, static_argnames=OPTIONS)


class Drawn:
    """A layer with its input, and what the oracle makes of it."""

    def __init__(self, case, seed=0, *, x="float32", kernel="float32", rows=(2, 3), **dtypes):
        rng, (out, inputs) = np.random.default_rng(seed), case.shape
        self.factors = draw_layer(case, seed, **dtypes)
        self.x = rng.standard_normal((*rows, inputs)).astype(DTYPES.get(x, x))
        self.kernel = rng.standard_normal((inputs, out)).astype(DTYPES.get(kernel, kernel))
        self.upstream = rng.standard_normal((*rows, out)).astype(self.x.dtype)
        self.case = case

    @property
    def arguments(self):
        A, B = layer_bases(Bases(self.factors["A"], self.factors["B"]), self.case.shape)
        return jax.tree.map(jnp.asarray, (self.x, self.kernel, A, B, self.factors["lam"], self.factors["gamma"]))

    def wanted(self):
        """y, and the gradients of x, kernel, lambda and gamma of `sum(upstream * y)`, in float64."""
        x, kernel, upstream = (np.float64(array) for array in (self.x, self.kernel, self.upstream))
        given = {"scaling": SCALING, "shape": self.case.shape}
        weight = kernel + oracle.delta_weight(**self.factors, **given).T
        rows_x, rows_g = x.reshape(-1, x.shape[-1]), upstream.reshape(-1, upstream.shape[-1])
        factors = oracle.gradients(**self.factors, **given, upstream=rows_g.T @ rows_x)
        return x @ weight, (upstream @ weight.T, rows_x.T @ rows_g, *factors)

    def computed(self, **options):
        x, kernel, A, B, lam, gamma = self.arguments

        def forward(x, kernel, lam, gamma):
            return adapted_linear(x, kernel, A, B, lam, gamma, scaling=SCALING, **options)

        @jax.jit
        def differentiated(upstream, *arguments):
            y, backward = jax.vjp(forward, *arguments)
            return y, backward(upstream)

        return differentiated(jnp.asarray(self.upstream), x, kernel, lam, gamma)


def assert_close(got, want, dtype):
    y, grads = got
    want_y, want_grads = want
    np.testing.assert_allclose(np.float64(y), want_y, **TOLERANCE[dtype, "forward"])
    for grad, wanted in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(np.float64(grad), wanted, **TOLERANCE[dtype, "gradient"])


# Values and gradients


@every_case
@each_plan
def test_either_plan_is_x_times_the_kernel_and_the_update_with_the_gradients_of_the_oracle(case, plan):
    drawn = Drawn(case)
    assert_close(drawn.computed(plan=plan), drawn.wanted(), "float32")


@both_sides
@each_plan
def test_in_float64_either_plan_is_exact(case, plan):
    drawn = Drawn(case, 1, x="float64", kernel="float64", bases="float64", factors="float64")
    with jax.enable_x64(True):
        got = jax.device_get(drawn.computed(plan=plan))
    assert {array.dtype.name for array in jax.tree.leaves(got)} == {"float64"}
    assert_close(got, drawn.wanted(), "float64")


@both_sides
@each_plan
@pytest.mark.parametrize(("x", "kernel"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_in_half_precision_the_result_has_the_dtype_of_x_and_gradients_those_of_their_arguments(case, plan, x, kernel):
    drawn = Drawn(case, 2, x=x, kernel=kernel, rows=(4,))
    y, grads = drawn.computed(plan=plan)
    assert [array.dtype.name for array in (y, *grads)] == [x, x, kernel, "float32", "float32"]
    assert_close((y, grads), drawn.wanted(), x)


@each_plan
def test_factors_in_half_precision_get_gradients_in_it(plan):
    drawn = Drawn(CASES["wide"], 3, factors="bfloat16")
    y, grads = drawn.computed(plan=plan)
    assert [grad.dtype.name for grad in grads] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert_close((y, grads), drawn.wanted(), "bfloat16")


@both_sides
@each_plan
def test_bases_of_ternary_codes_are_multiplied_as_numbers(case, plan):
    drawn = Drawn(case, 4)
    drawn.factors["B"] = np.sign(np.round(np.float32(drawn.factors["B"]))).astype(np.int8)
    assert_close(drawn.computed(plan=plan), drawn.wanted(), "float32")
    x, _, A, B, *factors = drawn.arguments
    delta = apply_delta(x, A, B, *factors, out_features=case.shape[0], scaling=SCALING, plan=plan)
    base = np.float64(drawn.x) @ np.float64(drawn.kernel)
    np.testing.assert_allclose(delta, drawn.wanted()[0] - base, **TOLERANCE["float32", "forward"])


@each_plan
def test_a_dtype_rounds_the_factors_of_the_products_with_the_bases_alone(plan):
    drawn = Drawn(CASES["wide"], 5)
    exact, rounded = (drawn.computed(plan=plan, dtype=dtype) for dtype in (None, jnp.bfloat16))
    assert np.any(np.asarray(exact[0] != rounded[0]))
    assert_close(rounded, drawn.wanted(), "bfloat16")
    np.testing.assert_allclose(rounded[1][1], drawn.wanted()[1][1], **TOLERANCE["float32", "gradient"])


@few_cases
@each_plan
def test_apply_delta_is_the_same_by_either_plan(case, plan):
    drawn = Drawn(case, 6)
    x, _, A, B, lam, gamma = drawn.arguments

    @jax.jit
    def computed(x, lam, gamma):
        forward = functools.partial(apply_delta, out_features=case.shape[0], scaling=SCALING, plan=plan)
        y, backward = jax.vjp(lambda x, *factors: forward(x, A, B, *factors), x, lam, gamma)
        return y, backward(jnp.asarray(drawn.upstream))

    y, (grad_x, _, *grads) = drawn.wanted()
    kernel = np.float64(drawn.kernel)
    want = y - np.float64(drawn.x) @ kernel, (grad_x - np.float64(drawn.upstream) @ kernel.T, *grads)
    assert_close(computed(x, lam, gamma), want, "float32")


@each_plan
@pytest.mark.parametrize("rows", [(), (0, 3), (1,)], ids=str)
def test_x_may_be_a_vector_or_have_no_rows(plan, rows):
    drawn = Drawn(CASES["tall"], 7, rows=rows)
    assert_close(drawn.computed(plan=plan), drawn.wanted(), "float32")


# Transformations


def written_out(case):
    """The layer from the formula alone."""

    def forward(x, kernel, A, B, lam, gamma):
        delta = formula(A.astype(jnp.float32), B.astype(jnp.float32), lam, gamma, SCALING)  # (long, short)
        return x @ (kernel + (delta.T if case.shape[0] >= case.shape[1] else delta))

    return forward


@cross(layer=[("wide", "factored"), ("tall", "folded")], outer=[jax.jacfwd, jax.jacrev])
def test_second_derivatives_are_those_of_the_formula(layer, outer):
    case, plan = CASES[layer[0]], layer[1]
    x, kernel, A, B, lam, gamma = Drawn(case, 8, rows=(2,)).arguments

    def hessian(forward):
        def loss(x, gamma):
            return (forward(x, kernel, A, B, lam, gamma) ** 2).sum()

        return jax.jit(outer(jax.grad(loss, argnums=(0, 1)), argnums=(0, 1)))(x, gamma)

    got = hessian(functools.partial(adapted_linear, scaling=SCALING, plan=plan))
    want = hessian(written_out(case))
    scale = max(float(jnp.abs(part).max()) for part in jax.tree.leaves(want))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5 * scale)


@each_plan
def test_vmap_over_adapters_is_a_loop_over_adapters(plan):
    case = CASES["wide"]
    layers = [Drawn(case, seed).arguments for seed in range(3)]
    A, B = layers[0][2:4]
    stacked = [jnp.stack(parts) for i, parts in enumerate(zip(*layers, strict=True)) if i not in (2, 3)]

    def step(x, kernel, lam, gamma):
        def loss(*arguments):
            x, kernel, lam, gamma = arguments
            return (adapted_linear(x, kernel, A, B, lam, gamma, scaling=SCALING, plan=plan) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(x, kernel, lam, gamma)

    got = jax.jit(jax.vmap(step))(*stacked)
    step = jax.jit(step)
    want = [step(*(part[i] for part in stacked)) for i in range(3)]
    for each, wanted in zip(got, zip(*want, strict=True), strict=True):
        np.testing.assert_allclose(each, np.stack(wanted), rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("plan", "remat"), [("factored", True), ("folded", True), ("folded", False)])
def test_scan_over_layers_has_the_gradients_of_the_formula(plan, remat):
    case, count = Case((8, 8), 3), 3
    layers = [Drawn(case, seed).arguments for seed in range(count)]
    x, _, A, B, *_ = layers[0]
    kernels, lams, gammas = (jnp.stack([layer[i] for layer in layers]) for i in (1, 4, 5))

    def loss(forward, trainable, kernels, bases):
        def layer(x, parts):
            kernel, *factors = parts
            return jnp.tanh(x + forward(x, kernel, *bases, *factors)), None

        body = jax.checkpoint(layer) if remat else layer
        return (jax.lax.scan(body, x, (kernels, *trainable))[0] ** 2).sum()

    ours = functools.partial(adapted_linear, scaling=SCALING, plan=plan)
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, forward)))((lams, gammas), kernels, (A, B))
        for forward in (ours, written_out(case))
    )
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])


# What backward keeps and computes


def kept(forward, *differentiated):
    """Shapes and dtypes that backward keeps."""
    backward = jax.eval_shape(lambda *arguments: jax.vjp(forward, *arguments)[1], *differentiated)
    shapes = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(backward))
    assert shapes, "the residuals are not visible: this test sees nothing"
    return shapes


BIG = Case((48, 32), 4)  # a kernel (32, 48), B (48, 8 * 4)


def described(*arrays):
    return sorted((array.shape, array.dtype.name) for array in arrays)


@every_case
@each_plan
def test_backward_keeps_x_and_arguments_and_neither_the_scaled_bases_nor_the_adapted_kernel(case, plan):
    x, kernel, A, B, lam, gamma = arguments = Drawn(case).arguments
    forward = functools.partial(adapted_linear, scaling=SCALING, plan=plan)
    allowed = described(*arguments)
    for residual in kept(lambda x, lam, gamma: forward(x, kernel, A, B, lam, gamma), x, lam, gamma):
        assert residual in allowed
        allowed.remove(residual)


def test_backward_keeps_the_adapted_kernel_if_asked_to_and_has_the_same_gradients():
    x, kernel, A, B, lam, gamma = arguments = Drawn(CASES["wide"]).arguments

    def forward(keep, x, lam, gamma):
        options = {"scaling": SCALING, "plan": "folded", "keep_weight": keep}
        return adapted_linear(x, kernel, A, B, lam, gamma, **options)

    more = kept(functools.partial(forward, True), x, lam, gamma)
    assert more == described(*arguments, kernel)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(keep, *arguments):
        return jax.grad(lambda *arguments: forward(keep, *arguments).sum(), argnums=(0, 1, 2))(*arguments)

    grads = [gradients(keep, x, lam, gamma) for keep in (False, True)]
    chex.assert_trees_all_equal(*grads)


def test_the_compiler_does_not_keep_what_backward_makes_again():
    x, kernel, A, B, lam, gamma = Drawn(BIG, rows=(64,)).arguments

    def compiled_products(keep):
        def loss(x, lam, gamma, kernel, A, B):
            options = {"plan": "folded", "keep_weight": keep}
            return (adapted_linear(x, kernel, A, B, lam, gamma, scaling=SCALING, **options) ** 2).sum()

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return step.lower(x, lam, gamma, kernel, A, B).compile().as_text().count(" dot(")

    assert compiled_products(keep=False) == compiled_products(keep=True) + 1


def test_a_model_of_many_layers_saves_no_kernel_sized_residual(capsys):
    x, kernel, A, B, lam, gamma = Drawn(Case((40, 24), 4), rows=(5,)).arguments

    def loss(lam, gamma, kernel, A, B):
        y = adapted_linear(jnp.tanh(x), kernel, A, B, lam, gamma, scaling=SCALING, plan="folded")
        return jnp.sin(y).sum()

    print_saved_residuals(loss, lam, gamma, kernel, A, B)
    made = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    assert any("5,40" in line for line in made), "activations are not listed: this test sees nothing"
    assert not any(size in line for line in made for size in ("24,40", "40,24", "24,24"))


def shapes_of_products(function, *arguments):
    program = jax.make_jaxpr(function)(*arguments)
    return [e.outvars[0].aval.shape for e in equations(program) if e.primitive.name == "dot_general"]


def gradient_products(plan, rows, argnums, case=BIG, **options):
    x, kernel, A, B, lam, gamma = Drawn(case, rows=(rows,)).arguments

    def loss(x, kernel, A, B, lam, gamma):
        return adapted_linear(x, kernel, A, B, lam, gamma, scaling=SCALING, plan=plan, **options).sum()

    shapes = shapes_of_products(jax.grad(loss, argnums=argnums), x, kernel, A, B, lam, gamma)
    (r, n), d = lam.shape, gamma.shape[1]
    return [shape for shape in shapes if shape not in ((n, r), (n, d))]  # the small sums for lambda and gamma


X, KERNEL, FACTORS = 0, 1, (4, 5)


def test_nothing_is_computed_for_a_frozen_kernel_or_input():
    T, inputs, outputs = 5, 32, 48
    folded = gradient_products("folded", T, FACTORS)
    assert sorted(folded) == sorted([(inputs, outputs), (T, outputs), (inputs, outputs), (32, inputs)])
    with_x = gradient_products("folded", T, (X, *FACTORS))  # W' again, and its product with dy
    assert sorted(with_x) == sorted([*folded, (inputs, outputs), (T, inputs)])
    assert gradient_products("folded", T, (X, KERNEL, *FACTORS)) == with_x  # x^T dy is there already

    factored = gradient_products("factored", T, FACTORS)
    assert (inputs, outputs) not in factored
    with_x = gradient_products("factored", T, (X, *FACTORS))
    assert len(with_x) == len(factored) + 2  # through W and through U
    with_kernel = gradient_products("factored", T, (X, KERNEL, *FACTORS))
    assert sorted(with_kernel) == sorted([*with_x, (inputs, outputs)])


def test_auto_folds_for_many_rows_and_not_for_few_and_each_pass_by_itself():
    argnums = (X, *FACTORS)
    few, many = (gradient_products("auto", rows, argnums) for rows in (1, 10_000))
    assert few == gradient_products("factored", 1, argnums)
    assert many == gradient_products("folded", 10_000, argnums)
    between = [gradient_products("auto", rows, argnums, Case((32, 32), 4)) for rows in range(16, 200, 32)]
    assert len({len(products) for products in between}) >= 2


def test_a_kept_kernel_makes_auto_fold_backward_for_fewer_rows():
    given = (300, (X, *FACTORS), Case((512, 256), 4))
    rebuilt, kept = (gradient_products("auto", *given, keep_weight=keep) for keep in (False, True))
    assert rebuilt == [(256, 512), (300, 512), *gradient_products("factored", *given)[3:]]
    assert kept == [(256, 512), (300, 512), (256, 512), (256, 256), (300, 256)]  # W', y, dW', dU, dx


def test_no_array_is_captured_in_the_program():
    arguments = Drawn(BIG).arguments
    for plan in PLANS:
        program = jax.make_jaxpr(functools.partial(adapted_linear, scaling=SCALING, plan=plan))(*arguments)
        assert program.consts == []
        text = linear.lower(*arguments, scaling=SCALING, plan=plan).as_text()
        assert 'dense<"0x' not in text  # a constant array


# Layers

CONFIG = RandLoraConfig(r=3, randlora_alpha=3, init_weights=False)
SHAPES = [(12, 8), (8, 12)]


def nnx_layer(**options):
    bases = RandLoraBases(CONFIG, SHAPES)
    return RandLoraLinear(8, 12, bases=bases, rngs=nnx.Rngs(0), **options)


def linen_layer(**options):
    bases, _ = explicit_linen.RandLoraBases(CONFIG, SHAPES).init_with_output({})
    module = explicit_linen.RandLoraLinear(12, **options)
    return module, bases


def products_of(layer, x):
    return shapes_of_products(lambda x: layer(x), x)


def linen_call(options, x):
    module, bases = linen_layer(**options)
    variables = linen_layer()[0].init(jax.random.key(0), x, bases)
    return lambda x: module.apply(variables, x, bases)


MAKE = {"NNX": lambda options, x: nnx_layer(**options), "linen": linen_call}


@pytest.mark.parametrize("stack", MAKE)
def test_an_explicit_layer_multiplies_by_its_plan(stack):
    x = jnp.ones((5, 8))
    made = {plan: MAKE[stack]({"plan": plan}, x) for plan in EACH}
    assert products_of(made["factored"], x) == [(5, 9), (5, 12), (5, 12)]
    assert products_of(made["folded"], x) == [(8, 12), (5, 12)]
    np.testing.assert_allclose(made["factored"](x), made["folded"](x), **TOLERANCE["float32", "forward"])


@pytest.mark.parametrize("stack", MAKE)
def test_an_explicit_layer_keeps_the_adapted_kernel_only_if_asked_to(stack):
    x = jnp.ones((5, 8))
    sizes = []
    for keep in (False, True):
        layer = MAKE[stack]({"plan": "folded", "keep_weight": keep}, x)
        sizes.append(kept(layer, x).count(((8, 12), "float32")))
    assert sizes == [1, 2]


def counted(calls):
    def dot_general(*arguments, **options):
        calls.append(arguments[1])
        return jax.lax.dot_general(*arguments, **options)

    return dot_general


@pytest.mark.parametrize("stack", MAKE)
def test_a_custom_product_or_precision_gets_the_adapted_kernel_whatever_the_plan(stack):
    x, calls = jnp.ones((5, 8)), []
    want = MAKE[stack]({}, x)(x)
    got = MAKE[stack]({"dot_general": counted(calls), "plan": "factored"}, x)(x)
    assert [operand.shape for operand in calls] == [(8, 12)]
    np.testing.assert_allclose(got, want, **TOLERANCE["float32", "forward"])
    np.testing.assert_allclose(jnp.ones((5, 8)) @ calls[0], want, **TOLERANCE["float32", "forward"])
    precise = MAKE[stack]({"precision": "highest", "plan": "factored"}, x)
    assert products_of(precise, x) == [(8, 12), (5, 12)]


@pytest.mark.parametrize("plan", ["auto", *EACH])
def test_on_a_mesh_with_explicit_axes_a_layer_computes_the_same(plan):
    x, layer = jnp.ones((4, 8)), nnx_layer(plan=plan)
    want = layer(x)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        got = layer(jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data"))))
    assert got.sharding.spec == jax.P("data", None)
    np.testing.assert_allclose(got, want, **TOLERANCE["float32", "forward"])


# Misuse


def test_an_unknown_plan_is_refused_where_it_is_given():
    message = r"plan='fast' is not known: choose one of \['auto', 'factored', 'folded'\]\."
    x, kernel, *rest = Drawn(CASES["wide"]).arguments
    with pytest.raises(ValueError, match=message):
        adapted_linear(x, kernel, *rest, scaling=1.0, plan="fast")
    with pytest.raises(ValueError, match=message):
        apply_delta(x, *rest, out_features=6, scaling=1.0, plan="fast")
    with pytest.raises(ValueError, match=message):
        nnx_layer(plan="fast")
    with pytest.raises(ValueError, match=message):
        explicit_linen.RandLoraLinear(12, plan="fast")


def test_a_kernel_that_does_not_fit_is_refused():
    x, kernel, *rest = Drawn(CASES["wide"]).arguments
    with (
        without_type_checks(),
        pytest.raises(ValueError, match=r"x has 10 features, but a kernel of shape \(6, 10\), which is"),
    ):
        adapted_linear(x, kernel.T, *rest, scaling=1.0)
    with pytest.raises(ValueError, match=r"a layer of shape \(5, 10\) does not fit bases for a 10 x 6 layer: slice"):
        adapted_linear(x, kernel[:, :5], *rest, scaling=1.0)
    with without_type_checks(), pytest.raises(ValueError, match=r"a kernel of dtype int8 cannot hold W \+ dW: deq"):
        adapted_linear(x, kernel.astype(jnp.int8), *rest, scaling=1.0)
    with without_type_checks(), pytest.raises(ValueError, match=r"x has dtype int32: pass floating point inputs"):
        adapted_linear(x.astype(int), kernel, *rest, scaling=1.0)

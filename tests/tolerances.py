"""How closely results must agree: one table, dtype x operation -> rtol and atol of `numpy.testing.assert_allclose`.

Values are of order 1 to 100 in all tests (`strategies.draw_factors`), so an atol is in units of a typical result.
`TOLERANCE["float32"]` alone is the tolerance of `delta_weight`.
"""

TOLERANCE = {
    # Sums of r*n float64 products in another order than the oracle's: a few hundred roundings of 1e-16.
    ("float64", "delta_weight"): {"rtol": 1e-12, "atol": 1e-12},
    ("float64", "forward"): {"rtol": 1e-12, "atol": 1e-11},
    # Two matrix products deep.
    ("float64", "gradient"): {"rtol": 1e-11, "atol": 1e-11},
    # Central differences with step 1e-6 of a bilinear function: no truncation error, 1e-16 / 1e-6 of rounding.
    ("float64", "finite_difference"): {"rtol": 1e-6, "atol": 1e-7},
    # W + dW - dW: one rounding of W + dW each way.
    ("float64", "merge"): {"rtol": 1e-13, "atol": 1e-13},
    # Float32 accumulation over up to ~100 terms, 6e-8 each, with cancellation in the sum.
    ("float32", "delta_weight"): {"rtol": 1e-5, "atol": 2e-5},
    # One more product over the input features.
    ("float32", "forward"): {"rtol": 1e-5, "atol": 5e-5},
    # Reductions over batch and features; factors differ in scale by 10.
    ("float32", "gradient"): {"rtol": 2e-5, "atol": 2e-4},
    # W + dW - dW in float32 (PEFT drifts by 3e-8 over 10 cycles at |W| of order 0.1).
    ("float32", "merge"): {"rtol": 1e-6, "atol": 1e-6},
    # 8 bits of mantissa: half a unit in the last place is 2**-9 of each rounded operand and of the result.
    ("bfloat16", "delta_weight"): {"rtol": 2e-2, "atol": 5e-2},
    ("bfloat16", "forward"): {"rtol": 2e-2, "atol": 1e-1},
    ("bfloat16", "gradient"): {"rtol": 3e-2, "atol": 2e-1},
    ("bfloat16", "merge"): {"rtol": 1e-2, "atol": 1e-2},
    # 11 bits of mantissa: 8 times finer than bfloat16.
    ("float16", "delta_weight"): {"rtol": 3e-3, "atol": 1e-2},
    ("float16", "forward"): {"rtol": 3e-3, "atol": 2e-2},
    ("float16", "gradient"): {"rtol": 5e-3, "atol": 5e-2},
    ("float16", "merge"): {"rtol": 1e-3, "atol": 1e-3},
}
TOLERANCE.update({dtype: TOLERANCE[dtype, "delta_weight"] for dtype in ("float64", "float32", "bfloat16", "float16")})

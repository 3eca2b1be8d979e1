"""`infer_layouts`: which axes of each kernel are inputs, outputs or stacked weights, read from a trace of the model."""

from randlora_jax.tracing.inference import InferredLayouts, infer_layouts

__all__ = ["InferredLayouts", "infer_layouts"]

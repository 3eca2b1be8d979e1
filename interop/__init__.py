"""The framework-free hub of randlora: what an adapter is, its file, and the way between the stacks.

Imports numpy, ml_dtypes and safetensors only; `convert` imports a stack by name when it is asked for one.
"""

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter, Factors, init_adapter
from interop.bases import DEFAULT_RECIPE, RECIPES, Bases, bases_digest, make_bases
from interop.config import RandLoraConfig
from interop.convert import convert
from interop.errors import AdapterFormatError
from interop.files import load, save
from interop.merging import MergeReport, merge
from interop.shapes import count_trainable, shared_dims
from interop.targets import resolve_targets

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "AdaLoraConfig",
    "Adapter",
    "AdapterFormatError",
    "Bases",
    "Factors",
    "MergeReport",
    "RandLoraConfig",
    "SVDFactors",
    "bases_digest",
    "convert",
    "count_trainable",
    "init_adapter",
    "load",
    "make_bases",
    "merge",
    "resolve_targets",
    "save",
    "shared_dims",
]

"""The framework-free hub of randlora: what an adapter is, its file, and the way between the stacks.

Imports numpy and ml_dtypes only; `convert` and `verify` import a stack by name when they are asked for one.
"""

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter, init_adapter
from interop.bases import DEFAULT_RECIPE, RECIPES, Bases, bases_digest, make_bases
from interop.config import RandLoraConfig
from interop.convert import convert
from interop.delta import Factors
from interop.diff import AdapterDiff, diff
from interop.errors import AdapterFormatError
from interop.files import adapter_names, load, save
from interop.lora import LoraExport, export_lora
from interop.merging import MergeReport, merge
from interop.shapes import count_trainable, shared_dims
from interop.targets import resolve_targets
from interop.verify import Verification, verify

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "AdaLoraConfig",
    "Adapter",
    "AdapterDiff",
    "AdapterFormatError",
    "Bases",
    "Factors",
    "LoraExport",
    "MergeReport",
    "RandLoraConfig",
    "SVDFactors",
    "Verification",
    "adapter_names",
    "bases_digest",
    "convert",
    "count_trainable",
    "diff",
    "export_lora",
    "init_adapter",
    "load",
    "make_bases",
    "merge",
    "resolve_targets",
    "save",
    "shared_dims",
    "verify",
]

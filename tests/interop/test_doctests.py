"""Every example in a docstring of `interop` runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import interop

MODULES = ["interop", *(f"interop.{module.name}" for module in pkgutil.iter_modules(interop.__path__))]
WITH_EXAMPLES = {"interop.bases", "interop.config", "interop.shapes"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0 or name not in WITH_EXAMPLES

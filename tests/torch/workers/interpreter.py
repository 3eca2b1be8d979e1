"""Triton's interpreter in a process of its own: it must be asked for before Triton is imported, by whomever.

`Interpreter` is used by test_triton_kernels.py; the rest runs in the process that it starts.
"""

import functools
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import ml_dtypes
import numpy as np
import torch


class Interpreter:
    """Calls functions of randlora_torch.triton_kernels and of this file, where kernels are interpreted."""

    def __init__(self):
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=start)

    def __call__(self, name, *arguments, patched=None, **options):
        """The result of a function; `patched` are values for names of triton_kernels, meanwhile."""
        return unpack(self._pool.submit(compute, pack((name, arguments, options, patched or {}))).result())

    def close(self):
        self._pool.shutdown()


def pack(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def unpack(content):
    return torch.load(io.BytesIO(content), weights_only=False)


def start():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    teach_bfloat16()


def compute(packed):
    from randlora_torch import triton_kernels

    name, arguments, options, patched = unpack(packed)
    before = {each: getattr(triton_kernels, each) for each in patched}
    vars(triton_kernels).update(patched)
    try:
        return pack((globals().get(name) or getattr(triton_kernels, name))(*arguments, **options))
    finally:
        vars(triton_kernels).update(before)


def teach_bfloat16():
    """Triton 3.7 interprets bfloat16 as its bit patterns: it multiplies and converts these, and rounds towards zero."""
    from triton.runtime import interpreter

    def numbers(handle):
        return handle.data.view(ml_dtypes.bfloat16) if handle.dtype.scalar.is_bf16() else handle.data

    def convert(self, source, target, *rounding):
        to_bfloat16 = target.scalar.is_bf16()
        dtype = ml_dtypes.bfloat16 if to_bfloat16 else interpreter._get_np_dtype(target)
        values = numbers(source).astype(dtype)
        return interpreter.TensorHandle(values.view(np.uint16) if to_bfloat16 else values, target.scalar)

    def dot(self, a, b, sum, *precision):
        product = np.matmul(numbers(a).astype(np.float32), numbers(b).astype(np.float32))
        return interpreter.TensorHandle(product + sum.data, sum.dtype.scalar)

    builder = interpreter.InterpreterBuilder
    builder.cast_impl = builder.create_fp_to_fp = convert
    builder.create_dot = dot


def fold_by_choice(weight, factors, *, milliseconds, torch_lam, **options):
    """`fused.fold`, twice, with given times and a torch way that takes `torch_lam` times lambda; and the choices."""
    from randlora_torch import fused, kernel_choice

    fused._DEVICES = ("cpu",)
    clock = iter(milliseconds)
    fused.chooser = chooser = kernel_choice.Chooser(lambda run: next(clock))
    triton = functools.partial(fused._kernels().folded_weight, weight, *factors[:2], **options)

    def torch_way(lam, gamma):
        return triton(torch_lam * lam, gamma)

    results = [fused.fold(weight, *factors, torch_way=torch_way, **options) for _ in range(2)]
    return results, list(chooser.made.values())

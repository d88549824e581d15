"""Triton's interpreter without what it does again and again; kernels and results stay the same.

It patches Triton's language at each launch and once more at each call of a device function, which takes a third of the
time of kernels that consist of many functions. Here a launch patches each of its modules once.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _patch_once() -> None:
    patch: Callable[[Any], Any] = interpreter._patch_lang
    modules_of: dict[Any, frozenset[str]] = {}
    patched: set[str] = set()  # since the launch has begun

    def patch_lang(function: Any) -> Any:
        if function not in modules_of:
            seen = [each for each in function.__globals__.values() if inspect.ismodule(each)]
            modules_of[function] = frozenset(each.__name__ for each in seen if each in (tl, tl.core))
        if modules_of[function] <= patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        patched.update(modules_of[function])
        restore = scope.restore  # called for a launch, not for a device function

        def restored() -> None:
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = patch_lang


def _dtypes_once() -> None:
    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        if type(dtype) is not tl.dtype:
            return find(dtype)
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = np_dtype


def speed_up() -> None:
    """Replace what is slow, once, where this version of Triton has it."""
    is_known = hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_get_np_dtype")
    if is_known and interpreter._patch_lang.__module__ == interpreter.__name__:
        _patch_once()
        _dtypes_once()

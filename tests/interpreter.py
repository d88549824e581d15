"""Triton's interpreter without what it does again and again; kernels and results stay the same.

Its time goes into Python objects: types, shapes and constants that are made anew for each operation, checks whose
result nobody reads, Triton's language patched at each launch and each call of a device function. Here what is equal is
one object, an operation on two tensors of one type goes straight to numpy, and the language is patched once: a process
that interprets compiles nothing.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_VERSIONS = ((3, 9),)
"""Whose classes are known as deeply as this replaces their methods."""
_PLAIN = tl.dtype  # of a scalar: neither pointer nor block


def _patch_once() -> None:
    """Patch each module of the language once, for good."""
    patch: Callable[[Any], Any] = interpreter._patch_lang
    modules_of: dict[Any, frozenset[str]] = {}
    patched: set[str] = set()

    def patch_lang(function: Any) -> Any:
        if function not in modules_of:
            seen = [each for each in function.__globals__.values() if inspect.ismodule(each)]
            modules_of[function] = frozenset(each.__name__ for each in seen if each in (tl, tl.core))
        if not modules_of[function] <= patched:
            patch(function)
            patched.update(modules_of[function])
        return interpreter._LangPatchScope()  # with nothing to restore

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        call, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def new_member(*args: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return call(*args, **options)

        scope.set_attr(owner, name, new_member)

    interpreter._patch_lang = patch_lang
    interpreter._patch_attr = patch_attr


def _dtypes_once() -> None:
    """What numpy calls a type."""
    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        if type(dtype) is not _PLAIN:
            return find(dtype)
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = np_dtype


def _types_once() -> None:
    """One object for all blocks of one type and shape; tensors share what follows from their type."""
    block = core.block_type
    make, retype = block.__init__, block.with_element_ty
    known: dict[Any, Any] = {}

    def new(cls: Any, element_ty: Any, shape: Any) -> Any:
        if cls is not block or type(element_ty) is not _PLAIN:
            return object.__new__(cls)
        sizes = tuple([each.value if type(each) is tl.constexpr else each for each in shape])
        key = element_ty.name, sizes
        if key not in known:
            found = object.__new__(cls)
            make(found, element_ty, list(sizes))  # which refuses what is no shape
            found.retyped = {}
            known[key] = found
        return known[key]

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        if "retyped" not in self.__dict__:
            make(self, element_ty, shape)
            self.retyped = {}

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        if type(scalar_ty) is not _PLAIN:
            return retype(self, scalar_ty)
        if scalar_ty.name not in self.retyped:
            self.retyped[scalar_ty.name] = retype(self, scalar_ty)
        return self.retyped[scalar_ty.name]

    block.__new__, block.__init__, block.with_element_ty = staticmethod(new), init, with_element_ty
    block.to_ir = lambda self, builder: self  # what the interpreter's builder makes of it

    no_shape, one = core.tuple([]), tl.constexpr(1)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type = handle, type
        if not type.is_block():
            self.shape, self.numel, self.dtype = no_shape, one, type
            return
        if "of_tensors" not in type.__dict__:
            shape = core.tuple([tl.constexpr(size) for size in type.shape])
            type.of_tensors = shape, tl.constexpr(type.numel), type.scalar
        self.shape, self.numel, self.dtype = type.of_tensors

    tl.tensor.__init__ = tensor

    check = interpreter.TensorHandle.__post_init__

    def handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if type(dtype) is not _PLAIN or data.itemsize > max(dtype.itemsize, 1):
            check(self)

    interpreter.TensorHandle.__init__ = handle


def _operations_at_once() -> None:
    """Operations on what has one type already, and constants that were seen before."""
    promote, legalise, cast = (
        TritonSemantic.computation_type_impl, TritonSemantic.binary_op_type_checking_impl, TritonSemantic.cast
    )  # fmt: skip
    broadcast, constant = TritonSemantic.broadcast_impl_value, TritonSemantic.scalar_constant
    promoted: dict[Any, Any] = {}
    constants: dict[Any, Any] = {}
    divided = {"fp16", "bf16"}  # in float32

    def computation_type(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in promoted:
            promoted[key] = promote(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return promoted[key]

    def side_by_side(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        """As ``broadcast_impl_value``, but numpy repeats what is one number."""
        mine, its = lhs.type, rhs.type
        if mine is its:
            return lhs, rhs
        if mine.is_block() and not its.is_block():
            return lhs, self.tensor(rhs.handle, mine.with_element_ty(its))
        if its.is_block() and not mine.is_block():
            return self.tensor(lhs.handle, its.with_element_ty(mine)), rhs
        return broadcast(self, lhs, rhs)

    def binary(
        self: Any, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        left, right = type(lhs) is tl.tensor, type(rhs) is tl.tensor
        if (
            (left and type(lhs.dtype) is not _PLAIN)
            or (right and type(rhs.dtype) is not _PLAIN)
            or not arithmetic_check
        ):
            return legalise(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
        if left and right:
            name = lhs.dtype.name
            if name != rhs.dtype.name or (div_or_mod and name in divided):
                dtype = computation_type(self, lhs.dtype, False, rhs.dtype, False, div_or_mod)
                lhs, rhs = self.cast(lhs, dtype), self.cast(rhs, dtype)
            return side_by_side(self, lhs, rhs)
        if left and type(rhs) in (int, float, bool):
            dtype = computation_type(self, lhs.dtype, False, self.to_tensor_type(rhs), True, div_or_mod)
            return side_by_side(self, self.cast(lhs, dtype), self._cast_to_computation_type(rhs, dtype))
        if right and type(lhs) in (int, float, bool):
            dtype = computation_type(self, self.to_tensor_type(lhs), True, rhs.dtype, False, div_or_mod)
            return side_by_side(self, self._cast_to_computation_type(lhs, dtype), self.cast(rhs, dtype))
        return legalise(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def broadcast_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if lhs.type is rhs.type else broadcast(self, lhs, rhs)

    def cast_once(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        to = dst_ty.scalar
        if type(to) is _PLAIN and to.name == input.dtype.name:
            return input
        return cast(self, input, dst_ty, fp_downcast_rounding)

    def constant_once(self: Any, value: Any, dtype: Any) -> Any:
        if type(value) not in (int, float, bool) or type(dtype) is not _PLAIN:
            return constant(self, value, dtype)
        # 0 and -0, 1 and True are equal, and not the same.
        key = dtype.name, type(value), value.hex() if type(value) is float else value
        if key not in constants:
            constants[key] = constant(self, value, dtype)
            constants[key].handle.data.flags.writeable = False
        return constants[key]

    def splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        data = np.empty(tuple(ret_ty.shape), interpreter._get_np_dtype(arg.dtype))
        data[...] = arg.data
        return interpreter.TensorHandle(data, arg.dtype.scalar)

    TritonSemantic.computation_type_impl = computation_type
    TritonSemantic.binary_op_type_checking_impl = binary
    TritonSemantic.broadcast_impl_value = broadcast_value
    TritonSemantic.cast = cast_once
    TritonSemantic.scalar_constant = constant_once
    interpreter.InterpreterBuilder.create_splat = splat


def _no_unread_checks() -> None:
    """An overflow is looked for with six operations beside each, and told only where debugging is on."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def speed_up() -> None:
    """Replace what is slow, once, where this process interprets and this version of Triton is known."""
    version = tuple(int(each) for each in triton.__version__.split(".")[:2])
    if not triton.knobs.runtime.interpret or version not in _VERSIONS:
        return
    if interpreter._patch_lang.__module__ == interpreter.__name__:
        _patch_once()
        _dtypes_once()
        _types_once()
        _operations_at_once()
        _no_unread_checks()

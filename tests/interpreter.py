"""Triton's interpreter without what it does again and again; kernels and results stay the same.

Its time goes into Python objects: types, shapes and constants that are made anew for each operation, checks whose
result nobody reads, Triton's language patched at each launch and each call of a device function. Here what is equal is
one object, and the language is patched once: a process that interprets compiles nothing. An operation is looked up by
the types of its operands: Triton's rules of types are asked once, and from then on the operation is a call of numpy.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from triton.language import core
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

        direct = _direct(name, new_member) if owner in (tl.tensor, tl, core, tl.math) else new_member
        scope.set_attr(owner, name, direct)

    interpreter._patch_lang = patch_lang
    interpreter._patch_attr = patch_attr


# -- Operations by the types of their operands ------------------------------------------------------------------------

_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_FLOATS = frozenset({"fp16", "fp32", "fp64"})
_NUMBERS = _INTEGERS | _FLOATS
"""What numpy has too: bfloat16 it hasn't, and int1 is a Boolean there."""
_NO_SHAPE, _ONE, _32 = core.tuple([]), tl.constexpr(1), np.uint64(32)


class _Rule(NamedTuple):
    """What numpy does for an operation of Triton's, and for which types that is the same."""

    of_floats: Any
    of_integers: Any
    dtypes: frozenset[str]
    compares: bool = False
    """The result is a Boolean."""


_BITS = _INTEGERS | {"int1"}
_RULES = {
    "add": _Rule(np.add, np.add, _NUMBERS), "sub": _Rule(np.subtract, np.subtract, _NUMBERS),
    "mul": _Rule(np.multiply, np.multiply, _NUMBERS), "truediv": _Rule(np.divide, None, _FLOATS - {"fp16"}),
    "and": _Rule(None, np.bitwise_and, _BITS), "or": _Rule(None, np.bitwise_or, _BITS),
    "xor": _Rule(None, np.bitwise_xor, _BITS), "lshift": _Rule(None, np.left_shift, _INTEGERS),
    "rshift": _Rule(None, np.right_shift, _INTEGERS), "gt": _Rule(np.greater, np.greater, _NUMBERS, True),
    "ge": _Rule(np.greater_equal, np.greater_equal, _NUMBERS, True), "lt": _Rule(np.less, np.less, _NUMBERS, True),
    "le": _Rule(np.less_equal, np.less_equal, _NUMBERS, True), "eq": _Rule(np.equal, np.equal, _NUMBERS, True),
    "ne": _Rule(np.not_equal, np.not_equal, _NUMBERS, True),
}  # fmt: skip
_FUNCTIONS = {
    "add": _RULES["add"], "sub": _RULES["sub"], "mul": _RULES["mul"],
    "minimum": _Rule(np.fmin, np.minimum, _NUMBERS), "maximum": _Rule(np.fmax, np.maximum, _NUMBERS),
    "umulhi": _Rule(None, lambda a, b: (a.astype(np.uint64) * b >> _32).astype(np.uint32), frozenset({"uint32"})),
}  # fmt: skip
_UNARY = {"__neg__": np.negative, "exp2": np.exp2, "log2": np.log2, "exp": np.exp, "log": np.log, "floor": np.floor}
_REVERSED = ("add", "sub", "mul", "and", "or", "xor", "truediv", "lshift")
_UNREAD = {"sanitize_overflow"}
"""Options that change nothing here, see ``_no_unread_checks``."""


def _known_of(kind: Any) -> tuple[Any, Any, Any]:
    """Shape, number of elements and dtype of the tensors of a type."""
    if not kind.is_block():
        return _NO_SHAPE, _ONE, kind
    if "of_tensors" not in kind.__dict__:
        shape = core.tuple([tl.constexpr(size) for size in kind.shape])
        kind.of_tensors = shape, tl.constexpr(kind.numel), kind.scalar
    return kind.of_tensors


def _key_of(operand: Any) -> Any:
    """What an operation is looked up by: the name of a tensor's type, or which number it is; else None."""
    kind = type(operand)
    if kind is tl.tensor:
        return operand.type.name
    # 0 and -0, 1 and True are equal, and not the same.
    return (kind, operand.hex() if kind is float else operand) if kind in (int, float, bool) else None


def _data_of(operand: Any) -> Any:
    return operand.handle.data


def _cast_to(dtype: Any) -> Any:
    numpy_dtype = interpreter._get_np_dtype(dtype)
    return lambda operand: operand.handle.data.astype(numpy_dtype)


class _Result:
    """Makes the tensors that an operation has for result, without asking again what is known of their type."""

    def __init__(self, kind: Any, dtype: Any) -> None:
        self._kind, self._dtype, self._known = kind, dtype, _known_of(kind)

    def __call__(self, data: Any) -> Any:
        handle = object.__new__(interpreter.TensorHandle)
        handle.data, handle.dtype, handle.attr = data, self._dtype, {}
        made = object.__new__(tl.tensor)
        made.handle, made.type = handle, self._kind
        made.shape, made.numel, made.dtype = self._known
        return made


def _block_of(*operands: Any) -> Any:
    """A type of the shape that operands have together; None where there is none, or Triton has to find it."""
    kinds = [each.type for each in operands if type(each) is tl.tensor]
    shapes = {kind.shape for kind in kinds if kind.is_block()}
    if not shapes:
        return kinds[0] if kinds else None
    if len({len(shape) for shape in shapes}) > 1:
        return None
    columns = [{size for size in sizes if size != 1} for sizes in zip(*shapes, strict=True)]
    if any(len(sizes) > 1 for sizes in columns):
        return None
    return core.block_type(tl.int32, [max(sizes, default=1) for sizes in columns])


def _shaped(block: Any, dtype: Any) -> Any:
    return block.with_element_ty(dtype) if block.is_block() else dtype


def _common(operands: Any, divides: bool = False) -> Any:
    """The type that two operands are brought to, and how each is; None where that takes more than numpy."""
    semantic = interpreter.interpreter_semantic
    numbers = [type(each) is not tl.tensor for each in operands]
    dtypes = [
        semantic.to_tensor_type(each) if number else each.dtype for each, number in zip(operands, numbers, strict=True)
    ]
    if any(type(dtype) is not _PLAIN for dtype in dtypes):
        return None
    (a, b), (a_is_number, b_is_number) = dtypes, numbers
    common = semantic.computation_type_impl(a, a_is_number, b, b_is_number, divides)
    taken = []
    for each, number, dtype in zip(operands, numbers, dtypes, strict=True):
        if number:
            constant = semantic._cast_to_computation_type(each, common).handle.data
            taken.append(lambda _, constant=constant: constant)
        elif dtype.name == common.name:
            taken.append(_data_of)
        elif common.name in _NUMBERS and dtype.name in _NUMBERS | {"int1"}:
            taken.append(_cast_to(common))
        else:
            return None
    return common, taken


def _binary(rule: _Rule, left: Any, right: Any) -> Any:
    """An operation on operands of these types, as numpy does it; None where numpy doesn't."""
    block = _block_of(left, right)
    if block is None:
        return None
    if rule is _RULES["add"] and type(left) is tl.tensor and left.dtype.is_ptr():
        return _offset(block, left, right)
    if rule in (_RULES["lshift"], _RULES["rshift"]) and not _may_shift(left, right):
        return None
    found = _common((left, right), rule is _RULES["truediv"])
    if found is None or found[0].name not in rule.dtypes:
        return None
    dtype, (first, second) = found
    if rule is _RULES["truediv"] and any(type(each) is tl.tensor and each.dtype.is_int() for each in (left, right)):
        return None
    operation = rule.of_floats if dtype.is_floating() else rule.of_integers
    result = _Result(_shaped(block, tl.int1 if rule.compares else dtype), tl.int1 if rule.compares else dtype)
    return lambda left, right: result(operation(first(left), second(right)))


def _may_shift(left: Any, right: Any) -> bool:
    """By a number of bits that there are, or by bits of the same type: the left one says which way a sign goes."""
    if type(right) is tl.tensor:
        return type(left) is not tl.tensor or left.dtype.name == right.dtype.name
    return type(right) is int and 0 <= right < left.dtype.primitive_bitwidth


def _offset(block: Any, pointer: Any, offset: Any) -> Any:
    """A pointer some elements further on."""
    if type(offset) is bool or (type(offset) is tl.tensor and offset.dtype.name not in _INTEGERS):
        return None
    width = np.uint64(max(1, pointer.dtype.element_ty.primitive_bitwidth // 8))
    result = _Result(_shaped(block, pointer.dtype), pointer.handle.dtype)
    if type(offset) is tl.tensor:
        return lambda left, right: result(left.handle.data + width * right.handle.data.astype(np.uint64))
    if type(offset) is not int:
        return None
    moved = width * np.array([offset]).astype(np.uint64)
    return lambda left, right: result(left.handle.data + moved)


def _where(condition: Any, x: Any, y: Any) -> Any:
    block = _block_of(condition, x, y)
    if block is None or type(condition) is not tl.tensor or condition.dtype.name != "int1":
        return None
    if type(x) is not tl.tensor and type(y) is not tl.tensor:
        return None
    found = _common((x, y))
    if found is None:
        return None
    dtype, (first, second) = found
    result = _Result(_shaped(block, dtype), dtype)
    return lambda condition, x, y: result(np.where(condition.handle.data, first(x), second(y)))


def _cast(operand: Any, dtype: Any, bitcast: bool) -> Any:
    if dtype.name == operand.dtype.name:
        return lambda operand: operand
    if dtype.name not in _NUMBERS or operand.dtype.name not in _NUMBERS | {"int1"}:
        return None
    result, numpy_dtype = _Result(_shaped(operand.type, dtype), dtype), interpreter._get_np_dtype(dtype)
    if not bitcast:
        return lambda operand: result(operand.handle.data.astype(numpy_dtype))
    if dtype.itemsize != operand.dtype.itemsize:
        return None
    return lambda operand: result(operand.handle.data.view(numpy_dtype))


def _fits(pointer: Any, operand: Any, dtype: Any) -> bool:
    """Whether a tensor has the shape of a pointer, and the type."""
    return _shaped(operand.type, dtype).name == _shaped(pointer.type, dtype).name and operand.dtype.name == dtype.name


def _taken(pointer: Any, operand: Any, dtype: Any) -> Any:
    """How an operand of a load or a store is brought to the shape of the pointer; None where that takes more."""
    if type(operand) is tl.tensor:
        return _data_of if _fits(pointer, operand, dtype) else None
    semantic, size = interpreter.interpreter_semantic, pointer.type.shape if pointer.type.is_block() else (1,)
    number = semantic.cast(semantic.to_tensor(operand), dtype).handle.data
    constant = np.full(size, number, interpreter._get_np_dtype(dtype))
    return lambda _: constant


def _load(pointer: Any, mask: Any, other: Any) -> Any:
    element = pointer.dtype.element_ty
    if element.name not in _NUMBERS | {"bf16"}:
        return None
    chosen = _taken(pointer, True if mask is None else mask, tl.int1)
    instead = _taken(pointer, 0 if other is None else other, element)
    if chosen is None or instead is None:
        return None
    numpy_dtype, read = interpreter._get_np_dtype(element), interpreter._interpreter.load
    result = _Result(_shaped(pointer.type, element), element)
    return lambda pointer, mask, other: result(read(pointer.handle.data, chosen(mask), instead(other), numpy_dtype))


def _store(pointer: Any, value: Any, mask: Any) -> Any:
    element = pointer.dtype.element_ty
    if element.name not in _NUMBERS | {"bf16"}:
        return None
    chosen, stored = _taken(pointer, True if mask is None else mask, tl.int1), _taken(pointer, value, element)
    if chosen is None or stored is None:
        return None
    write = interpreter._interpreter.store
    return lambda pointer, value, mask: write(pointer.handle.data, stored(value), chosen(mask))


def _unary(operation: Any, operand: Any) -> Any:
    if operand.dtype.name not in ("fp32", "fp64"):
        return None
    result = _Result(operand.type, operand.dtype)
    return lambda operand: result(operation(operand.handle.data))


def _value(operand: Any) -> Any:
    return operand.value if type(operand) is tl.constexpr else operand


def _direct(name: str, ask: Any) -> Any:
    """An operation that looks itself up, and asks Triton where numpy hasn't what it needs."""
    word, steps = name.strip("_"), dict[Any, Any]()
    swapped = word[0] == "r" and word[1:] in _REVERSED and name.startswith("__")
    rule = _FUNCTIONS.get(name) or (_RULES.get(word[1:] if swapped else word) if name.startswith("__") else None)

    def binary(left: Any, right: Any, **options: Any) -> Any:
        a, b = (_value(right), _value(left)) if swapped else (_value(left), _value(right))
        key = _key_of(a), _key_of(b)
        step = steps.get(key)
        if step is None:
            step = steps[key] = (None not in key and _binary(rule, a, b)) or ask
        if step is ask or (options and not options.keys() <= _UNREAD):
            return ask(left, right, **options)
        return step(a, b)

    def where(condition: Any, x: Any, y: Any, **options: Any) -> Any:
        x, y = _value(x), _value(y)
        key = _key_of(condition), _key_of(x), _key_of(y)
        if key not in steps:
            steps[key] = (None not in key and _where(condition, x, y)) or ask
        return steps[key](condition, x, y)

    def cast(operand: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: Any = False, **options: Any) -> Any:
        dtype, rounding, bitcast = _value(dtype), _value(fp_downcast_rounding), bool(_value(bitcast))
        key = _key_of(operand), dtype.name, bitcast
        if key not in steps:
            known = type(operand) is tl.tensor and type(dtype) is type(operand.dtype) is _PLAIN
            steps[key] = (known and _cast(operand, dtype, bitcast)) or None
        if rounding is not None or steps[key] is None:
            return ask(operand, dtype, rounding, bitcast)
        return steps[key](operand)

    def load(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
        mask, other = _value(mask), _value(other)
        key = _key_of(pointer), _key_of(mask), _key_of(other)
        if key not in steps:
            known = type(pointer) is tl.tensor and pointer.dtype.is_ptr() and (mask is not None or other is None)
            steps[key] = (known and _load(pointer, mask, other)) or None
        if steps[key] is None:
            return ask(pointer, mask, other, **options)
        return steps[key](pointer, mask, other)

    def store(pointer: Any, value: Any, mask: Any = None, **options: Any) -> Any:
        mask, value = _value(mask), _value(value)
        key = _key_of(pointer), _key_of(value), _key_of(mask)
        if key not in steps:
            known = type(pointer) is tl.tensor and pointer.dtype.is_ptr()
            steps[key] = (known and _store(pointer, value, mask)) or None
        if steps[key] is None:
            return ask(pointer, value, mask, **options)
        return steps[key](pointer, value, mask)

    def unary(operand: Any, **options: Any) -> Any:
        key = _key_of(operand)
        if key not in steps:
            steps[key] = (type(operand) is tl.tensor and _unary(_UNARY[name], operand)) or ask
        return steps[key](operand)

    def once(*arguments: Any, **options: Any) -> Any:
        """What nobody writes to is made once."""
        key = tuple([_key_of(each) for each in map(_value, (*arguments, *options.values()))])
        if key not in steps:
            steps[key] = ask(*arguments, **options)
            steps[key].handle.data.flags.writeable = False
        return steps[key]

    if rule or name in _UNARY:
        return binary if rule else unary
    return {"where": where, "load": load, "store": store, "cast": cast, "to": cast, "arange": once}.get(name, ask)


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

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = _known_of(type)

    tl.tensor.__init__ = tensor

    check = interpreter.TensorHandle.__post_init__

    def handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if type(dtype) is not _PLAIN or data.itemsize > max(dtype.itemsize, 1):
            check(self)

    interpreter.TensorHandle.__init__ = handle


def _no_unread_checks() -> None:
    """An overflow is looked for with six operations beside each, and told only where debugging is on."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _silently() -> None:
    """A GPU says nothing of an overflow, and of what is not a number."""
    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> None:
        with np.errstate(all="ignore"):
            launch(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = call


def speed_up() -> None:
    """Replace what is slow, once, where this process interprets and this version of Triton is known."""
    version = tuple(int(each) for each in triton.__version__.split(".")[:2])
    if not triton.knobs.runtime.interpret or version not in _VERSIONS:
        return
    if interpreter._patch_lang.__module__ == interpreter.__name__:
        _patch_once()
        _dtypes_once()
        _types_once()
        _no_unread_checks()
        _silently()

"""openpi's wire format: msgpack with numpy arrays and scalars, as openpi_client.msgpack_numpy writes and reads it.

Arrays travel as {b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": [int]}, scalars as
{b"__npgeneric__": True, b"data": number, b"dtype": str}. `decode` takes bytes from strangers: it makes nothing larger
than a small multiple of the message, and raises ValueError on anything but maps, lists, text, numbers and arrays.
"""

import math
from typing import Any, cast

import msgpack
import numpy as np

DTYPES = {
    name: np.dtype(name)
    for name in ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
}  # as numpy names them on the wire; no strings, no objects
MAX_DEPTH = 8
MAX_ITEMS = 16_384  # of all lists and maps together
MAX_LENGTH = 4_096  # of one list or map
MAX_TEXT = 4_096  # bytes
MAX_DIMS = 8
MAX_SIDE = 2**31

_ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR = {b"__npgeneric__", b"data", b"dtype"}


def encode(message: Any) -> bytes:
    """A message → bytes.

    Raises:
        ValueError: an array's dtype is not one of `DTYPES`.
        TypeError: msgpack knows no such value.
    """
    return cast(bytes, msgpack.packb(message, default=_pack))


def decode(data: bytes) -> dict[str, Any]:
    """The bytes of a map → a dict. Arrays are read-only views of what msgpack read.

    Raises:
        ValueError: it is no such message, or larger or deeper than the limits above.
    """
    items = 0

    def count(length: int) -> None:
        nonlocal items
        items += length + 1
        if items > MAX_ITEMS:
            raise ValueError(f"the message has more than {MAX_ITEMS} items; send numbers as numpy arrays")

    def make_list(values: list) -> list:
        count(len(values))
        return values

    def make_map(values: dict) -> Any:
        count(len(values))
        return _unpack(values)

    try:
        message = msgpack.unpackb(
            data,
            object_hook=make_map,
            list_hook=make_list,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_str_len=MAX_TEXT,
            max_ext_len=0,
        )
    except msgpack.StackError as error:
        raise ValueError(f"the message is nested deeper than {MAX_DEPTH} levels") from error
    except msgpack.FormatError as error:
        raise ValueError("the message is not msgpack") from error
    if not isinstance(message, dict):
        raise ValueError(f"the message is {_name(message)}; send a map of an observation's keys")
    _check(message, depth=1)
    return message


def _pack(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"cannot send {_name(value)}; send maps, lists, text, numbers or numpy arrays")
    if value.dtype.str not in DTYPES:
        raise ValueError(f"cannot send the dtype {value.dtype}; send one of {', '.join(DTYPES)}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _unpack(values: dict) -> Any:
    """A map, or the array or scalar that it stands for."""
    if b"__ndarray__" in values:
        return _unpack_array(values)
    if b"__npgeneric__" in values:
        return _unpack_scalar(values)
    return values


def _unpack_array(values: dict) -> np.ndarray:
    dtype = _dtype(values, _ARRAY)
    data, shape = values[b"data"], values[b"shape"]
    if not isinstance(data, bytes):
        raise ValueError(f"an array's data is {_name(data)}; send bytes")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(side) is int for side in shape):
        raise ValueError(f"an array's shape is not a list of at most {MAX_DIMS} integers")
    if not all(0 <= side <= MAX_SIDE for side in shape):
        raise ValueError(f"an array's shape {shape} has sides outside 0 to {MAX_SIDE}")
    if (size := math.prod(shape) * dtype.itemsize) != len(data):
        raise ValueError(f"an array of shape {shape} and dtype {dtype.str} has {size} bytes; {len(data)} came")
    if dtype.kind == "b" and data.translate(None, b"\x00\x01"):
        raise ValueError("an array of booleans has bytes other than 0 and 1")
    return np.ndarray(shape, dtype, data)


def _unpack_scalar(values: dict) -> np.generic:
    dtype = _dtype(values, _SCALAR)
    number = values[b"data"]
    kinds = {"b": (bool,), "f": (float, int)}.get(dtype.kind, (int,))
    if type(number) not in kinds:
        raise ValueError(f"a scalar of dtype {dtype.str} cannot be {_name(number)}")
    try:
        with np.errstate(over="raise"):
            return dtype.type(number)
    except ArithmeticError as error:
        raise ValueError(f"a scalar of dtype {dtype.str} cannot hold {number}") from error


def _dtype(values: dict, keys: set[bytes]) -> np.dtype:
    if values.keys() != keys:
        raise ValueError(f"an array or scalar needs exactly the keys {sorted(keys)}")
    name = values[b"dtype"]
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"cannot take the dtype {str(name)[:20]!r}; send one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check(value: Any, depth: int) -> None:
    """Raises ValueError for other types, keys that are not text, and nesting that is too deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the message is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key is {_name(key)}; send text")
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    elif not isinstance(value, str | bool | int | float | np.ndarray | np.generic | None):
        raise ValueError(f"the message has {_name(value)}; send maps, lists, text, numbers or numpy arrays")


def _name(value: Any) -> str:
    return f"a value of type {type(value).__name__}"

"""The wire format: openpi's own packer and unpacker are the oracle, and nothing malformed gets past."""

from typing import cast

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from openpi_client import msgpack_numpy

from pi0fast import wire

DTYPES = st.sampled_from([np.dtype(name) for name in wire.DTYPES])
ARRAYS = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=20))
MESSAGES = st.dictionaries(
    st.text(max_size=10),
    st.one_of(SCALARS, ARRAYS, ARRAYS.map(lambda array: array.reshape(-1)[:1].sum()), st.lists(SCALARS, max_size=4)),
    max_size=5,
)


def same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, list):
        for our_item, their_item in zip(ours, theirs, strict=True):
            same(our_item, their_item)
    else:
        if isinstance(ours, np.ndarray | np.generic):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None)
@given(MESSAGES)
def test_reads_and_writes_as_openpi(message):
    data = cast(bytes, msgpack_numpy.packb(message))
    assert wire.encode(message) == data
    same(wire.decode(data), msgpack_numpy.unpackb(data))


def test_arrays_are_views_that_nobody_can_write():
    array = wire.decode(wire.encode({"image": np.ones((4, 4, 3), np.uint8)}))["image"]
    assert not array.flags.writeable and not array.flags.owndata


def test_a_transposed_array_keeps_its_values():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(wire.decode(wire.encode({"a": array}))["a"], array)


def packed(message) -> bytes:
    return cast(bytes, msgpack.packb(message))


def array(**changes):
    fields = {"__ndarray__": True, "data": bytes(12), "dtype": "<f4", "shape": [3]} | changes
    return {"a": {key.encode(): value for key, value in fields.items() if value is not ...}}


def scalar(**changes):
    fields = {"__npgeneric__": True, "data": 1, "dtype": "|u1"} | changes
    return {"a": {key.encode(): value for key, value in fields.items()}}


def nested(depth):
    return {"a": nested(depth - 1)} if depth else 1


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (array(shape=[4]), "has 16 bytes; 12 came"),
        (array(shape=[2**31, 2**31, 2**31]), "12 came"),
        (array(shape=[2**40, 0], data=b""), "sides outside"),
        (array(shape=[-3]), "sides outside"),
        (array(shape=[-1, -3]), "sides outside"),
        (array(shape=[True, 3]), "list of at most 8 integers"),
        (array(shape=[3.0]), "list of at most 8 integers"),
        (array(shape=[1] * 9 + [3]), "list of at most 8 integers"),
        (array(shape=3), "list of at most 8 integers"),
        (array(shape=...), "exactly the keys"),
        (array(extra=1), "exactly the keys"),
        (array(data="x" * 12), "of type str; send bytes"),
        (array(dtype="|O", data=bytes(24)), r"cannot take the dtype '\|O'"),
        (array(dtype="|V4"), r"cannot take the dtype '\|V4'"),
        (array(dtype="<c8", data=bytes(24)), "cannot take the dtype"),
        (array(dtype="<U1"), "cannot take the dtype '<U1'; send one of"),
        (array(dtype=">f4"), "cannot take the dtype '>f4'"),
        (array(dtype=[["a", "<f4"]]), "cannot take the dtype"),
        (array(dtype="|b1", data=b"\x02", shape=[1]), "other than 0 and 1"),
        (scalar(data=256), r"dtype \|u1 cannot hold 256"),
        (scalar(data=1.5), r"dtype \|u1 cannot be a value of type float"),
        (scalar(data=True), "cannot be a value of type bool"),
        (scalar(data=1, dtype="|b1"), "cannot be a value of type int"),
        (scalar(data="1", dtype="<f4"), "cannot be a value of type str"),
        (scalar(data=1e300, dtype="<f4"), "cannot hold"),
        (scalar(data=1, dtype="<M8"), "cannot take the dtype"),
        ([1, 2], "of type list; send a map"),
        (1, "of type int; send a map"),
        ({b"a": 1}, "a key is a value of type bytes"),
        ({"a": {b"b": 1}}, "a key is a value of type bytes"),
        ({"a": b"raw"}, "has a value of type bytes"),
        ({"a": msgpack.Timestamp(1)}, "ext"),
        ({"a": msgpack.ExtType(5, b"")}, "of type ExtType"),
        ({"a": [0] * 4097}, "4096"),
        ({"a": "x" * 4_097}, "max_str_len"),
        ({"a": [[0] * 4000] * 5}, "more than 16384 items"),
        ({"a": [[]] * 4000, "b": [[[]] * 1000] * 10}, "more than 16384 items"),
        (nested(8), "deeper than 8 levels"),
    ],
)
def test_refuses(message, error):
    with pytest.raises(ValueError, match=error):
        wire.decode(packed(message))


def test_takes_what_is_just_within_the_limits():
    assert wire.decode(packed(nested(7))) == nested(7)
    message = {"a": [0] * 4096}
    assert wire.decode(packed(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81\xa1a",  # truncated
        b"\x81\xa1a\x01\x01",  # more follows
        b"\x81\xa1\xff\x01",  # not UTF-8
        b"\x81\x90\x01",  # a list as a key
        b"\x81\x81\xc4\x0b__ndarray__\xc3\x01",  # an array as a key
        b"\xdd\xff\xff\xff\xff",  # four billion items announced
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        b"\x91" * 500 + b"\xc0",
    ],
)
def test_refuses_bytes(data):
    with pytest.raises(ValueError, match=r".+"):
        wire.decode(data)


@given(st.binary(max_size=200))
def test_random_bytes_give_a_message_or_a_value_error(data):
    try:
        assert isinstance(wire.decode(data), dict)
    except ValueError as error:
        assert str(error)


@given(MESSAGES, st.data())
@settings(deadline=None)
def test_mutated_messages_give_a_message_or_a_value_error(message, data):
    spoiled = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(wire.decode(bytes(spoiled)), dict)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("value", [np.zeros(2, complex), np.array(["a"]), np.array([None]), np.zeros(2, "i4,f4")])
def test_writes_no_other_dtypes(value):
    with pytest.raises(ValueError, match="cannot send the dtype"):
        wire.encode({"a": value})


def test_writes_no_other_values():
    with pytest.raises(TypeError, match="cannot send a value of type object"):
        wire.encode({"a": object()})

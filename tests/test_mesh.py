"""Mesh descriptions and the errors they give."""

import pytest

from pi0fast import mesh


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("fsdp:8", (1, 8)),
        ("data:2,fsdp:4", (2, 4)),
        ("fsdp:-1", (1, 8)),
        ("fsdp:2,data:-1", (4, 2)),
        ("fsdp:2", (1, 2)),
    ],
)
def test_meshes(spec, shape):
    made = mesh.make(spec)
    assert made.axis_names == ("data", "fsdp") and made.devices.shape == shape


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model:2", "must be one of data, fsdp"),
        ("fsdp:2,fsdp:4", "each once"),
        ("fsdp:0", "positive integer"),
        ("fsdp:-2", "positive integer"),
        ("fsdp", "positive integer"),
        ("fsdp:-1,data:-1", "only one axis"),
        ("fsdp:3", "8"),
        ("fsdp:16", "there are 8"),
    ],
)
def test_malformed_meshes(spec, message):
    with pytest.raises(ValueError, match=message):
        mesh.make(spec)


def test_batch_must_divide():
    with pytest.raises(ValueError, match="--batch-size=12 does not divide over 8 devices; use 16"):
        mesh.check_batch(12, mesh.make("fsdp:8"))

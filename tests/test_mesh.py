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
        ("fsdp:3", r"does not divide the 8 devices there are \(cpu\); use fsdp:8 or data:2,fsdp:4"),
        ("fsdp:16", "does not divide the 8 devices"),
        ("fsdp:3,data:-1", "does not divide the 8 devices"),
        ("fsdp:16,data:-1", "does not divide the 8 devices"),
    ],
)
def test_malformed_meshes(spec, message):
    with pytest.raises(ValueError, match=message):
        mesh.make(spec)


@pytest.mark.parametrize(
    ("batch_size", "accum", "message"),
    [
        (12, 1, "--batch-size=12 does not divide over 8 devices; use 8 or 16"),
        (4, 1, "--batch-size=4 does not divide over 8 devices; use 8, say"),
        (0, 1, "use 8, say"),
        (24, 2, "--batch-size=24 does not divide over 8 devices and --accum=2 microbatches; use 16 or 32"),
        (8, 0, "--accum=0: a step has at least one microbatch"),
    ],
)
def test_batches_that_do_not_divide(batch_size, accum, message):
    with pytest.raises(ValueError, match=message):
        mesh.check_batch(batch_size, mesh.make("fsdp:8"), accum)


def test_batches_that_divide():
    mesh.check_batch(8, mesh.make("fsdp:8"))
    mesh.check_batch(48, mesh.make("data:2,fsdp:4"), 3)

"""Meshes over TPU slices that are not there."""

import os
import subprocess
import sys

import pytest

SLICES = """
from jax.experimental import topologies
from pi0fast import mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
for spec in ("data:2,fsdp:8", "data:4,fsdp:4", "fsdp:16"):
    print([[device.slice_index for device in row] for row in mesh.make(spec, devices).devices])
try:
    mesh.make("fsdp:8", devices)
except ValueError as error:
    print(error)
"""


def test_fsdp_runs_inside_slices_as_far_as_it_can():
    pytest.importorskip("libtpu", reason="compiles for TPUs: uv sync --group aot")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", SLICES], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        str([[0] * 8, [1] * 8]),
        str([[0] * 4, [0] * 4, [1] * 4, [1] * 4]),
        str([[0] * 8 + [1] * 8]),
        "--mesh='fsdp:8' leaves out some of the 16 devices of 4 processes; use fsdp:16",
    ]

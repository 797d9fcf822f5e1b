"""Restores a run of the small model as the trainer does, on this program's processes, and writes it as one npz file."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils

from pi0fast import checkpoint, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.distributed import DistributedSettings, join
from pi0fast.settings import TINY
from tests.mini import MINI


def main(
    target: Annotated[Path, tyro.conf.Positional], data: str, out: Path, mesh: str, distributed: DistributedSettings
) -> None:
    optim = dataclasses.replace(TINY.optim, mu_dtype="bfloat16")
    settings = dataclasses.replace(TINY, data=data, batch_size=8, optim=optim)
    with join(distributed, mesh) as processes:
        devices = meshes.make(mesh)
        loader = training_data.open_data(settings, MINI).loader
        _, state, frozen = train_state.abstract_state(MINI, settings, devices)
        state, frozen = train_state.restore(out, 2, state, frozen, loader)
        assert loader.state()["next_batch"] == 2
        weights = None if state.average is None else state.weights
        parts = {
            "params": state.for_inference(frozen),
            "train_state": checkpoint.leaves_by_path((state.step, weights, state.opt_state)),
        }
        arrays = {f"{part}/{path}": array for part, held in parts.items() for path, array in held.items()}
        arrays = {path: multihost_utils.process_allgather(array, tiled=True) for path, array in arrays.items()}
        if processes.is_first:
            np.savez(target, allow_pickle=False, **{path: bits(array) for path, array in arrays.items()})


def bits(array: np.ndarray) -> np.ndarray:
    """npz files hold bfloat16 as 16-bit integers."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


if __name__ == "__main__":
    tyro.cli(main)

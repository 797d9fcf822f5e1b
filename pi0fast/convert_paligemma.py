"""PaliGemma's released checkpoint as a start: big_vision's names, in one .npz file such as `pt_224.npz`.

They are openpi's without the action expert's, `params/` in place of `PaliGemma/`. https://arxiv.org/abs/2407.07726
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import DTypeLike

from pi0fast import convert, storage
from pi0fast.config import Pi0Config
from pi0fast.convert_rules import IMG, LLM, Params, rules


def paligemma_weights(path: str | Path, config: Pi0Config) -> list[str]:
    """Which of our weights PaliGemma's released checkpoint gives, an .npz of big_vision's such as `pt_224.npz`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: listing every parameter that is missing, extra or misshaped, before any is read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}; give the path of a downloaded pt_224.npz")
    found = {name: array.shape for name, array in _npz_header(Path(path)).items()}
    expected = {
        name: shape for name, shape in convert.openpi_shapes(config.without_lora()).items() if _is_paligemmas(name)
    }
    if problems := storage.shape_problems(found, expected):
        raise ValueError(
            f"{path} is not the PaliGemma that this model's VLM and SigLIP are; use its preset:\n  "
            + "\n  ".join(problems)
        )
    chosen = [rule for rule in rules(config.without_lora()) if all(map(_is_paligemmas, rule.theirs))]
    return [name for rule in chosen for name in (rule.ours, rule.last) if name]


def load_paligemma(
    path: str | Path, config: Pi0Config, mesh: Mesh | None = None, dtypes: Mapping[str, DTypeLike] | None = None
) -> tuple[Params, Params]:
    """As `load_openpi_weights`, for what `paligemma_weights` names. Every process reads the whole file, in groups."""
    given = set(paligemma_weights(path, config))
    with np.load(path) as file:

        def read(places: Mapping[str, Sharding | None]) -> Params:
            arrays = {name: file[f"params/{name.removeprefix('PaliGemma/')}"] for name in places}
            return {
                name: jnp.asarray(array)
                if (place := places[name]) is None
                else jax.make_array_from_callback(array.shape, place, lambda index, array=array: array[index])
                for name, array in arrays.items()
            }

        sizes = {name: storage.nbytes(array) for name, array in _npz_header(Path(path)).items()}
        chosen = [rule for rule in rules(config) if rule.ours in given]
        return convert.follow(chosen, config, mesh, dtypes or {}, sizes, read)


def _is_paligemmas(path: str) -> bool:
    """The action expert's parameters have `_1` somewhere."""
    return path.startswith(IMG) or (path.startswith(LLM) and not any(part.endswith("_1") for part in path.split("/")))


def _npz_header(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by openpi's paths; no array is read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no whole .npz file; download it again")
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            parameter = name.removesuffix(".npy").removeprefix("params/")
            found[f"PaliGemma/{parameter}"] = jax.ShapeDtypeStruct(shape, dtype)
    return found

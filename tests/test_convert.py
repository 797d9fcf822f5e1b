"""openpi checkpoints on disk, both ways, through the command line's functions."""

import dataclasses
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pi0fast import convert, fsdp, lora, normalize, storage, train_state
from pi0fast import mesh as meshes
from pi0fast.checkpoint import RunConfig
from pi0fast.convert_rules import infer_config
from pi0fast.params import flatten
from tests.golden import golden

STEP = golden.FOLDER / "checkpoint_pi0" / "100"


@pytest.fixture(scope="module")
def case():
    return golden.load("pi0_tiny")


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "run"
    convert.convert_from_openpi(str(STEP), out, action_horizon=10, max_token_len=16, dtype="float32")
    return out


def test_golden_checkpoint_gives_the_golden_velocity(case):
    model = convert.load_openpi_checkpoint(STEP, case.config)
    t = case.inputs["time"]
    x_t = t[:, None, None] * case.inputs["noise"] + (1 - t[:, None, None]) * case.inputs["actions"]
    velocity = jax.jit(lambda m: m.velocity(case.observation, x_t, t))(model)
    expected = case.values["velocity"]
    assert np.linalg.norm(velocity - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", golden.NAMES)
def test_config_is_read_off_the_shapes(name):
    case = golden.load(name)
    horizon, length = case.config.action_horizon, case.config.max_token_len
    shapes = {path: array.shape for path, array in case.params.items()}
    assert infer_config(shapes, "float32", action_horizon=horizon, max_token_len=length) == case.config
    with pytest.raises(ValueError, match="no openpi Pi0 checkpoint: it has no parameter 'PaliGemma"):
        infer_config({"embedder/kernel": (3, 4)}, "float32")


def test_there_and_back_is_bit_exact(case, run, tmp_path):
    assert RunConfig.load(run).model == case.config
    convert.convert_to_openpi(run, tmp_path / "back" / "100", asset_id="local/toy")
    back = convert.load_openpi_params(tmp_path / "back" / "100")
    assert sorted(back) == sorted(case.params)
    for path, array in case.params.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)
    stats = "assets/local/toy/norm_stats.json"
    before, after = normalize.load(STEP / stats), normalize.load(tmp_path / "back" / "100" / stats)
    assert normalize.to_dict(before) == normalize.to_dict(after)
    shapes = convert.openpi_shapes(case.config)
    stored = storage.array_shapes(tmp_path / "back" / "100" / "params")
    assert {path.removeprefix("params/"): leaf.shape for path, leaf in stored.items()} == shapes


def test_trees_that_end_in_value_and_other_dtypes(case, tmp_path):
    """As openpi's trainer writes them, here in bfloat16, which is kept."""
    tree: dict = {}
    for path, array in case.params.items():
        *folders, name = f"params/{path}/value".split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jax.numpy.asarray(array, "bfloat16")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "200" / "params", args=ocp.args.PyTreeSave(tree))
    model = convert.load_openpi_checkpoint(tmp_path / "200", case.config)
    weights = flatten(model)
    assert {variable.dtype for variable in weights.values()} == {jax.numpy.dtype("bfloat16")}
    expected = flatten(case.model())
    for path, variable in weights.items():
        np.testing.assert_array_equal(variable[...], expected[path][...].astype("bfloat16"))


def test_loaded_onto_a_mesh_each_device_holds_its_shard(case):
    mesh = meshes.make("fsdp:8")
    model = convert.load_openpi_checkpoint(STEP, case.config, mesh)
    expected = flatten(case.model())
    sharded = 0
    for path, variable in flatten(model).items():
        np.testing.assert_array_equal(variable[...], expected[path][...], err_msg=path)
        assert variable.get_value().sharding == fsdp.weight_shardings(model, mesh)[path]
        sharded += variable.get_value().addressable_shards[0].data.size < variable.size
    assert sharded > 20


def test_errors_come_before_anything_is_written(case, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no orbax arrays"):
        convert.convert_from_openpi(str(tmp_path / "none"), tmp_path / "run")
    with pytest.raises(FileExistsError, match="new folder"):
        convert.convert_from_openpi(str(STEP), tmp_path)
    two = shutil.copytree(STEP, tmp_path / "two")
    shutil.copytree(two / "assets" / "local", two / "assets" / "other")
    with pytest.raises(ValueError, match=r"\['local/toy', 'other/toy'\]; choose one with --asset-id"):
        convert.convert_from_openpi(str(two), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_run_starts_from_openpi(case):
    from pi0fast.settings import TINY

    settings = dataclasses.replace(TINY, init_from=str(STEP))
    state, _, dead = train_state.initialize(case.config, settings, meshes.make("fsdp:8"))
    expected = flatten(case.model())
    for path, variable in flatten(state.weights).items():
        np.testing.assert_array_equal(variable[...], expected[path][...], err_msg=path)
    kept = convert.dead_params(case.params, case.config)
    assert dead.keys() == kept.keys()
    for path, array in kept.items():
        np.testing.assert_array_equal(dead[path], array)


@pytest.mark.slow
def test_updates_go_there_and_back_and_can_be_merged_on_the_way(tmp_path):
    case = golden.load("pi0_lora_tiny")
    source = tmp_path / "source" / "100"
    storage.save_arrays(source / "params", {f"params/{p}": jax.numpy.asarray(x) for p, x in case.params.items()})
    shutil.copytree(STEP / "assets", source / "assets")
    horizon, length = case.config.action_horizon, case.config.max_token_len
    updates = case.config.vlm.lora
    assert updates is not None
    convert.convert_from_openpi(
        str(source),
        tmp_path / "run",
        action_horizon=horizon,
        max_token_len=length,
        lora_alpha=updates.alpha,
        dtype="float32",
    )
    assert RunConfig.load(tmp_path / "run").model == case.config
    convert.convert_to_openpi(tmp_path / "run", tmp_path / "back" / "100")
    back = convert.load_openpi_params(tmp_path / "back" / "100")
    assert back.keys() == case.params.keys()
    for path, array in case.params.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)

    convert.convert_to_openpi(tmp_path / "run", tmp_path / "merged" / "100", merged=True)
    merged = flatten(convert.load_openpi_checkpoint(tmp_path / "merged" / "100", case.config.without_lora()))
    expected = flatten(lora.merge(case.model()))
    assert merged.keys() == expected.keys()
    for path, variable in expected.items():
        np.testing.assert_array_equal(merged[path][...], variable[...], err_msg=path)

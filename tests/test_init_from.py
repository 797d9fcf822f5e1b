"""Training starts from another model's weights: what fits is kept, what is new is said, anything else is an error."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import ArrayLike

from pi0fast import convert_paligemma, init_from, lora, train
from pi0fast import mesh as meshes
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.config import LoraConfig, Pi0Config
from pi0fast.params import flatten, replace
from pi0fast.pi0 import Pi0
from pi0fast.settings import TINY
from pi0fast.tuning import adapted
from tests.golden import golden
from tests.mini import MINI

STEP = golden.FOLDER / "checkpoint_pi0" / "100"
UPDATES = MINI.with_lora(LoraConfig(rank=2), LoraConfig(rank=4))
OF_THE_MLP = MINI.with_lora(None, LoraConfig(rank=4, attention=False))

Weights = dict[str, np.ndarray]


def write_run(folder: Path, config: Pi0Config) -> Weights:
    """A run with random weights."""
    rng = np.random.default_rng(0)
    shapes = {path: x.shape for path, x in flatten(Pi0.abstract(config)).items()}
    weights = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    RunConfig(config, None, "demo").save(folder)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(0, params={path: jnp.asarray(x) for path, x in weights.items()}, norm_stats={})
    return weights


def start(source: Path, config: Pi0Config) -> Weights:
    """The weights that a run of this config starts with on two devices, gathered."""
    dtypes = dict.fromkeys(flatten(Pi0.abstract(config)), "float32")
    model, _ = init_from.load(str(source), config, meshes.make("fsdp:2"), dtypes, seed=3)
    assert model.config == config
    return {path: np.asarray(variable[...]) for path, variable in flatten(model).items()}


def assert_kept(weights: Weights, source: Mapping[str, ArrayLike], besides: tuple[str, ...] = ()) -> None:
    for path, array in weights.items():
        if path not in besides:
            np.testing.assert_array_equal(array, source[path], err_msg=path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, write_run(folder, MINI)


@pytest.fixture(scope="module")
def updated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updated") / "run"
    return folder, write_run(folder, UPDATES)


@pytest.mark.slow
def test_updates_that_the_source_lacks_are_initialised(plain):
    folder, source = plain
    plan = init_from.plan(str(folder), OF_THE_MLP)
    parts = "action_expert/layers/down_lora, action_expert/layers/gate_up_lora"
    assert str(plan) == f"Initialised anew, not read: {parts}"
    weights = start(folder, OF_THE_MLP)
    assert_kept(weights, source, besides=plan.fresh)
    for path in plan.fresh:
        assert 0.5 < weights[path].std() / lora.INIT_STD < 1.5, path
    assert {path for path in weights if lora.is_lora(path)} == set(plan.fresh)


def test_the_same_updates_are_kept(updated):
    folder, source = updated
    alpha_is_rank = MINI.with_lora(LoraConfig(rank=2, alpha=2.0), LoraConfig(rank=4))
    assert str(init_from.plan(str(folder), alpha_is_rank)) == ""
    assert_kept(start(folder, alpha_is_rank), source)


@pytest.mark.slow
def test_updates_that_the_model_lacks_are_merged(updated):
    folder, source = updated
    model = replace(Pi0.abstract(UPDATES), {p: jnp.asarray(x) for p, x in source.items()})
    for config, experts in (
        (MINI, ("vlm", "action_expert")),
        (MINI.with_lora(LoraConfig(rank=2), None), ("action_expert",)),
    ):
        assert str(init_from.plan(str(folder), config)) == (
            f"Merged into their projections: the LoRA updates of {', '.join(experts)}"
        )
        weights = start(folder, config)
        for path, merged in flatten(lora.merge(model, experts)).items():
            np.testing.assert_allclose(weights[path], merged[...], rtol=1e-6, atol=1e-5, err_msg=path)
        changed = {
            path.removeprefix("action_expert/layers/") for path in weights if (weights[path] != source[path]).any()
        }
        assert changed >= {"down", "gate_up", "kv", "out", "q"} and ("vlm/last/kv" in changed) == ("vlm" in experts)


def test_another_alpha_is_another_update(updated):
    plan = init_from.plan(str(updated[0]), MINI.with_lora(LoraConfig(rank=2, alpha=1.0), LoraConfig(rank=4)))
    assert plan.merged == ("vlm",) and {path.split("/")[0] for path in plan.fresh} == {"vlm"}


def test_another_robot_gets_new_projections_of_states_and_actions(plain):
    folder, source = plain
    other = dataclasses.replace(MINI, action_dim=5)
    plan = init_from.plan(str(folder), other)
    assert str(plan) == "Initialised anew, not read: head/action_in, head/action_out, head/state_in"
    assert len(plan.fresh) == 6  # biases too, even where they would fit
    weights = start(folder, other)
    assert_kept(weights, source, besides=plan.fresh)
    assert weights["head/action_in/kernel"].std() > 0.1 and not weights["head/action_in/bias"].any()


def test_an_openpi_checkpoint_starts_a_robot_of_another_width():
    case = golden.load("pi0_tiny")
    config = dataclasses.replace(case.config, action_dim=5)
    plan = init_from.plan(str(STEP), config)
    assert len(plan.fresh) == 6
    assert_kept(start(STEP, config), arrays(case), besides=plan.fresh)


def arrays(case: golden.Golden) -> dict[str, ArrayLike]:
    return {path: variable[...] for path, variable in flatten(case.model()).items()}


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"vocab_size": 600, "action_dim": 5}, [r"misshaped: embedding is \(512, 32\), expected \(600, 32\)"]),
        (
            {"siglip": dataclasses.replace(MINI.siglip, mlp_dim=64)},
            [r"siglip/layers/up/kernel is \(1, 32, 48\)", r"siglip/layers/down/kernel is \(1, 48, 32\)"],
        ),
        (
            {"pi05": True, "state_mode": None},
            [r"missing: action_expert/norm/modulation/kernel", r"extra: head/state_in/kernel \(2, 32\)"],
        ),
        (
            {name: dataclasses.replace(getattr(MINI, name), num_heads=4, head_dim=8, num_kv_heads=2) for name in
             ("vlm", "action_expert")},
            [r"vlm.num_heads is 2, expected 4", r"vlm.head_dim is 16, expected 8"],
        ),
    ],
)  # fmt: skip
def test_anything_else_that_differs_is_listed(plain, changes, problems):
    for problem in problems:
        with pytest.raises(ValueError, match=rf"does not fit this model(.|\n)*{problem}"):
            init_from.plan(str(plain[0]), dataclasses.replace(MINI, **changes))


def test_another_state_mode_is_an_error_with_the_flag_that_keeps_it(tmp_path):
    unused = dataclasses.replace(MINI, pi05=True, state_mode="unused")
    write_run(tmp_path, unused)
    prompt = dataclasses.replace(unused, state_mode="prompt")
    with pytest.raises(ValueError, match="state_mode is 'unused', expected 'prompt'; give --input.state-mode=unused"):
        init_from.plan(str(tmp_path), prompt)
    assert str(init_from.plan(str(tmp_path), unused)) == ""
    resuming = dataclasses.replace(TINY, resume=True)
    with pytest.raises(
        ValueError, match="began with state_mode='unused', not 'prompt'; give --input.state-mode=unused"
    ):
        train.check_out(tmp_path, prompt, resuming)
    kept = adapted(prompt, dataclasses.replace(TINY, input=dataclasses.replace(TINY.input, state_mode="unused")))
    assert kept == unused


def test_paligemma_gives_the_vlm_and_siglip(tmp_path):
    case = golden.load("pi0_tiny")
    path = tmp_path / "pt_224.npz"
    names = {
        name: name.replace("PaliGemma/", "params/")
        for name in case.params
        if name.startswith("PaliGemma/img/") or ("PaliGemma/llm/" in name and "_1" not in name)
    }
    saved: dict[str, Any] = {theirs: case.params[name] for name, theirs in names.items()}
    np.savez(path, **saved)
    plan = init_from.plan(str(path), case.config)
    assert str(plan) == "Initialised anew, not read: action_expert, head"
    dtypes = dict.fromkeys(flatten(case.model()), "float32")
    given, dead = convert_paligemma.load_paligemma(path, case.config, meshes.make("fsdp:2"), dtypes)
    assert {name.split("/")[0] for name in given} == {"embedding", "siglip", "vlm"}
    assert set(given) | set(plan.fresh) == set(dtypes) and not set(given) & set(plan.fresh)
    assert_kept({name: np.asarray(array) for name, array in given.items()}, arrays(case))
    assert "PaliGemma/llm/final_norm/scale" in dead

    wider = dataclasses.replace(case.config, vocab_size=600)
    with pytest.raises(ValueError, match=r"misshaped: PaliGemma/llm/embedder/input_embedding is \(\d+, .*\(600, "):
        init_from.plan(str(path), wider)
    with pytest.raises(FileNotFoundError, match="downloaded pt_224.npz"):
        init_from.plan(str(tmp_path / "none.npz"), case.config)

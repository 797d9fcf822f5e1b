"""FLOPs of `pi0fast.flops` against what XLA compiles from the same shapes: each part, the whole step, inference.

XLA counts a loop's body once, so the parts are compiled one layer at a time, in the released sizes. There all that XLA
counts, sums and conversions too, is within 2 % of the formulas; the matrix products alone are what they say exactly.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from bench.parts import cases
from pi0fast import Pi0, config, flops, policy, precompile, train, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.config import LoraConfig, Pi0Config
from pi0fast.estimate import estimate
from pi0fast.execution import Execution
from pi0fast.flops import DeviceSpec
from pi0fast.hlo import Program
from pi0fast.params import flatten
from pi0fast.sampling import Sampler
from pi0fast.settings import DEFAULTS, TINY, Settings
from tests.mini import MINI

CAMERAS = 3
REFERENCE = Execution(kernels="reference")
BATCH = 32  # weights are cast once a batch, and of one example XLA makes some products into sums


def products(text: str | None) -> float:
    """FLOPs of a program's matrix products, those of loops as often as they run."""
    program = Program(text or "")
    assert not any(x.opcode == "convolution" for found in program.computations.values() for x in found)
    return estimate(program, DeviceSpec("", flops=1.0, bandwidth=float("inf"), memory=0.0), lambda _: 0.0).flops


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

PI0 = "patches", "siglip layer", "siglip head", "vlm layer", "vlm's last layer"
PI0 += "expert layer", "suffix tokens", "actions out"
PI05 = "expert layer", "suffix tokens", "last modulation"  # what else it has is Pi0's


@pytest.mark.parametrize(("preset", "name"), [*(("pi0_base", x) for x in PI0), *(("pi05_base", x) for x in PI05)])
def test_parts(preset, name):
    size = config.PRESETS[preset]()
    case = cases(size, BATCH, REFERENCE)[name]
    part = case.part(size)
    out, pull = jax.eval_shape(case.linearize, *case.inputs)
    for lowered, expected in (
        (jax.jit(case.forward).lower(*case.inputs), BATCH * part.forward),
        (jax.jit(lambda pull, out: pull(out)).lower(pull, out), BATCH * part.backward),
    ):
        compiled: Any = lowered.compile()
        assert products(compiled.as_text()) == expected
        assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.02)


def test_patches_count_as_the_convolution_that_they_are():
    size = config.pi0_base()
    patch, width, side = size.siglip.patch_size, size.siglip.width, size.image_size
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731

    def embed(kernel, image):
        return lax.conv_general_dilated(
            image, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def gradient(kernel, image, out):
        return jax.vjp(lambda kernel: embed(kernel, image), kernel)[1](out)

    inputs = array(patch, patch, 3, width), array(1, side, side, 3)
    forward: Any = jax.jit(embed).lower(*inputs).cost_analysis()
    backward: Any = jax.jit(gradient).lower(*inputs, jax.eval_shape(embed, *inputs)).cost_analysis()
    part = flops.parts(size, 1, 0)["siglip/patches"]
    assert (forward["flops"], backward["flops"]) == (part.forward, part.backward)


# ── Whole programs ────────────────────────────────────────────────────────────────────────────────────────────────────


RELEASED = pytest.mark.parametrize("preset", ["pi0_base", "pi05_base"])


def products_of(lowered: Any) -> float:
    """As JAX gives the program to XLA: products are then products, and what nobody needs is gone already."""
    return products(lowered.compiler_ir("hlo").get_hlo_module().to_string())


def trainers_step(size: Pi0Config, settings: Settings) -> tuple[Any, float]:
    """The step, lowered, and its FLOPs by the formulas. No image is turned, which would add products."""
    mesh, cameras = meshes.make("fsdp:1", jax.devices()[:1]), len(size.cameras)
    plain = dataclasses.replace(settings.input, augment=False)
    settings = dataclasses.replace(settings, kernels="reference", input=plain)
    graphdef, state, frozen = train_state.abstract_state(size, settings, mesh)
    step: Any = train.make_step(graphdef, size, settings, mesh, state, frozen)
    lowered = step.lower(state, frozen, training_data.abstract_batch(size, settings.batch_size, size.cameras, mesh))
    trained = flatten(state.weights).keys()
    sizes = size, cameras, size.max_token_len, settings.batch_size
    return lowered, flops.train_step(*sizes, trained, settings.flow_samples)


EXPERT = "siglip,embedding,vlm"


@pytest.mark.long
@RELEASED
@pytest.mark.parametrize(("freeze", "flow_samples"), [("", 1), ("", 4), (EXPERT, 1)])
def test_the_trainers_step(preset, freeze, flow_samples):
    """The prompt's embedding, the loss and the optimizer add no product."""
    changes = {"remat": "none", "freeze": freeze, "flow_samples": flow_samples}
    settings = dataclasses.replace(DEFAULTS[preset], batch_size=BATCH, **changes)
    lowered, expected = trainers_step(config.PRESETS[preset](), settings)
    assert products_of(lowered) == expected


def test_a_frozen_prefix_has_no_backward_pass():
    """Of the released model, one product of SigLIP's or the VLM's backward pass more would be 4 % or more."""
    size = config.pi0_base()
    settings = dataclasses.replace(DEFAULTS["pi0_base"], batch_size=BATCH, remat="mlp", freeze=EXPERT)
    lowered, expected = trainers_step(size, settings)
    assert expected <= products_of(lowered) <= 1.01 * expected  # the expert's MLP is computed twice


@pytest.mark.slow
def test_a_frozen_prefix_has_no_backward_pass_once_compiled():
    settings = dataclasses.replace(DEFAULTS["pi0_small"], batch_size=1, remat="mlp", tune="expert")
    lowered, expected = trainers_step(config.pi0_small(), settings)
    assert products(lowered.compile().as_text()) == pytest.approx(expected, rel=0.02)


LORA = MINI.with_lora(LoraConfig(2), LoraConfig(3))
PROJECTIONS = [f"{place}/{name}" for place in ("vlm/*", "action_expert/*") for name in ("q", "out", "gate_up", "down")]


@pytest.mark.parametrize(
    ("size", "freeze"),
    [
        (MINI, EXPERT),
        (MINI, "embedding,siglip"),  # the first VLM layer's input needs no gradient, its stack's does
        (MINI, "siglip,embedding,vlm,head/*_in,head/time_out"),
        (dataclasses.replace(MINI, pi05=True, state_mode=None), "vlm"),
        (dataclasses.replace(MINI, pi05=True, state_mode=None), "head/time_in,head/time_out,siglip"),
        (LORA, ",".join(["siglip,embedding,*/scale,*/kv", *PROJECTIONS])),  # LoRA alone, and the head
        (LORA, "*_lora/a"),
    ],
)
def test_a_step_with_frozen_parts(size, freeze):
    lowered, expected = trainers_step(size, dataclasses.replace(TINY, batch_size=4, freeze=freeze))
    assert products_of(lowered) == expected


@RELEASED
def test_the_loss(preset):
    """The forward pass alone."""
    size = config.PRESETS[preset]()
    graphdef, state = nnx.split(Pi0.abstract(size))
    observation, actions = policy.abstract_inputs(size, size.cameras, BATCH, size.max_token_len)
    loss = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state).loss(*inputs, execution=REFERENCE))
    lowered = loss.lower(state, observation, actions, actions, jax.ShapeDtypeStruct((BATCH,), jnp.float32))
    assert products_of(lowered) == BATCH * flops.forward(size, CAMERAS, size.max_token_len).total


@pytest.mark.long
@RELEASED
def test_stages_of_inference(preset):
    size, batch = config.PRESETS[preset](), 2
    cost = flops.inference(size, CAMERAS, size.max_token_len, batch_size=batch)
    weights, structure = jax.tree.flatten(precompile.abstract_sampler(size))

    def stage(run, *inputs):
        """Products of one stage, and its results."""
        call = jax.jit(lambda weights, *inputs: run(jax.tree.unflatten(structure, weights), *inputs, REFERENCE))
        lowered = call.lower(weights, *inputs)
        return products_of(lowered), lowered.out_info

    observation, noise = policy.abstract_inputs(size, size.cameras, batch, size.max_token_len)
    vision, tokens = stage(lambda sampler, *inputs: sampler.model.embed_prefix(*inputs), observation)
    prefix, cached = stage(Sampler.prefix, *tokens)
    steps, _ = stage(Sampler.steps, observation.state, noise, *cached)
    assert vision == cost.vision.flops
    assert prefix == cost.prefix.flops
    # In the last layer only the state's key and value are needed: no floor counts the rest of its row.
    expert, keys = size.action_expert, size.suffix_len + CAMERAS * size.tokens_per_image + size.max_token_len
    query_and_out = 2 * expert.width * expert.num_heads * expert.head_dim
    attention = 2 * keys * expert.num_heads * expert.head_dim
    unused = 0 if size.pi05 else batch * 2 * (query_and_out + 3 * expert.width * expert.mlp_dim + attention)
    assert steps == cost.evaluations * cost.step.flops + cost.state.flops + unused

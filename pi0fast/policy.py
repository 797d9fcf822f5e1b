"""A trained model behind one call: observations of a robot in, its actions out."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pi0fast import checkpoint, convert, normalize
from pi0fast.checkpoint import RunConfig, Step
from pi0fast.config import DType, Pi0Config, StateMode
from pi0fast.execution import Execution, Kernels
from pi0fast.flow import Solver
from pi0fast.observation import Observation
from pi0fast.params import replace
from pi0fast.pi0 import Pi0, check_kernels
from pi0fast.repack import Repack, flatten_keys
from pi0fast.robots import Robot, find_robot
from pi0fast.rtc import DELAY, PREVIOUS_ACTIONS, RtcConfig, guidance
from pi0fast.sampling import Guidance, Sampler, matmul_weights
from pi0fast.tokenizer import PromptTokenizer, padded_len, resolve_tokenizer
from pi0fast.transforms import MAX_NORMALIZED, SampleTransform


@dataclass(frozen=True)
class Request:
    """One observation after the host transforms, without a batch axis.

    inputs: the fields of `Observation`. state: as the robot gave it. prompt_len: valid tokens. prepare_ms: what the
    transforms took. noise: [H, A], what its actions start from.
    guidance: target [H, A] and weight [H], where the request has something left of the last chunk.
    """

    inputs: dict[str, Any]
    state: np.ndarray
    prompt_len: int
    prepare_ms: float
    noise: np.ndarray
    guidance: tuple[np.ndarray, np.ndarray] | None = None


class Policy:
    """Host transforms, one compiled call, and their inverse.

    Every program is compiled here: one for each batch size and prompt length. A call takes the smallest that fits, so
    that padding costs little and no request compiles.

    num_steps, solver: from noise to actions. seed: of the noise, which a request gets when it is prepared; the same
    requests in the same order give the same actions, however they are batched. kernels: of attention and norms; `auto`
    takes the first that can run. batch_sizes: how many observations a call takes. prompt_buckets: prompt lengths in
    tokens; by default those of `default_buckets`. default_prompt: for observations without one.
    rtc: also compile the programs of real-time chunking, which run where an observation of the batch asks for it.

    Raises:
        ValueError: batch sizes or prompt lengths out of range, no step, an unknown solver, or kernels that cannot run
            here.
    """

    def __init__(
        self,
        model: Pi0,
        transform: SampleTransform,
        *,
        num_steps: int = 10,
        solver: Solver = "euler",
        seed: int = 0,
        kernels: Kernels = "auto",
        batch_sizes: Sequence[int] = (1,),
        prompt_buckets: Sequence[int] | None = None,
        default_prompt: str | None = None,
        rtc: RtcConfig | None = None,
    ):
        self.execution = execution = Execution(kernels=kernels)
        check_kernels(model.config, execution)
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch_sizes={tuple(batch_sizes)}: give at least one, each at least 1")
        longest = model.config.max_token_len
        buckets = default_buckets(longest) if prompt_buckets is None else prompt_buckets
        if not buckets or not 1 <= min(buckets) <= max(buckets) <= longest:
            raise ValueError(f"prompt_buckets={tuple(buckets)}: give at least one, each from 1 to {longest} tokens")
        if rtc is not None:
            rtc.check(model.config.action_horizon)
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.prompt_buckets = tuple(sorted(set(buckets)))
        self.num_steps, self.solver = num_steps, solver
        self._transform = transform
        self._rtc = rtc
        self._repack = Repack(transform.robot, transform.state_stats.dim, default_prompt)
        self._seed, self._count = seed, 0
        sampler = jax.jit(Sampler.of, static_argnums=(1, 2))(model, num_steps, solver)
        self._weights, self._structure = jax.tree.flatten(sampler)
        call = make_call(self._structure, execution, rtc)
        self._programs = {
            (batch, length, guided): call.lower(
                self._weights, *abstract_inputs(model.config, transform.cameras, batch, length, guided)
            ).compile()
            for batch in self.batch_sizes
            for length in self.prompt_buckets
            for guided in ([False] if rtc is None else [False, True])
        }

    @staticmethod
    def load(
        path: str | Path,
        *,
        step: Step | None = None,
        robot: str | None = None,
        asset_id: str | None = None,
        action_horizon: int | None = None,
        state_mode: StateMode | None = None,
        dtype: DType = "bfloat16",
        **options: Any,
    ) -> "Policy":
        """A checkpoint of a run, or an openpi checkpoint `<step>`.

        step: which checkpoint of a run, or "best", that with the lowest validation loss; the newest by default.
        robot: a ready robot's name or a YAML file, in place of the run's own; an openpi checkpoint needs it.
        asset_id, action_horizon, state_mode, dtype: of an openpi checkpoint, which does not tell (`pi0fast.convert`).
            Of its LoRA, alpha is taken to be the rank; convert it where it is not.
        options: those of `Policy`.

        Raises:
            FileNotFoundError: `path` is neither, or the run has no such checkpoint, or none yet.
            CorruptCheckpointError: naming the folder, what is damaged, and the checkpoint before it.
            ValueError: which robot it is for is not known, the weights or the statistics do not fit, or an option's.
        """
        folder = Path(path)
        if (folder / "params").is_dir() or "://" in str(path):
            if step is not None:
                raise ValueError(f"{path} is an openpi checkpoint, of one step; leave out step={step!r}")
            if robot is None:
                raise ValueError(
                    f"{path} is an openpi checkpoint, which does not say which robot it is for; give robot"
                )
            if action_horizon is None:
                raise ValueError(
                    f"{path} is an openpi checkpoint, which does not say how long its chunks are; give the "
                    "action_horizon of openpi's config, e.g. 50 of pi0_base or 10 of pi0_droid"
                )
            model_config, stats = convert.describe_openpi(
                path, asset_id=asset_id, action_horizon=action_horizon, state_mode=state_mode, dtype=dtype
            )
            config = RunConfig(model_config, find_robot(robot), tokenizer="paligemma")
            check_kernels(config.model, Execution(kernels=options.get("kernels", "auto")))
            transform = make_transform(config, stats)
            return Policy(convert.load_openpi_checkpoint(path, config.model), transform, **options)
        config = RunConfig.load(folder)
        if robot is not None:
            config = replace_fields(config, robot=find_robot(robot))
        if config.robot is None:
            raise ValueError(f"{path} does not say which robot it is for; give robot, or convert it again with --robot")
        check_kernels(config.model, Execution(kernels=options.get("kernels", "auto")))
        found = checkpoint.find_checkpoint(folder, step)
        transform = make_transform(config, checkpoint.load_stats(found))
        abstract = Pi0.abstract(config.model)
        dtypes = dict.fromkeys(matmul_weights(abstract), config.model.dtype)
        model = replace(abstract, checkpoint.load_item(found, "params", dtypes=dtypes))
        return Policy(model, transform, **options)

    @property
    def sampler(self) -> Sampler:
        """The model, as the compiled calls have it."""
        return jax.tree.unflatten(self._structure, self._weights)

    def program(self, batch_size: int, prompt_len: int, guided: bool = False) -> jax.stages.Compiled:
        """The compiled call for so many observations with prompts of this length in tokens, both as compiled for."""
        return self._programs[batch_size, prompt_len, guided]

    @property
    def config(self) -> Pi0Config:
        return self._transform.config

    @property
    def robot(self) -> Robot:
        return self._transform.robot

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client may want to know: plain values."""
        config = self.config
        return {
            "model": "pi05" if config.pi05 else "pi0",
            "robot": self.robot.name,
            "state_keys": list(self.robot.state),
            "image_keys": list(self.robot.cameras.values()),
            "action_horizon": config.action_horizon,
            "action_dim": self._transform.action_stats.dim,
            "num_steps": self.num_steps,
            "solver": self.solver,
            "batch_sizes": list(self.batch_sizes),
            "rtc": None if self._rtc is None else asdict(self._rtc),
        }

    def infer(self, observation: Mapping[str, Any], *, noise: np.ndarray | None = None) -> dict[str, Any]:
        """One observation → `actions` float32 [H, d] in the robot's units, and `policy_timing` in milliseconds.

        observation: the robot's data-set keys or openpi's (`observation/image`; dicts may be nested): images uint8
            [height, width, 3] or [3, height, width], the state and its parts numbers, and `prompt`. A missing camera
            counts as masked, if there is another; other keys are ignored. With real-time chunking also
            `rtc/previous_actions` [m, d], the actions that are not executed yet, and `rtc/delay`, the steps until these
            replace them (`rtc.guidance`).
        noise: float32 [H, A] to start from, in place of the policy's own.

        `policy_timing`: `infer_ms`, the whole; of it `prepare_ms`, the host transforms, and `device_ms`, from the call
        until the actions are here.

        Raises:
            ValueError: naming the key that is missing or does not fit.
        """
        return self.run([self.prepare(observation)], noise=None if noise is None else np.asarray(noise)[None])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """As `infer`, for several observations: their actions, float32 [B, H, d]."""
        requests = [self.prepare(observation) for observation in observations]
        most = self.batch_sizes[-1]
        replies = [
            reply for start in range(0, len(requests), most) for reply in self.run(requests[start : start + most])
        ]
        return np.stack([reply["actions"] for reply in replies])

    def prepare(self, observation: Mapping[str, Any]) -> Request:
        """The host transforms of one observation. Raises: ValueError, as `infer`."""
        start = time.perf_counter()
        values = flatten_keys(observation)
        sample = self._repack(values)
        inputs, guide = self._transform(sample), None
        if (length := int(inputs["tokenized_prompt_mask"].sum())) > self.prompt_buckets[-1]:
            raise ValueError(
                f"prompt has {length} tokens; the policy is compiled for {self.prompt_buckets[-1]} at most"
            )
        if PREVIOUS_ACTIONS in values:
            if self._rtc is None:
                raise ValueError(
                    f"{PREVIOUS_ACTIONS} was sent to a policy without real-time chunking; load it with rtc"
                )
            previous, delay = values[PREVIOUS_ACTIONS], values.get(DELAY)
            guide = guidance(self._transform, previous, delay, sample["state"], self._rtc)
        noise = self._draw((self.config.action_horizon, self.config.action_dim))
        return Request(inputs, sample["state"], length, (time.perf_counter() - start) * 1e3, noise, guide)

    def batch(self, requests: Sequence[Request]) -> Observation:
        """What a call gets: the requests side by side, prompts cut to the smallest bucket that holds them all."""
        needed = max(request.prompt_len for request in requests)
        length = next(bucket for bucket in self.prompt_buckets if bucket >= needed)
        inputs = jax.tree.map(lambda *leaves: np.stack(leaves), *(request.inputs for request in requests))
        prompt = {key: inputs[key][:, :length] for key in ("tokenized_prompt", "tokenized_prompt_mask")}
        return Observation(**{**inputs, **prompt})

    def run(self, requests: Sequence[Request], *, noise: np.ndarray | None = None) -> list[dict[str, Any]]:
        """One compiled call for up to `batch_sizes[-1]` requests: `infer`'s reply for each.

        noise: float32 [B, H, A]. Raises: ValueError, for too many requests or noise of another shape.
        """
        start = time.perf_counter()
        count = len(requests)
        if not 1 <= count <= self.batch_sizes[-1]:
            raise ValueError(f"{count} requests; one call takes 1 to {self.batch_sizes[-1]} (batch_sizes)")
        shape = (count, self.config.action_horizon, self.config.action_dim)
        if noise is None:
            noise = np.stack([request.noise for request in requests])
        elif noise.shape != shape:
            raise ValueError(f"noise has shape {noise.shape}, expected {shape}")
        batch = next(size for size in self.batch_sizes if size >= count)
        filled = [*requests, *[requests[0]] * (batch - count)]
        observation = self.batch(filled)
        noise = np.resize(np.asarray(noise, np.float32), (batch, *shape[1:]))  # a copy: the call may write into it
        guides, guided = (), any(request.guidance is not None for request in requests)
        if guided:
            free = np.zeros(shape[1:], np.float32), np.zeros(shape[1], np.float32)
            guides = map(np.stack, zip(*(request.guidance or free for request in filled), strict=True))

        program = self.program(batch, observation.tokenized_prompt.shape[1], guided)
        called = time.perf_counter()
        actions = np.asarray(program(self._weights, observation, noise, *guides))[:count]
        fetched = time.perf_counter()
        actions = self._transform.invert_actions(actions, np.stack([request.state for request in requests]))
        run_ms = (time.perf_counter() - start) * 1e3
        return [
            {
                "actions": actions[i],
                "policy_timing": {
                    "infer_ms": run_ms + request.prepare_ms,
                    "prepare_ms": request.prepare_ms,
                    "device_ms": (fetched - called) * 1e3,
                },
            }
            for i, request in enumerate(requests)
        ]

    def warmup(self) -> None:
        """Runs every program once, so that the first request waits for nothing."""
        for key, program in self._programs.items():
            inputs = abstract_inputs(self.config, self._transform.cameras, *key)
            jax.block_until_ready(program(self._weights, *jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), inputs)))

    def _draw(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal noise, a function of the seed and of how many requests came before."""
        self._count += 1
        return np.random.default_rng((self._seed, self._count)).standard_normal(shape, np.float32)


def default_buckets(max_token_len: int) -> tuple[int, ...]:
    """Prompt lengths to compile for: quarters of the longest, rounded up to 16 tokens."""
    quarters = (-(-max_token_len * i // 4) for i in range(1, 5))
    return tuple(sorted({padded_len(length, max_token_len) for length in quarters}))


def make_transform(config: RunConfig, stats: Mapping[str, normalize.NormStats]) -> SampleTransform:
    """The host transforms of a run."""
    assert config.robot is not None
    tokenizer = PromptTokenizer(resolve_tokenizer(config.tokenizer), config.model.max_token_len)
    max_normalized = config.train.get("input", {}).get("max_normalized", MAX_NORMALIZED)
    return SampleTransform(config.model, config.robot, stats, tokenizer, max_normalized)


def keep_compiled_programs() -> None:
    """Programs that JAX compiles are kept on disk for the next process: in $JAX_COMPILATION_CACHE_DIR, else in
    `$XDG_CACHE_HOME/pi0fast/programs` (by default under `~/.cache`). For command lines; it sets JAX's own option."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "pi0fast" / "programs"))


def make_call(structure: Any, execution: Execution, rtc: RtcConfig | None = None) -> Any:
    """The jitted call that every program of a policy is: weights, observation, noise and what guides it → actions.

    weights: the leaves of a `Sampler` of this structure, since a plain list passes into a call without Python's help.
    """

    def sample(weights, observation: Observation, noise, *guide):
        guided = Guidance(guide[0], guide[1], rtc.max_guidance) if rtc and guide else None
        return jax.tree.unflatten(structure, weights)(observation, noise, guided, execution=execution)

    return jax.jit(sample, donate_argnames="noise")


def abstract_inputs(
    config: Pi0Config, cameras: Sequence[str], batch: int, prompt_len: int, guided: bool = False
) -> tuple:
    """A program's inputs: an observation, noise, and what guides it."""

    def array(*shape: int, dtype: Any = np.float32):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    size = config.image_size
    observation = Observation(
        images={camera: array(size, size, 3, dtype=np.uint8) for camera in cameras},  # pyright: ignore[reportArgumentType]
        image_masks={camera: array(dtype=np.bool_) for camera in cameras},  # pyright: ignore[reportArgumentType]
        state=array(config.action_dim),  # pyright: ignore[reportArgumentType]
        tokenized_prompt=array(prompt_len, dtype=np.int32),  # pyright: ignore[reportArgumentType]
        tokenized_prompt_mask=array(prompt_len, dtype=np.bool_),  # pyright: ignore[reportArgumentType]
    )
    noise = array(config.action_horizon, config.action_dim)
    return observation, noise, *([noise, array(config.action_horizon)] if guided else [])

"""Train Pi0 or Pi0.5 on a LeRobot data set.

    python -m pi0fast.train                                                     the demo, on any machine
    python -m pi0fast.train pi0_base --mesh=fsdp:8 --data=… --robot=aloha --init-from=…

Reads top to bottom: the data, the train state, the step, the loop.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pi0fast import augment, checkpoint, config, convert, flops, flow, fsdp, norm_stats, normalize, optim
from pi0fast import mesh as meshes
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.config import Pi0Config
from pi0fast.data import demo_dataset
from pi0fast.data.lerobot_source import LeRobotSource
from pi0fast.data.loader import Loader
from pi0fast.normalize import NormStats
from pi0fast.observation import Observation
from pi0fast.params import flatten, replace, replace_state
from pi0fast.pi0 import Pi0, check_kernels
from pi0fast.report import Report
from pi0fast.robots import find_robot
from pi0fast.settings import DEFAULTS, Settings, to_dict
from pi0fast.tokenizer import PromptTokenizer, resolve_tokenizer
from pi0fast.transforms import SampleTransform

DEMO_DATA = Path("data/demo")
DEMO_EPISODES = 1000


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_data(
    settings: Settings, model: Pi0Config, resumed: Path | None = None
) -> tuple[Loader, SampleTransform, dict[str, NormStats]]:
    """The batches of this process, and the statistics that they are normalised with: a resumed checkpoint's, or the
    data set's, computed once."""
    robot = find_robot(settings.robot)
    data = settings.data
    if data is None:
        if robot.name != "demo":
            raise ValueError(f"--robot={settings.robot} needs --data; without --data the demo's own data set is used")
        data = str(demo_dataset.find_or_write(DEMO_DATA, DEMO_EPISODES))
    source = LeRobotSource(
        data, robot, model.action_horizon, model.image_size, on_bad_sample=settings.input.on_bad_sample
    )
    stats_path = norm_stats.norm_stats_path(source.root, robot, model.action_horizon)
    if resumed is not None:
        stats_path = checkpoint.stats_path(resumed)
    elif not stats_path.exists():
        normalize.save(stats_path, norm_stats.compute_norm_stats(source.root, robot, model.action_horizon))
    stats = normalize.load(stats_path)
    tokenizer = PromptTokenizer(resolve_tokenizer(settings.input.tokenizer), model.max_token_len)
    transform = SampleTransform(model, robot, stats, tokenizer, settings.input.max_normalized)
    loader = Loader(
        source,
        transform,
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=settings.input.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return loader, transform, stats


def to_device(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """This process's part of a batch → global arrays, their first axis over the mesh."""
    batch = {**batch, "example": batch["example"].astype(np.uint32)}
    sharding = meshes.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


# ── Train state ───────────────────────────────────────────────────────────────────────────────────────────────────────


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes. Sharded over `fsdp`, in float32; frozen weights are apart, in the model's dtype."""

    step: Array
    weights: nnx.State
    average: nnx.State | None
    opt_state: Any

    def for_inference(self, frozen: nnx.State) -> dict[str, Array]:
        """The weights that inference uses, by path."""
        weights = self.weights if self.average is None else self.average
        return {path: variable[...] for path, variable in (flatten(weights) | flatten(frozen)).items()}


def initialize(
    model_config: Pi0Config, settings: Settings, mesh: Mesh, init_from: str | None
) -> tuple[nnx.GraphDef, TrainState, nnx.State, dict[str, Array]]:
    """graphdef, train state, frozen weights, and openpi's dead parameters where the weights come from openpi.

    Each weight is made or read where it lies on the mesh.
    """
    abstract = nnx.eval_shape(lambda: Pi0(model_config, rngs=nnx.Rngs(0)))
    is_frozen = optim.frozen_filter(abstract, settings.freeze)

    def split(model: Pi0) -> tuple[TrainState, nnx.State]:
        _, frozen, weights = nnx.split(model, is_frozen, ...)
        weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
        frozen = jax.tree.map(lambda x: x.astype(model_config.dtype), frozen)
        average = weights if settings.optim.ema_decay is not None else None
        opt_state = settings.optim.optimizer().init(weights)
        state = TrainState(jnp.zeros((), jnp.int32), weights, average, opt_state)
        return fsdp.place((state, frozen), mesh)

    graphdef, _, _ = nnx.split(abstract, is_frozen, ...)
    if init_from is None:
        make, given, dead = lambda key: split(Pi0(model_config, rngs=nnx.Rngs(key))), jax.random.key(settings.seed), {}
    else:
        model, dead = load_weights(init_from, model_config, mesh)
        whole, given = nnx.split(model)
        make = lambda weights: split(nnx.merge(whole, weights))  # noqa: E731
    where = fsdp.shardings(jax.eval_shape(make, given), mesh)
    state, frozen = jax.jit(make, out_shardings=where)(given)
    return graphdef, state, frozen, dead


def load_weights(source: str, model_config: Pi0Config, mesh: Mesh) -> tuple[Pi0, dict[str, Array]]:
    """The model of a run of ours or of an openpi checkpoint, sharded over the mesh, and openpi's dead parameters."""
    run = Path(source)
    if not (run / "config.json").exists():
        return convert.load_openpi_model_and_dead(source, model_config, mesh)
    abstract = nnx.eval_shape(lambda: Pi0(model_config, rngs=nnx.Rngs(0)))
    folder = checkpoint.newest_checkpoint(run) / "params"
    checkpoint.check_shapes(folder, {path: variable.shape for path, variable in flatten(abstract).items()})
    weights = checkpoint.load_arrays(folder, shardings=fsdp.weight_shardings(abstract, mesh))
    dead = checkpoint.load_arrays(run / "dead") if (run / "dead").exists() else {}
    return replace(abstract, weights), dead


# ── One step ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Step = Callable[[TrainState, nnx.State, dict[str, Any]], tuple[TrainState, dict[str, Array]]]


def make_step(
    graphdef: nnx.GraphDef,
    model_config: Pi0Config,
    settings: Settings,
    mesh: Mesh,
    state: TrainState,
    frozen: nnx.State,
) -> Step:
    """`state, metrics = step(state, frozen, batch)`; the state is donated."""
    execution = fsdp.execution(mesh, remat=settings.remat, kernels=settings.kernels)
    optimizer, schedule = settings.optim.optimizer(), settings.optim.schedule()
    noise_key, augment_key = jax.random.split(jax.random.key(settings.seed))
    sharded, replicated = PartitionSpec(meshes.AXES), PartitionSpec()

    def loss_and_gradients(weights, frozen, batch):
        """On one device's shards of weights and batch: mean loss, gradients of its shards, each example's loss."""
        observation = Observation(**{name.name: batch[name.name] for name in dataclasses.fields(Observation)})
        example, actions = batch["example"], batch["actions"]
        if settings.input.augment:
            keys = jax.vmap(partial(jax.random.fold_in, augment_key))(example)
            observation = augment.augment(observation, keys)
        noise, t = flow.draw(noise_key, example, actions.shape[1:])
        counted = ~batch["action_is_pad"] if settings.input.mask_padding else jnp.ones(actions.shape[:2], bool)
        total = lax.psum(jnp.sum(counted, dtype=jnp.float32), meshes.AXES)

        def loss(weights):
            model = nnx.merge(graphdef, fsdp.vary(weights), fsdp.vary(frozen))
            losses = model.loss(observation, actions, noise, t, execution=execution) * counted
            return jnp.sum(losses) / total, jnp.mean(losses, axis=1)

        (mean, losses), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
        return lax.psum(mean, meshes.AXES), gradients, losses

    weight_specs = fsdp.specs(state.weights)
    loss_and_gradients = jax.shard_map(
        loss_and_gradients,
        mesh=mesh,
        in_specs=(weight_specs, fsdp.specs(frozen), sharded),
        out_specs=(replicated, weight_specs, sharded),
    )

    def step(state: TrainState, frozen, batch):
        loss, gradients, losses = loss_and_gradients(state.weights, frozen, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.weights)
            weights = optax.apply_updates(state.weights, updates)
            average = state.average
            if average is not None and settings.optim.ema_decay is not None:
                average = optim.update_average(average, weights, settings.optim.ema_decay)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "losses": losses,
        }
        return dataclasses.replace(
            state, step=state.step + 1, weights=weights, average=average, opt_state=opt_state
        ), metrics

    where = fsdp.shardings(state, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient stopped being a number."""


def check_finite(step: int, metrics: dict[str, Array], index: np.ndarray) -> dict[str, float]:
    """The metrics as numbers. Waits for the step. Raises: NonFiniteLossError, naming step and samples."""
    scalars = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
    if np.isfinite(scalars["loss"]) and np.isfinite(scalars["grad_norm"]):
        return scalars
    losses = np.concatenate([np.asarray(shard.data) for shard in metrics["losses"].addressable_shards])
    bad = np.flatnonzero(~np.isfinite(losses))
    where = (
        f"samples {index[bad].tolist()} of the data set (batch indices {bad.tolist()}) have a loss that is not finite"
        if len(bad)
        else "each sample's loss is finite, so it is the gradient that overflowed"
    )
    raise NonFiniteLossError(
        f"step {step}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}; {where}. The last checkpoint is "
        "kept; look at these samples, or lower --optim.peak-lr, and go on with --resume"
    )


# ── The loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_out(run: Path, model_config: Pi0Config, settings: Settings) -> None:
    """Raises: FileExistsError, ValueError: `run` holds another run, or one that was not asked to go on."""
    if not (run / "config.json").exists():
        if run.exists() and any(run.iterdir()):
            raise FileExistsError(f"{run} exists and is not a run; give another --out")
        return
    if not settings.resume:
        raise FileExistsError(f"{run} holds a run; add --resume to go on with it, or give another --out")
    if RunConfig.load(run).model != model_config:
        raise ValueError(f"{run} is a run of another model; give its preset, or another --out")


def save(
    checkpoints: Checkpoints, state: TrainState, frozen: nnx.State, loader: Loader, stats: dict[str, NormStats]
) -> None:
    """Starts writing; the arrays are copied off the device before it returns."""
    weights = None if state.average is None else state.weights
    checkpoints.save(
        int(state.step),
        params=state.for_inference(frozen),
        train_state=(state.step, weights, state.opt_state),
        loader=loader.state(),
        norm_stats=stats,
    )


def restore(
    checkpoints: Checkpoints, step: int, state: TrainState, frozen: nnx.State, loader: Loader
) -> tuple[TrainState, nnx.State]:
    """State, frozen weights and the loader's position as they were after `step`, placed as the given ones are."""
    weights = None if state.average is None else state.weights
    like = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
    params, (count, weights, opt_state), position = checkpoints.restore(
        step, like(state.for_inference(frozen)), like((state.step, weights, state.opt_state))
    )
    loader.restore(position)
    averaged = replace_state(state.weights, params)
    if weights is None:
        return TrainState(count, averaged, None, opt_state), replace_state(frozen, params)
    return TrainState(count, weights, averaged, opt_state), replace_state(frozen, params)


class StopSignal:
    """Between enter and exit, Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(preset: str, settings: Settings) -> Path:
    """Train to the end, or until a signal asks to stop; returns the run's folder."""
    model_config = config.PRESETS[preset]()
    mesh = meshes.make(settings.mesh)
    meshes.check_batch(settings.batch_size, mesh)
    with jax.set_mesh(mesh):
        check_kernels(model_config, fsdp.execution(mesh, remat=settings.remat, kernels=settings.kernels))
    run = settings.out or Path("runs") / preset
    check_out(run, model_config, settings)
    start = checkpoint.newest_step(run) or 0
    loader, transform, stats = open_data(settings, model_config, checkpoint.step_folder(run, start) if start else None)
    graphdef, state, frozen, dead = initialize(model_config, settings, mesh, settings.init_from if not start else None)

    if not start:
        RunConfig(model_config, transform.robot, settings.input.tokenizer, to_dict(settings)).save(run)
        if dead and not (run / "dead").exists():
            checkpoint.save_arrays(run / "dead", dead)
    checkpoints = Checkpoints(run, keep_last=settings.output.keep_last, keep_every=settings.output.keep_every)
    if start:
        state, frozen = restore(checkpoints, start, state, frozen, loader)
    step_flops = flops.train_step(model_config, len(transform.cameras), model_config.max_token_len, settings.batch_size)
    peak = flops.peak(mesh.devices.flat[0].device_kind)
    train_step = make_step(graphdef, model_config, settings, mesh, state, frozen)
    stop = StopSignal()
    report = Report(
        run,
        start=start,
        steps=settings.steps,
        log_every=settings.output.log_every,
        tracker=settings.output.tracker,
        enabled=jax.process_index() == 0,
    )

    step, saved, unchecked = start, start, []

    def finish(pending: list) -> None:
        """Check and report dispatched steps. A step is checked while the next one runs."""
        for number, metrics, index, wait_s in pending:
            scalars = check_finite(number, metrics, index)
            report.step(
                number,
                scalars,
                wait_s=wait_s,
                samples=settings.batch_size,
                flops=step_flops,
                peak=peak and peak * mesh.size,
            )
        pending.clear()

    with report, stop, checkpoints:
        while step < settings.steps and not stop.requested:
            batch = next(loader)
            index = batch.pop("index")
            state, metrics = train_step(state, frozen, to_device(batch, mesh))
            finish(unchecked)
            step += 1
            unchecked.append((step, metrics, index, loader.last_wait_s))
            if step % settings.output.save_every == 0 or step == settings.steps:
                finish(unchecked)
                save(checkpoints, state, frozen, loader, stats)
                saved = step
        finish(unchecked)
        if saved < step:
            save(checkpoints, state, frozen, loader, stats)
    loader.close()
    if step < settings.steps:
        report.print(f"Stopped after step {step} and saved. Go on with the same command and --resume")
    else:
        report.print(f"Loss curve: {report.plot_loss()}\nNext: python -m pi0fast.evaluate {run}")
    return run


def main(arguments: list[str]) -> None:
    """The command line: `[PRESET] [flags]`. The preset decides the flags' defaults."""
    preset = "pi0_tiny" if not arguments or arguments[0].startswith("-") else arguments.pop(0)
    if preset not in DEFAULTS:
        sys.exit(f"there is no preset {preset!r}; the presets are {', '.join(DEFAULTS)}")
    chosen = tyro.cli(Settings, default=DEFAULTS[preset], args=arguments, prog=f"python -m pi0fast.train [{preset}]")
    try:
        train(preset, chosen)
    except (FileNotFoundError, FileExistsError, ValueError, NonFiniteLossError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Train Pi0 or Pi0.5 on a LeRobot data set.

    python -m pi0fast.train                                                     the demo, on any machine
    python -m pi0fast.train pi0_base --mesh=fsdp:8 --data=… --robot=aloha --init-from=…

Reads top to bottom: the step, the loop. Where the batches come from: `training_data`.
"""

import dataclasses
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pi0fast import (
    augment,
    checkpoint,
    compiler,
    config,
    flops,
    flow,
    fsdp,
    init_from,
    memory,
    optim,
    storage,
    trace,
    validation,
)
from pi0fast import mesh as meshes
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.cli import EXPECTED
from pi0fast.config import Pi0Config
from pi0fast.distributed import ALONE, Processes, join
from pi0fast.observation import Observation
from pi0fast.params import flatten
from pi0fast.pi0 import check_kernels
from pi0fast.report import Report
from pi0fast.robots import DEMO, find_robot
from pi0fast.settings import DEFAULTS, Settings, to_dict
from pi0fast.train_state import TrainState, abstract_state, initialize, restore, save
from pi0fast.training_data import abstract_batch, open_data, to_device
from pi0fast.tuning import adapted, check_resumes
from pi0fast.validation import Validation

# ── One step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_step(
    graphdef: nnx.GraphDef,
    model_config: Pi0Config,
    settings: Settings,
    mesh: Mesh,
    state: TrainState,
    frozen: nnx.State,
    action_weights: tuple[float, ...] | None = None,
) -> jax.stages.Wrapped:
    """`state, metrics = step(state, frozen, batch)`; the state is donated.

    action_weights: of the model's action dimensions, see `settings.LossSettings`.
    """
    execution = fsdp.execution(mesh, remat=settings.remat, kernels=settings.kernels, reduce_dtype=settings.reduce_dtype)
    optimizer, schedule = settings.optim.optimizer(), settings.optim.schedule()
    noise_key, augment_key = jax.random.split(jax.random.key(settings.seed))
    sharded, replicated = PartitionSpec(meshes.AXES), PartitionSpec()
    of_dims = None if action_weights is None else jnp.array(action_weights, jnp.float32)

    def counted(batch):
        return flow.counted_steps(batch["action_is_pad"], settings.loss.mask_padding)

    def loss(weights, frozen, batch, total):
        """One device's part of the mean over `total` steps, and each example's loss."""
        observation = Observation.of(batch)
        example, actions = batch["example"], batch["actions"]
        if settings.input.augment:
            with jax.named_scope("augment"):
                keys = jax.vmap(partial(jax.random.fold_in, augment_key))(example)
                observation = augment.augment(observation, keys)
        with jax.named_scope("draw"):
            noise, t = flow.draw(noise_key, example, actions.shape[1:], settings.flow_samples)
        model = nnx.merge(graphdef, weights, frozen)
        losses = model.loss(observation, actions, noise, t, weights=of_dims, execution=execution)
        with jax.named_scope("loss"):
            if settings.flow_samples > 1:
                losses = jnp.mean(losses.reshape(len(actions), settings.flow_samples, -1), axis=1)
            losses *= counted(batch)
            return jnp.sum(losses) / total, jnp.mean(losses, axis=1)

    def loss_and_gradients(weights, frozen, batch):
        """On one device's shards of weights and batch: mean loss, gradients of its shards, each example's loss.

        The transpose of `vary` sums replicated weights' gradients over devices: once, after all microbatches.
        """
        total = lax.psum(jnp.sum(counted(batch), dtype=jnp.float32), meshes.AXES)
        weights, sum_over_devices = jax.vjp(fsdp.vary, weights)
        frozen = fsdp.vary(frozen)
        value_and_gradient = jax.value_and_grad(loss, has_aux=True)
        if settings.accum == 1:
            (part, losses), gradients = value_and_gradient(weights, frozen, batch, total)
        else:

            def accumulate(sums, microbatch):
                values, gradients = value_and_gradient(weights, frozen, microbatch, total)
                return jax.tree.map(jnp.add, sums, gradients), values

            microbatches = jax.tree.map(lambda x: x.reshape(settings.accum, -1, *x.shape[1:]), batch)
            gradients, (parts, losses) = lax.scan(accumulate, jax.tree.map(jnp.zeros_like, weights), microbatches)
            part, losses = jnp.sum(parts), losses.reshape(-1)
        (gradients,) = sum_over_devices(gradients)
        return lax.psum(part, meshes.AXES), gradients, losses

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
        with jax.named_scope("metrics"):
            metrics = {
                "loss": loss,
                "grad_norm": optax.tree.norm(gradients),
                "learning_rate": jnp.asarray(schedule(state.step)),
                "losses": losses,
            }
        return dataclasses.replace(
            state, step=state.step + 1, weights=weights, average=average, opt_state=opt_state
        ), metrics

    where = jax.tree.map(lambda x: x.sharding, state)
    options = compiler.options(mesh, settings.xla)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None), compiler_options=options)


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient stopped being a number."""


def check_finite(step: int, metrics: dict[str, Array], index: np.ndarray) -> dict[str, float]:
    """The metrics as numbers. Waits for the step. Raises: NonFiniteLossError, naming step and samples."""
    scalars = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
    if np.isfinite(scalars["loss"]) and np.isfinite(scalars["grad_norm"]):
        return scalars
    shards = sorted(metrics["losses"].addressable_shards, key=lambda shard: shard.index[0].start or 0)
    losses = np.concatenate([np.asarray(shard.data) for shard in shards])
    losses, index = multihost_utils.process_allgather((losses, index), tiled=True)
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
    """Raises: PermissionError: `run` cannot be written. FileExistsError, ValueError: it holds another run, or one that
    was not asked to go on."""
    nearest = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{nearest} cannot be written to; give another --out")
    if not (run / "config.json").exists():
        if run.exists() and any(run.iterdir()):
            raise FileExistsError(f"{run} exists and is not a run; give another --out")
        return
    if not settings.resume:
        raise FileExistsError(f"{run} holds a run; add --resume to go on with it, or give another --out")
    held = RunConfig.load(run)
    if held.model != model_config:
        was, now = held.model.state_mode, model_config.state_mode
        if dataclasses.replace(held.model, state_mode=None) == dataclasses.replace(model_config, state_mode=None):
            raise ValueError(
                f"{run} began with state_mode={was!r}, not {now!r}; give --input.state-mode={was}, or another --out"
            )
        raise ValueError(f"{run} is a run of another model; give its preset, --tune and --lora, or another --out")
    check_resumes(held.train, settings)
    settings.optim.check_resumes(held.train.get("optim", {}))
    settings.val.check_resumes(held.train.get("val", {}))
    newest = checkpoint.newest_step(run)
    if newest is not None and not (checkpoint.step_folder(run, newest) / "train_state").exists():
        raise ValueError(f"{run} has weights to start from and no training to go on with; give it as --init-from")
    if held.robot != (robot := find_robot(settings.robot)):
        raise ValueError(
            f"{run} began with another robot than --robot={settings.robot} is now: {held.robot}, not {robot}; give the "
            "same, or another --out and this run as --init-from"
        )


def train(preset: str, settings: Settings, processes: Processes = ALONE) -> Path:
    """Train to the end, or until a signal asks to stop; returns the run's folder."""
    model_config = adapted(config.PRESETS[preset](), settings)
    mesh = meshes.make(settings.mesh)
    meshes.check_batch(settings.batch_size, mesh, settings.accum)
    for group in (settings.optim, settings.val, settings.output):
        group.check()
    with jax.set_mesh(mesh):
        check_kernels(model_config, fsdp.execution(mesh, remat=settings.remat, kernels=settings.kernels))
    compiler.options(mesh, settings.xla)  # a wrong one is an error now, not after all has been read
    graphdef, state, frozen = abstract_state(model_config, settings, mesh)
    run = settings.out or Path("runs") / preset
    processes.check_shared(run)
    check_out(run, model_config, settings)
    start = processes.agree(checkpoint.step_to_resume(run, settings.resume_step) or 0)
    traced = trace.steps_to_trace(settings.profile, start, settings.steps)
    new = "" if start or not settings.init_from else str(init_from.plan(settings.init_from, model_config))
    with processes.first_alone():  # what it decodes and computes, the others find
        resumed = checkpoint.step_folder(run, start) if start else None
        data = open_data(settings, model_config, resumed)
    loader, transform = data.loader, data.transform
    action_weights = settings.loss.action_weights(transform.action_stats.dim, model_config.action_dim)
    if start:
        state, frozen = restore(run, start, state, frozen, loader)
        checkpoint.set_newer_aside(run, start)
    else:
        state, frozen, dead = initialize(model_config, settings, mesh)
        if processes.is_first:
            RunConfig(model_config, transform.robot, settings.input.tokenizer, to_dict(settings)).save(run)
        if dead and not (run / "dead").exists():
            storage.save_arrays(run / "dead", dead)
        del dead
    checkpoints = Checkpoints(
        run,
        keep_last=settings.output.keep_last,
        keep_every=settings.output.keep_every,
        keep_best=data.held_out is not None,
    )
    step_flops = flops.train_step(
        model_config,
        len(transform.cameras),
        transform.prompt_len,
        settings.batch_size,
        trained=flatten(state.weights).keys(),
        flow_samples=settings.flow_samples,
    )
    peak = flops.peak(mesh.devices.flat[0].device_kind)
    place, validate = partial(to_device, mesh=mesh), None
    if data.held_out:
        action_dim = transform.action_stats.dim
        validation_step = validation.make_step(
            graphdef, settings, mesh, state.averaged, frozen, action_dim, action_weights
        )
        validate = Validation(data.held_out, settings.val.batches, validation_step, place)
    report = Report(
        run,
        start=start,
        steps=settings.steps,
        log_every=settings.output.log_every,
        tracker=settings.output.tracker,
        enabled=processes.is_first,
    )
    if new:
        report.print(new)
    batch = abstract_batch(model_config, settings.batch_size, transform.cameras, mesh, transform.prompt_len)

    def trace_step(changed: Settings) -> jax.stages.Traced:
        step = make_step(graphdef, model_config, changed, mesh, state, frozen, action_weights)
        return step.trace(state, frozen, batch)

    train_step = memory.compile_and_report(trace_step, settings, mesh, state, frozen, report.print)
    if warning := fsdp.undivided(state.weights, mesh):
        report.print(warning)
    if len(traced) < settings.profile:
        report.print(f"--profile={settings.profile} traces {len(traced)} steps: no more are left of this run")
    profile = trace.Profile(run / "profile", traced if processes.is_first else range(0), done=start, say=report.print)

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

    with processes.stop_signals() as stop, report, profile, checkpoints, processes.errors_end_all():
        if validate and not start:  # where training starts from; and what fails in it fails before anything is lost
            report.validation(0, partial(validate, state.averaged, frozen))
        while step < settings.steps and not stop(step):
            try:
                batch = next(loader)
            except EXPECTED:  # a sample that cannot be read
                finish(unchecked)
                if saved < step and jax.process_count() == 1:  # other processes do not know, and would not save theirs
                    save(checkpoints, state, frozen, loader, data.stats)
                    report.print(f"Saved after step {step}")
                raise
            index = batch.pop("index")
            state, metrics = profile.run(train_step, state, frozen, place(batch))
            finish(unchecked)
            step += 1
            unchecked.append((step, metrics, index, loader.last_wait_s))
            saving = step % settings.output.save_every == 0 or step == settings.steps
            values = None
            if validate and settings.val.due(step, saving=saving):
                finish(unchecked)
                values = report.validation(step, partial(validate, state.averaged, frozen))
            if saving:
                finish(unchecked)
                save(checkpoints, state, frozen, loader, data.stats, values)
                saved = step
        finish(unchecked)
        if saved < step:
            save(checkpoints, state, frozen, loader, data.stats)
    loader.close()
    if step < settings.steps:
        saying = (
            f"after step {step} and saved. Go on with the same command and" if step else "before the first step; use"
        )
        report.print(f"Stopped {saying} --resume")
    else:
        best = " --step=best" if validate else ""
        demo = transform.robot == DEMO
        following = f"evaluate {run}" if demo else f"infer {run} --data={settings.data}"
        report.print(f"Loss curve: {report.plot_loss()}\nNext: python -m pi0fast.{following}{best}")
    return run


def main(arguments: list[str]) -> None:
    """The command line: `[PRESET] [flags]`. The preset decides the flags' defaults."""
    import tyro  # timing a step needs this module, and no command line

    preset = "pi0_tiny" if not arguments or arguments[0].startswith("-") else arguments.pop(0)
    if preset not in DEFAULTS:
        sys.exit(f"there is no preset {preset!r}; the presets are {', '.join(DEFAULTS)}")
    chosen = tyro.cli(Settings, default=DEFAULTS[preset], args=arguments, prog=f"python -m pi0fast.train [{preset}]")
    compiler.take_gpu_memory()
    if chosen.profile:
        trace.keep_scopes()
    expected = (*EXPECTED, NonFiniteLossError)
    try:
        with join(chosen.distributed, chosen.mesh, expected) as processes:
            train(preset, chosen, processes)
    except expected as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

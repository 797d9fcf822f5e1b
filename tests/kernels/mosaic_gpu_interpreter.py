"""What JAX 0.11.2's Mosaic GPU interpreter lacks, for our tests. The one file that looks into it.

Added: `pl.run_state` over accumulators, stores to an accumulator, wgmma with its first operand in registers; and the
races of wgmma, which the interpreter runs at once. Here a wgmma reads its operands in shared memory from when it is
issued until it is waited for, as a copy does: it races with a copy that has not been waited for, with a store that was
not committed, and with what overwrites its operands too early. To read or write an accumulator, or to end, while a
wgmma is still at it is an error.

Not seen: registers that are written while a wgmma still reads them; races between threads of one warpgroup; a block
that ends while another still signals it; how many registers there are.
"""

import collections
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import jax
from jax._src import callback
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, race_detection_state, shared_memory
from jax._src.state import discharge, types

Interpreter = jaxpr_interpret.JaxprInterpreter
Memory = shared_memory.GPUSharedMemory
Races = race_detection_state.GPURaceDetectionState
interpret_known = Interpreter.interpret


@contextmanager
def record_races() -> Iterator[list[Races]]:
    """Completes the interpreter; each kernel that runs inside adds what it knows of its races (`races_found`)."""
    records = []

    def record(*args, **options):
        records.append(Races(*args, **options))
        return records[-1]

    gpu_callbacks.reset_gpu_interpret_mode_state()  # an earlier kernel may have failed
    with (
        mock.patch.object(Interpreter, "interpret", _interpret),
        mock.patch.object(shared_memory, "GPUSharedMemory", _Memory),
        mock.patch.object(shared_memory.Barrier, "deallocate", _deallocate),
        mock.patch.object(gpu_callbacks, "GPURaceDetectionState", record),
    ):
        yield records


@contextmanager
def race_free() -> Iterator[None]:
    """Fails where a kernel, run to its end inside, had a race."""
    with record_races() as records:
        yield
    assert records, "no kernel ran in the interpreter"
    assert not any(kernel.races_found for kernel in records)


class _Memory(Memory):
    """in_flight: of each warpgroup the wgmmas not yet waited for, oldest first: (accumulator, clock)."""

    def reset_per_cluster_state(self):
        super().reset_per_cluster_state()
        self.in_flight = collections.defaultdict(collections.deque)

    def kernel_thread_finished(self, thread):
        super().kernel_thread_finished(thread)
        if self.in_flight[thread]:
            raise ValueError(f"{thread} ends with {len(self.in_flight[thread])} wgmmas in flight; wait for them")


def _deallocate(self: shared_memory.Barrier) -> None:
    """JAX's also demands that whoever waited has seen every phase: nobody need wait for the last release of a slot."""
    with self.cv:
        self.ref_count -= 1
        if self.ref_count == 0 and self.arrivals_count:
            raise ValueError(f"a barrier ends with {self.arrivals_count} of {self.num_arrivals} arrivals")


# ── In the host's callbacks ───────────────────────────────────────────────────────────────────────────────────────────


def _memory() -> _Memory:
    memory = gpu_callbacks._get_shared_memory()
    assert isinstance(memory, _Memory)
    return memory


@gpu_callbacks.fail_on_exception
def _issued(*, token, thread, accumulator, operands, source_info):
    """A wgmma begins to read its operands: [(key, transforms)] of those in shared memory."""
    memory = _memory()
    clock = memory.incr_clock(thread)
    clock.inc(memory.get_next_tma_thread_id())  # what runs asynchronously has a place of its own in the clock
    for key, transforms in operands:
        key = shared_memory.HostAllocationKey.from_array(key)
        access = memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
        if memory.detect_races:
            races = gpu_callbacks.get_races()
            races.check_read(thread, clock.async_smem_clock.copy(), key, access, source_info=source_info)
    memory.in_flight[thread].append((shared_memory.HostAllocationKey.from_array(accumulator), clock))
    return token


@gpu_callbacks.fail_on_exception
def _waited(*, token, thread, most: int | None, accumulator=None):
    """At most `most` wgmmas are still in flight, and none of them is at `accumulator`."""
    memory = _memory()
    in_flight = memory.in_flight[thread]
    while most is not None and len(in_flight) > most:
        _, clock = in_flight.popleft()
        memory.clocks[thread].update(clock)
    if accumulator is not None:
        key = shared_memory.HostAllocationKey.from_array(accumulator)
        if any(other == key for other, _ in in_flight):
            raise ValueError(f"{thread} uses an accumulator that a wgmma in flight adds to; wait for it first")
    return token


@gpu_callbacks.fail_on_exception
def _stored(*, token, thread, accumulator, value, source_info):
    """Registers are a thread's own: no races are looked for. One block's would be taken for those of the next."""
    memory = _memory()
    key = shared_memory.HostAllocationKey.from_array(accumulator)
    info = shared_memory.GPULoggingInfo(None, thread, source_info)
    memory.store_buffer_content(key, memory.access(key, ()), value, thread, logging_info=info)
    return token


# ── Of the kernel's equations ─────────────────────────────────────────────────────────────────────────────────────────


def _interpret(self: Interpreter, jaxpr, token, *args):
    """`JaxprInterpreter.interpret`, cut where an equation is one of ours."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def read(atoms):
        return [atom.val if isinstance(atom, jax_core.Literal) else values[atom] for atom in atoms]

    for ours, equations in itertools.groupby(jaxpr.eqns, lambda equation: equation.primitive in HANDLERS):
        if ours:
            for equation in equations:
                token, results = HANDLERS[equation.primitive](self, equation, token, read(equation.invars))
                values.update(zip(equation.outvars, results, strict=True))
            continue
        known = list(equations)
        atoms = [atom for equation in known for atom in equation.invars if not isinstance(atom, jax_core.Literal)]
        needed = [var for var in dict.fromkeys(atoms) if var in values]
        made = [var for equation in known for var in equation.outvars if not isinstance(var, jax_core.DropVar)]
        part = jaxpr.replace(constvars=[], invars=needed, outvars=made, eqns=known)
        token, results = interpret_known(self, part, token, *read(needed))
        values.update(zip(made, results, strict=True))
    return token, read(jaxpr.outvars)


def _call(function, token, **arguments):
    return callback.io_callback(function, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, **arguments)


def _wait(self: Interpreter, token, most: int | None, accumulator=None):
    return _call(partial(_waited, most=most), token, thread=self.thread, accumulator=accumulator)


def _to_registers(self: Interpreter, equation, token, value):
    """Registers that hold a value: the token, and their key."""
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=equation.source_info,
    )


def _free_registers(self: Interpreter, equation, token, key):
    return gpu_callbacks.call_deallocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        source_info=equation.source_info,
    )


def _load(self: Interpreter, equation, token, key, aval):
    return callback.io_callback(
        partial(gpu_callbacks.wgmma_accumulator_deref, source_info=equation.source_info, wait_n=None),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc_allocation_key_as_array=key,
    )


def _wgmma(self: Interpreter, equation, token, values):
    _, a, b = equation.invars[:3]
    registers = None
    if not isinstance(a.aval, types.AbstractRef):
        token, registers = _to_registers(self, equation, token, values[1])
        values[1] = registers
    token, results = self._interpret_wgmma_ref_p(equation, token, lambda: values)
    if registers is not None:
        token = _free_registers(self, equation, token, registers)

    trees = [equation.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    _, *transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), values[3:])
    operands = [
        jaxpr_interpret.resolve_ref(operand.aval, key, tuple(transform))
        for operand, key, transform in zip((a, b), values[1:3], transforms, strict=True)
        if isinstance(operand.aval, types.AbstractRef)
    ]
    issued = partial(_issued, source_info=equation.source_info)
    return _call(issued, token, thread=self.thread, accumulator=values[0], operands=operands), results


def _wgmma_wait(self: Interpreter, equation, token, _values):
    return _wait(self, token, equation.params["n"]), []


def _accumulator_load(self: Interpreter, equation, token, values):
    token = _wait(self, token, equation.params["wait_n"], values[0])
    token, value = _load(self, equation, token, values[0], equation.outvars[0].aval)
    return token, [value]


def _accumulator_store(self: Interpreter, equation, token, values):
    key, value = values
    token = _wait(self, token, None, key)
    token, before = _load(self, equation, token, key, equation.outvars[0].aval)
    stored = partial(_stored, source_info=equation.source_info)
    return _call(stored, token, thread=self.thread, accumulator=key, value=value), [before]


def _run_state(self: Interpreter, equation, token, values):
    """Values become registers for as long as the body runs; references are handed on."""
    is_value = [not isinstance(var.aval, types.AbstractRef) for var in equation.invars]
    keys = list(values)
    for i, new in enumerate(is_value):
        if new:
            token, keys[i] = _to_registers(self, equation, token, values[i])
    token, _ = self.interpret(equation.params["jaxpr"], token, *keys)
    token = _wait(self, token, 0)
    results = list(values)
    for i, new in enumerate(is_value):
        if new:
            token, results[i] = _load(self, equation, token, keys[i], equation.outvars[i].aval)
            token = _free_registers(self, equation, token, keys[i])
    return token, results


HANDLERS = {
    primitives.wgmma_ref_p: _wgmma,
    primitives.wgmma_wait_p: _wgmma_wait,
    primitives.wgmma_accumulator_deref_p: _accumulator_load,
    primitives.wgmma_accumulator_store_p: _accumulator_store,
    discharge.run_state_p: _run_state,
}

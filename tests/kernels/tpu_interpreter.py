"""What Pallas's TPU interpreter keeps to itself: whether it saw a race. The one file that looks there."""

from collections.abc import Iterator
from contextlib import contextmanager

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu


@contextmanager
def race_free() -> Iterator[None]:
    """Fails where a kernel, run to its end inside, read or wrote what a copy or another core was still at."""
    pltpu.reset_tpu_interpret_mode_state()
    yield
    assert interpreter.races is not None, "no kernel ran in the interpreter, or none had races looked for"
    assert not interpreter.races.races_found

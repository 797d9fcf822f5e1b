"""What Pallas's TPU interpreter keeps to itself: whether it saw a race. The one file that looks there."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu


@contextmanager
def race_free() -> Iterator[None]:
    """Fails where a kernel, run to its end inside, read or wrote what a copy or another core was still at.

    The interpreter starts a new record of races with every kernel; all of them are kept here.
    """
    pltpu.reset_tpu_interpret_mode_state()
    records = []

    def record(*args, **options):
        records.append(interpreter_record(*args, **options))
        return records[-1]

    interpreter_record = interpreter.RaceDetectionState  # pyright: ignore[reportPrivateImportUsage]
    with mock.patch.object(interpreter, "RaceDetectionState", record):
        yield
    assert records, "no kernel ran in the interpreter"
    assert not any(kernel.races_found for kernel in records)

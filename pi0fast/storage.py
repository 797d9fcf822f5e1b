"""Arrays in a folder, by path, as orbax stores them.

They are read in groups (`integrity.groups`), each straight to the shards of every device. A process reads each chunk on
disk that it needs once. Beside the arrays themselves its host holds at most three copies of its part of one group (the
file's bytes, the decoded chunks, the shards on their way to the devices), and a device its shard of one group.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, DTypeLike

from pi0fast import integrity


def _quiet(record: logging.LogRecord) -> bool:
    """orbax warns that a folder of arrays is not a whole checkpoint of its own; here it never is."""
    return "Metadata file does not exist" not in record.getMessage()


logging.getLogger("absl").addFilter(_quiet)


def array_shapes(folder: epath.Path | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays saved in a folder, by path.

    Raises: FileNotFoundError if there are none; CorruptCheckpointError if it cannot be read.
    """
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(f"{folder} holds no orbax arrays (no _METADATA); is it a checkpoint that was cut off?")
    with _reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat(tree).items()}


def nbytes(array: jax.ShapeDtypeStruct) -> int:
    return array.size * array.dtype.itemsize


def check_shapes(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises: ValueError, listing every array of the folder that is missing, extra or of another shape."""
    problems = shape_problems({path: stored.shape for path, stored in array_shapes(folder).items()}, expected)
    if problems:
        raise ValueError(
            f"{folder} does not fit this model; use the preset and the settings it was trained with:\n  "
            + "\n  ".join(problems)
        )


def shape_problems(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each array that is missing, extra or of another shape."""
    return [
        *(f"missing: {path} {shape}" for path, shape in expected.items() if path not in found),
        *(f"extra: {path} {tuple(shape)}" for path, shape in found.items() if path not in expected),
        *(
            f"misshaped: {path} is {tuple(found[path])}, expected {shape}"
            for path, shape in expected.items()
            if path in found and tuple(found[path]) != shape
        ),
    ]


def load_arrays(
    folder: epath.Path | Path,
    *,
    shardings: Mapping[str, Sharding] | None = None,
    dtypes: Mapping[str, DTypeLike] | None = None,
    checksums: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Arrays by path, each read straight to where it goes (the default device without `shardings`).

    dtypes: cast to these; a path that is left out keeps its stored dtype.
    checksums: what they must be, of the stored dtype.

    Raises: FileNotFoundError, CorruptCheckpointError, as `array_shapes`; the latter also for another checksum.
    """
    stored, arrays = array_shapes(folder), {}
    wrong = sorted(set(checksums or {}) - set(stored))
    for group in integrity.groups({path: nbytes(leaf) for path, leaf in stored.items()}):
        read = read_arrays(folder, {path: stored[path] for path in group}, shardings)
        if checksums is not None:
            wrong += [path for path, value in integrity.checksums(read).items() if checksums.get(path) != value]
        arrays |= {path: array.astype((dtypes or {}).get(path, array.dtype)) for path, array in read.items()}
    if wrong:
        raise integrity.damaged(folder, f"it holds other values than were saved in {', '.join(wrong)}")
    return arrays


def read_arrays(
    folder: epath.Path | Path,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Sharding] | None = None,
) -> dict[str, Array]:
    """Those of the arrays that `stored` names, all at once; as `load_arrays`."""
    default = SingleDeviceSharding(jax.devices()[0])
    tree = nest(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path] if shardings else default)
            for path, leaf in stored.items()
        }
    )
    args = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with _reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
        return flat(checkpointer.restore(folder.absolute(), args=args))


def save_arrays(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Arrays by path; the folder is there when all of it is."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(nest(arrays)))


@contextmanager
def _reading(folder: epath.Path | Path) -> Iterator[None]:
    """orbax raises what tensorstore, the file system and its JSON parser raise."""
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_finishing_policy())
    try:
        yield
    except jax.errors.JaxRuntimeError:  # e.g. out of memory
        raise
    except Exception as error:
        cause = integrity.cause(error)
        names = sorted(set(re.findall(r'reading "(.+?)/[^/"]*" in', cause)))
        raise integrity.damaged(folder, f"{', '.join(names) or 'it'} cannot be read: {cause}") from error
    finally:
        asyncio.set_event_loop_policy(policy)


class _FinishingLoop(asyncio.SelectorEventLoop):
    """Ends its tasks before it closes.

    orbax reads all arrays at once and, when one fails, closes its loop under the others. Each of them would print a
    page of its own when it is collected, and bury the message that says what is damaged.
    """

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:
        """Tensorstore's threads tell of a read that was cancelled, and may come after the loop was closed."""
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            nobody_waits = asyncio.Handle(callback, args, self, context)
            nobody_waits.cancel()
            return nobody_waits


def _finishing_policy() -> asyncio.AbstractEventLoopPolicy:
    class Policy(asyncio.DefaultEventLoopPolicy):  # made here, since Python 3.14 warns of every policy
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return _FinishingLoop()

    return Policy()


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return nnx.traversals.unflatten_mapping(dict(arrays), sep="/")


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return nnx.traversals.flatten_mapping(tree, sep="/")

"""What the programs share: an error that its message explains ends in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXPECTED = (ImportError, OSError, ValueError)  # a missing extra, a file, a setting or data


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except EXPECTED as error:
        sys.exit(f"{type(error).__name__}: {error}")

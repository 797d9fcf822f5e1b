"""Choose the implementation of an op; collect the reasons against each; raise them."""

from collections.abc import Callable, Mapping
from typing import Any

Implementation = Callable[..., Any]


def choose(
    op: str, requested: str | None, implementations: Mapping[str, tuple[Implementation, str | None]]
) -> Implementation:
    """The requested implementation, or the first that can run when `requested` is None.

    implementations: name → (function, the reason it cannot run or None), in order of preference.

    Raises:
        ValueError: the name is unknown, or the implementation cannot run; the message has every reason.
    """
    if requested is not None and requested not in implementations:
        raise ValueError(f"{op} has no implementation {requested!r}; it has {', '.join(implementations)}")
    names = [requested] if requested is not None else list(implementations)
    reasons = {}
    for name in names:
        function, reason = implementations[name]
        if reason is None:
            return function
        reasons[name] = reason
    raise ValueError(f"{op} cannot run: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))

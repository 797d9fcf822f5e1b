"""Reading compiled programs, as XLA prints them."""

import math
import re

MAKES_NOTHING = ("get-tuple-element", "bitcast", "parameter", "tuple")


def loop_instructions(text: str, elements: int) -> list[str]:
    """The instructions in the bodies of loops that make an array of so many elements."""
    bodies = set(re.findall(r" while\(.*body=%?([\w.-]+)", text))
    assert bodies, "the program has no loop"
    found = []
    for computation in text.split("\n\n"):
        name = re.match(r"\s*%?([\w.-]+) \(", computation)
        if name is None or name[1] not in bodies:
            continue
        for line in computation.splitlines():
            made = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
            if made and made[2] not in MAKES_NOTHING and math.prod(map(int, made[1].split(","))) == elements:
                found.append(line.strip())
    return found

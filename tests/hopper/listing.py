"""Loops in what `cuobjdump -sass` prints of a kernel."""

from __future__ import annotations

import re

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*) ?([^;]*);")
_ENDS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "EXIT", "RET", "BPT")  # nothing follows these unless they have a condition


def innermost_loops(sass: str, *products: str) -> list[list[str]]:
    """The instructions (names without what follows a dot) of every loop with one of `products` that contains no
    other such loop.

    A loop is what leads to a backward branch without passing its target again, if it is entered there only: a branch
    back from a wait's second try, which lies behind the kernel, closes none.
    """
    found = _LINE.findall(sass)
    names = [name.partition(".")[0] for _, _, name, _ in found]
    index = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    before: list[list[int]] = [[] for _ in found]
    back = []
    for i, (_, condition, _, operands) in enumerate(found):
        if i + 1 < len(found) and (condition or "," in operands or names[i] not in _ENDS):
            before[i + 1].append(i)
        target = re.search(r"\b0x[0-9a-f]+$", operands.strip()) if names[i] == "BRA" else None
        if target:
            to = index[int(target[0], 16)]
            before[to].append(i)
            back += [(to, i)] if to <= i else []
    loops: dict[int, set[int]] = {}
    for head, tail in back:
        body = _between(head, tail, before)
        if any(names[i] in products for i in body):
            loops[head] = loops.get(head, set()) | body
    return [[names[i] for i in sorted(x)] for x in loops.values() if not any(y < x for y in loops.values())]


def _between(head: int, tail: int, before: list[list[int]]) -> set[int]:
    """All that leads to tail without passing head; nothing if some of that is reached without it."""
    body, waiting = {head, tail}, {tail} - {head}
    while waiting:
        i = waiting.pop()
        if not before[i]:
            return set()
        new = set(before[i]) - body
        body |= new
        waiting |= new
    return body


def in_memory(loop: list[str]) -> int:
    """How often the loop writes a number to the stack or reads one from there."""
    return sum(name in ("STL", "LDL") for name in loop)

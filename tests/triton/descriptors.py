"""A check of what the assembler made of Hopper's products: the descriptors that they read must be those that the
compiler wrote.

A product finds its operands by descriptors, 64-bit numbers that say where in shared memory a tile lies and how it is
swizzled. The compiler adds them up from the start of shared memory, the assembler keeps them in uniform registers.
ptxas 12.8 forgets the copy of a sum's first term where the same address is the start of descriptors of two swizzles,
and adds to whatever the register held. No interpreter of the source can see that. So both texts are evaluated here:
the PTX, and the machine code with its loops (constants spread along all paths until nothing changes). Numbers that
differ from one turn of a loop to the next are VARIES; of those only the upper halves, which say how, are compared.
"""

from __future__ import annotations

import operator
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

SHARED = 0x400  # where shared memory begins; any address would do
UNDEFINED, VARIES = "undefined", "varies"
Number = int | str
Pair = tuple[Number, Number]
LOW = (1 << 32) - 1


def joined(*numbers: Number) -> str | None:
    """UNDEFINED if any is, else VARIES if any does, else None."""
    return next((kind for kind in (UNDEFINED, VARIES) if kind in numbers), None)


def add(a: Pair, b: Pair) -> Pair:
    """A sum of 64 bits. An address that varies does not carry: it has 14 bits."""
    low = joined(a[0], b[0]) or int(a[0]) + int(b[0])
    carry = 0 if isinstance(low, str) else low >> 32
    high = joined(a[1], b[1]) or (int(a[1]) + int(b[1]) + carry) & LOW
    return (low if isinstance(low, str) else low & LOW), high


# --- PTX ---

WORDS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a, "cvt": lambda a: a, "add": operator.add, "sub": operator.sub, "or": operator.or_,
    "and": operator.and_, "xor": operator.xor, "shl": operator.lshift, "shr": operator.rshift,
    "bfe": lambda a, start, bits: a >> start & (1 << bits) - 1,
}  # fmt: skip


def written(ptx: str) -> list[list[Pair]]:
    """The descriptors of each product in PTX, in its order."""
    made: dict[str, list[tuple[str, list[str]] | None]] = {}
    for line in ptx.splitlines():
        found = re.match(r"\s*(@!?%p\d+ )?([a-z][\w.:]*)\s+(%rd?\d+), (.*);", line)
        if found:
            operands = [x.strip() for x in found[4].split(",")]
            made.setdefault(found[3], []).append(None if found[1] else (found[2], operands))
    known: dict[str, Pair] = {}

    def value(x: str) -> Pair:
        if x.startswith("global_smem"):
            return SHARED + int(x.partition("+")[2] or 0), 0
        if re.fullmatch(r"-?\d+", x):
            return int(x) & LOW, int(x) >> 32 & LOW
        if x not in known:
            wide = x.startswith("%rd")
            known[x] = (VARIES, VARIES if wide else 0)
            (first, *others) = made.get(x, [None])
            if first and not others:
                known[x] = result(first[0], [value(operand) for operand in first[1]], wide)
        return known[x]

    def result(what: str, operands: list[Pair], wide: bool) -> Pair:
        name = what.split(".")[0]
        if what == "cvt.u64.u32":
            return operands[0][0], 0
        if wide and name == "add":
            return add(*operands)
        if wide and name in ("or", "mov"):
            low, high = (joined(*half) or WORDS[name](*half) for half in zip(*operands))
            return low, high
        words = [operand[0] for operand in operands]
        if wide or name not in WORDS or joined(*words):
            return VARIES, VARIES if wide else 0
        return WORDS[name](*words) & LOW, 0

    products = [line[line.index("{") :] for line in ptx.splitlines() if "wgmma.mma_async" in line]
    return [[value(x) for x in re.findall(r"%rd\d+", re.sub(r"{[^}]*}", "", line))] for line in products]


# --- machine code ---

State = dict[str, Number]  # by register, predicate or place on the stack


class Code:
    """Machine code as nvdisasm prints it."""

    def __init__(self, text: str):
        self.lines: list[tuple[str, str, list[str]]] = []  # condition, instruction, operands
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(self.lines)
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+{? *(?:@(!?U?P\w) +)?([A-Z0-9_.]+)\s*(.*?);", line):
                operands = [x.strip().removesuffix(".reuse") for x in found[3].split(",")] if found[3].strip() else []
                self.lines.append((found[1] or "", found[2], operands))
        self._name_swaps()
        self.next: list[list[int]] = []
        for i, (condition, what, operands) in enumerate(self.lines):
            kind = what.split(".")[0]
            ahead = [i + 1] if i + 1 < len(self.lines) else []
            if kind == "BRA":
                target = labels[re.findall(r"\.L_x_\d+", operands[-1])[0]]
                self.next.append([target] if not condition and len(operands) == 1 else [*ahead, target])
            else:
                self.next.append([] if kind in ("EXIT", "RET") and not condition else ahead)

    def _name_swaps(self) -> None:
        """Three exclusive ors that exchange two registers become one instruction."""
        for i, (condition, what, operands) in enumerate(self.lines):
            if what != "ULOP3.LUT" or operands[3:5] != ["URZ", "0x3c"] or operands[0] != operands[1]:
                continue
            a, b = operands[0], operands[2]
            touching = [j for j in range(i + 1, min(i + 12, len(self.lines))) if {a, b} & set(self.lines[j][2])][:2]
            wanted = [[b, a, b, "URZ", "0x3c"], [a, a, b, "URZ", "0x3c"]]
            if not condition and [self.lines[j][2][:5] for j in touching] == wanted:
                self.lines[i] = ("", "SWAP", [a, b])
                for j in touching:
                    self.lines[j] = ("", "NOP", [])

    def states(self) -> dict[int, State]:
        """What holds before each product that is reached, on every path to it."""
        heads = {0, *(j for i, ahead in enumerate(self.next) for j in ahead if ahead != [i + 1])}
        before: dict[int, State] = {0: {}}
        found: dict[int, State] = {}
        todo = [0]
        while todo:
            i = todo.pop(todo.index(min(todo)))
            state = dict(before[i])
            while True:
                if "GMMA" in self.lines[i][1]:
                    found[i] = dict(state)
                state.update(step(state, *self.lines[i]))
                if self.next[i] != [i + 1] or i + 1 in heads:
                    break
                i += 1
            for j in self.next[i]:
                old = before.get(j)
                new = dict(state) if old is None else agreed(old, state)
                if new != old:
                    before[j] = new
                    todo += [j] if j not in todo else []
        return found


def agreed(a: State, b: State) -> State:
    """What holds after either of two paths."""
    new = {}
    for key in a.keys() | b.keys():
        one, other = a.get(key, UNDEFINED), b.get(key, UNDEFINED)
        new[key] = one if one == other else joined(one, other) or VARIES
    return new


def read(state: State, x: str) -> Number:
    if x in ("URZ", "RZ", "!UPT", "!PT"):
        return 0
    if x in ("UPT", "PT"):
        return 1
    if re.fullmatch(r"-?0x[0-9a-f]+", x):
        return int(x, 16) & LOW
    if re.fullmatch(r"[-~!]?(UR|R|UP|P)\d+", x):
        value = state.get(x.lstrip("-~!"), UNDEFINED)
        if isinstance(value, str) or x[0] in "URP":
            return value
        return {"-": -value & LOW, "~": ~value & LOW, "!": 1 - value}[x[0]]
    return VARIES


def read_pair(state: State, x: str) -> Pair:
    if found := re.fullmatch(r"(-?)(UR|R)(\d+)", x):
        pair = (read(state, found[2] + found[3]), read(state, f"{found[2]}{int(found[3]) + 1}"))
        if not found[1]:
            return pair
        if kind := joined(*pair):
            return kind, kind
        whole = -(int(pair[0]) | int(pair[1]) << 32)
        return whole & LOW, whole >> 32 & LOW
    low = read(state, x)
    return low, LOW if x.startswith("-0x") else joined(low) or 0


def registers(kind: str, forms: list[str]) -> int:
    """How many registers an instruction writes."""
    if kind in ("HGMMA", "QGMMA", "IGMMA"):
        return int(forms[0].split("x")[1]) // 2
    if kind in ("HMMA", "IMMA", "QMMA"):
        return 4
    wide = {"64": 2, "128": 4, "WIDE": 2, "2": 2, "4": 4}
    return max([wide.get(form, 1) for form in forms] + [2 if kind == "CS2R" and "32" not in forms else 1])


def place(operand: str) -> int:
    """The offset on the stack of an operand like [R1+0x4c]."""
    offset = re.findall(r"\+(-?0x[0-9a-f]+)", operand)
    return int(offset[0], 16) if offset else 0


def step(state: State, condition: str, what: str, operands: list[str]) -> State:
    """What an instruction changes in the state."""
    kind, *forms = what.split(".")
    if kind == "SWAP":
        return {operands[0]: read(state, operands[1]), operands[1]: read(state, operands[0])}
    if kind == "STL":
        count, first = registers(kind, forms), operands[1]
        names = [f"{first[0]}{int(first[1:]) + i}" if first != "RZ" else first for i in range(count)]
        made = {f"[{place(operands[0]) + 4 * i}]": read(state, name) for i, name in enumerate(names)}
        return stored(state, condition, made)
    flags = [x for x in operands[:3] if re.fullmatch(r"U?P\d", x)]
    at = next((i for i, x in enumerate(operands[:2]) if re.fullmatch(r"U?R\d+", x)), None)
    if kind.startswith(("ST", "RED", "BRA", "BAR")) or at is None or (at and operands[0] not in flags):
        return stored(state, condition, dict.fromkeys(flags[: 2 if "SETP" in kind else 1], VARIES))
    name, number = operands[at].rstrip("0123456789"), int(re.sub(r"\D", "", operands[at]))
    made = dict.fromkeys([f"{name}{number + i}" for i in range(registers(kind, forms))], VARIES)
    sources = operands[at + 1 :]
    while sources and re.fullmatch(r"U?P(\d|T)", sources[0]) and not kind.startswith("SEL"):
        sources.pop(0)  # a carry, or what else is written beside the register
    carried: Number = VARIES
    results: list[Number] = []
    plain = kind.removeprefix("U") if name == "UR" else kind
    words = [read(state, x) for x in sources]
    if plain in ("MOV", "R2UR"):
        results = list(read_pair(state, sources[0])) if "64" in forms else words[:1]
    elif kind in ("S2UR", "S2R") and sources[0] == "SR_CgaCtaId":
        results = [0]
    elif plain == "LDL":
        results = [state.get(f"[{place(sources[0]) + 4 * i}]", UNDEFINED) for i in range(len(made))]
    elif what == "UIADD3.64":
        total: Pair = (0, 0)
        for x in sources[:3]:
            total = add(total, read_pair(state, x))
        results = list(total)
    elif plain in ("IADD3", "VIADD") or (plain == "IMAD" and not {"WIDE", "HI"} & set(forms)):
        carry = [x for x in words[3:] if "X" in forms]
        if plain == "IMAD":
            unknown = (words[2] if joined(words[2]) else None) if 0 in words[:2] else joined(*words[:3])
            terms = [] if unknown else [int(words[0] or 0) * int(words[1] or 0) if 0 not in words[:2] else 0, words[2]]
        else:
            unknown, terms = joined(*words[:3]), words[:3]
        unknown = joined(*carry) or unknown
        total_word = 0 if unknown else sum(map(int, [*terms, *carry]))
        results = [unknown or total_word & LOW]
        carried = 0 if unknown == VARIES else unknown or total_word >> 32 & 1
    elif plain in ("SHF", "SGXT", "LOP3") or (plain == "LEA" and not forms):
        results = [joined(*words[: 2 if plain == "SGXT" else 3]) or shifted(plain, forms, words, sources)]
    made.update(zip(made, results))
    return stored(state, condition, {**made, **dict.fromkeys(flags, carried)})


def stored(state: State, condition: str, made: State) -> State:
    """What an instruction made, or may have made."""
    if condition:
        made = {key: x if state.get(key) == x else joined(x) or VARIES for key, x in made.items()}
    return made


def shifted(kind: str, forms: list[str], words: list[Number], sources: list[str]) -> Number:
    a, b, *more = (0 if isinstance(word, str) else word for word in words)
    if kind == "LEA":
        return (a << more[0]) + b & LOW
    if kind == "SGXT":
        return a & (1 << b) - 1 if "U32" in forms else VARIES
    if kind == "LOP3":
        table = int(sources[3], 16)
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | more[0] >> i & 1) & 1) << i for i in range(32))
    whole = more[0] << 32 | a
    if "L" in forms:
        return (whole << b) >> 32 & LOW if "HI" in forms else a << b & LOW
    if "HI" in forms:
        return (more[0] - (1 << 32) if "S32" in forms and more[0] >> 31 else more[0]) >> b & LOW
    return whole >> b & LOW


def used(text: str) -> list[tuple[str, Pair, Pair] | None]:
    """(the instruction, descriptors of the left and of the right operand) of each product in machine code, in its
    order; None for one that is never reached."""
    code = Code(text)
    states = code.states()
    found: list[tuple[str, Pair, Pair] | None] = []
    for i, (_, what, operands) in enumerate(code.lines):
        if what.startswith(("HGMMA", "QGMMA", "IGMMA")):
            first = int(re.findall(r"gdesc\[UR(\d+)\]", " ".join(operands))[0])
            pairs = [read_pair(states.get(i, {}), f"UR{first + k}") for k in (0, 2)]
            found.append((f"{what} {', '.join(operands)}", pairs[0], pairs[1]) if i in states else None)
    return found


def faults(ptx: str, machine_code: str) -> list[str]:
    """What products read by other descriptors than the compiler wrote. The parts of a kernel for its groups of warps,
    up to three equal ones with products, may lie in another order in machine code."""
    wanted, have = written(ptx), used(machine_code)
    if len(wanted) != len(have):
        return [f"{len(wanted)} products were written and {len(have)} made"]
    turns = {0} | {k * len(have) // parts for parts in (2, 3) if len(have) % parts == 0 for k in range(1, parts)}
    return min((_differences(wanted, have[n:] + have[:n]) for n in sorted(turns)), key=len)


def _differences(wanted: list[list[Pair]], have: list[tuple[str, Pair, Pair] | None]) -> list[str]:
    found = []
    for i, (want, product) in enumerate(zip(wanted, have)):
        if product is None:
            continue
        what, *pairs = product
        for side, pair in zip(want[::-1], pairs[::-1]):
            if UNDEFINED in pair or any(w != VARIES and w != h for w, h in zip(side, pair)):
                found.append(f"product {i}, {what}: {shown(pair)} instead of {shown(side)}")
    return found


def shown(pair: Pair) -> str:
    return ":".join(x if isinstance(x, str) else f"{x:08x}" for x in pair[::-1])


def disassembled(cubin: Path) -> str:
    import triton

    command = [Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm", "-c", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""The C++ lowering: a program becomes `struct Variant` in the vocabulary of `attention/kernels/cpu/ops.h`.

Everything that does not depend on the key is computed once per row vector, outside the lambda that `bind_logits` and
`bind_mask` return.
"""

from __future__ import annotations

import math

from flashloom.lower.forms import cap
from flashloom.variant import ranges, spans
from flashloom.variant.expr import BOOL, DOUBLE, FLOAT, INT32, INT64, Expr, Param, Program, topological

# these would be keywords or functions of the C library
NAMES = {
    op: op + "_"
    for op in (
        "abs",
        "min",
        "max",
        "and",
        "or",
        "xor",
        "not",
        "isnan",
        "bitand",
        "bitor",
        "bitxor",
        "bitnot",
        "shl",
        "shr",
    )
}
CASTS = {BOOL: "to_bool", INT32: "to_int32", INT64: "to_int64", FLOAT: "to_float", DOUBLE: "to_double"}
TAGS = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8",
    "uint8": "u8", "bool": "b8",
}  # fmt: skip
LITERALS = {math.inf: "__builtin_inff()", -math.inf: "(-__builtin_inff())"}


def literal(value: bool | int | float, dtype: str) -> str:
    if dtype == BOOL:
        return "true" if value else "false"
    if dtype == FLOAT:
        if value != value:
            return '__builtin_nanf("")'
        text = LITERALS.get(value) or f"{value!r}f"
        return f"({text})" if value < 0 else text
    if dtype == DOUBLE:
        text = f"double({LITERALS[value]})" if value in LITERALS else repr(value)
        return '__builtin_nan("")' if value != value else f"({text})"
    if dtype == INT64:
        return f"int64_t({value}LL)" if value != -(2**63) else "(int64_t(-9223372036854775807LL) - 1)"
    return str(value) if value >= 0 else f"({value})" if value != -(2**31) else "(-2147483647 - 1)"


class _Writer:
    """Writes nodes as statements, each once; `scopes` decide where."""

    def __init__(self, program: Program, source: str):
        self.index = {p: i for i, p in enumerate(program.params)}
        self.source = source  # what inputs are read from: "at" or "t"
        self.names: dict[Expr, str] = {}
        self.count = 0

    def write(
        self, roots: tuple[Expr, ...], indent: str, only: set[Expr] | None = None, inputs: dict[str, str] | None = None
    ) -> list[str]:
        lines = []
        for node in topological(*roots):
            if node in self.names or (only is not None and node not in only):
                continue
            if node.op == "const":
                self.names[node] = literal(node.attr, node.dtype)
            elif node.op == "input":
                self.names[node] = (inputs or {}).get(str(node.attr), f"{self.source}.{node.attr}")
            elif node.op == "param":
                self.names[node] = f"p.scalar{self.index[node.attr]}"
            else:
                name = f"t{self.count}"
                self.count += 1
                lines.append(f"{indent}const auto {name} = {self.call(node)};")
                self.names[node] = name
        return lines

    def call(self, node: Expr) -> str:
        args = [self.names[a] for a in node.args]
        if node.op == "cast":
            return f"{CASTS[node.dtype]}({args[0]})"
        if node.op == "load":
            return self.load(node, args)
        if node.op == "element":
            return f"gather(x, clamp_index({args[0]}, kRow))" if node.args[0].op != "input" else "loadu(x + d)"
        if node.op in ("block_min", "block_max"):
            return self.block(node, args)
        return f"{NAMES.get(node.op, node.op)}({', '.join(args)})"

    def load(self, node: Expr, args: list[str]) -> str:
        p: Param = node.attr
        i = self.index[p]
        place = ["wrap_index" if wraps else "clamp_index" for wraps in spans.wraps(node)]
        if p.kind == "bits":
            return f"load_bit(p.data{i}, {place[0]}({args[0]}, p.size{i}_0 * 8))"
        if p.kind in ("head", "kv_head", "request"):
            index = f"wrap_index({args[0]}, p.size{i}_0)" if spans.wraps(node)[0] else args[0]
            return f"load_entry<{TAGS[p.dtype]}>(p.data{i}, {index}, p.size{i}_0, p.stride{i}_0)"
        offset = "int64_t(0)"
        for d, a in enumerate(args):
            term = f"mul(to_int64({place[d]}({a}, p.size{i}_{d})), p.stride{i}_{d})"
            offset = term if d == 0 else f"add({offset}, {term})"
        return f"load<{TAGS[p.dtype]}>(p.data{i}, {offset})"

    def block(self, node: Expr, args: list[str]) -> str:
        p: Param = node.attr
        i = self.index[p]
        corners = [f"to_int64({a})" for a in args]
        if p.kind == "bits":
            return f"{node.op}_bit(p.data{i}, {', '.join(corners)}, p.size{i}_0 * 8) != 0"
        boxes = [f"{corners[2 * d]}, {corners[2 * d + 1]}, p.size{i}_{d}, p.stride{i}_{d}" for d in range(p.rank)]
        return f"{node.op}<{TAGS[p.dtype]}>(p.data{i}, {', '.join(boxes)})"


def _depends(root: Expr, names: set[str]) -> set[Expr]:
    """The nodes below root that read one of these inputs (or, for "dim", an element of the row)."""
    found: set[Expr] = set()
    for node in topological(root):
        own = (node.op == "input" and node.attr in names) or (node.op == "element" and "dim" in names)
        if own or any(a in found for a in node.args):
            found.add(node)
    return found


def render(program: Program, dim: int, value_dim: int) -> str:
    """C++ source of `struct Variant` for one head shape (see the top of ops.h for the vocabulary it is written in)."""
    program = program.specialise(dim, value_dim)
    flags = {"has_" + h: getattr(program, h) is not None for h in ("query", "key", "logits", "mask", "output")}
    flags |= {"uses_lse": program.uses_lse, "softmax": program.softmax, "capped": cap(program) is not None}
    lines = ["struct Variant {"]
    lines += [f"  static constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]
    lines += _params(program)
    lines += _bound(program, "logits", "logits, kv_pos", "splat(logits)")
    lines += _cap(program)
    lines += _bound(program, "mask", "kv_pos", "true")
    lines += _vector(program, "query", dim)
    lines += _vector(program, "key", dim)
    lines += _vector(program, "output", value_dim)
    lines += _verdict(program)
    return "\n".join([*lines, "};", ""])


def _params(program: Program) -> list[str]:
    lines, reads, word = ["  struct Params {"], [], 0
    for i, p in enumerate(program.params):
        if p.kind == "scalar":
            kind = {BOOL: "bool", FLOAT: "float", INT64: "int64_t"}.get(p.compute_dtype, "int32_t")
            lines.append(f"    {kind} scalar{i};  // {p.name}")
            source = f"float(word_as_double(words[{word}]))" if kind == "float" else f"{kind}(words[{word}])"
            reads.append(f"      scalar{i} = {source};")
            word += 1
            continue
        sizes = "".join(f" size{i}_{d}," for d in range(p.rank)) + "".join(f" stride{i}_{d}," for d in range(p.rank))
        lines.append(f"    const void* data{i};  // {p.name}, {p.dtype}")
        if sizes:
            lines.append(f"    int64_t{sizes[:-1]};")
        reads.append(f"      data{i} = (const void*)words[{word}];")
        reads += [f"      size{i}_{d} = words[{word + 1 + d}];" for d in range(p.rank)]
        reads += [f"      stride{i}_{d} = words[{word + 1 + p.rank + d}];" for d in range(p.rank)]
        word += 1 + 2 * p.rank
    return [*lines, "    explicit Params(const int64_t* words) {", *reads, "      (void)words;", "    }", "  };"]


INLINE = "__attribute__((always_inline))"


def _bound(program: Program, hook: str, arguments: str, identity: str) -> list[str]:
    root = getattr(program, hook)
    head = [
        f"  template <class At> static FL_INLINE auto bind_{hook}(const At& at, const Params& p) {{",
        "    (void)at, (void)p;",
    ]
    parameters = ", ".join(f"auto {a}" for a in arguments.split(", "))
    unused = "".join(f" (void){a};" for a in arguments.split(", "))
    if root is None:
        return [*head, f"    return [=]({parameters}) {INLINE} {{{unused} return {identity}; }};", "  }"]
    writer = _Writer(program, "at")
    inner = _depends(root, {"kv_pos", "logits"})
    outer = set(topological(root)) - inner
    body = writer.write((root,), "    ", outer)
    own = {name: name for name in ("kv_pos", "logits")}
    lambda_lines = writer.write((root,), "      ", None, own)
    result = writer.names[root] if hook == "mask" else f"splat({writer.names[root]})"
    return [
        *head,
        *body,
        f"    return [=]({parameters}) {INLINE} {{",
        f"     {unused}",
        *lambda_lines,
        f"      return {result};",
        "    };",
        "  }",
    ]


def _cap(program: Program) -> list[str]:
    """The factors of logits that are outside * tanh(inside * logits), for kernels that compute those themselves."""
    lines: list[str] = []
    for name, factor in zip(("outside", "inside"), cap(program) or ()):
        writer = _Writer(program, "at")
        body = writer.write((factor,), "    ")
        lines += [
            f"  static FL_INLINE float cap_{name}(const Params& p) {{",
            "    (void)p;",
            *body,
            f"    return {writer.names[factor]};",
            "  }",
        ]
    return lines


def _vector(program: Program, hook: str, size: int) -> list[str]:
    root = getattr(program, hook)
    arguments = "float* x, float lse" if hook == "output" else "const float* x, float* y"
    head = (
        f"  template <class At> static FL_INLINE void transform_{hook}({arguments}, const At& at, const Params& p) {{"
    )
    target = "x" if hook == "output" else "y"
    unused = "    (void)at, (void)p, (void)x" + (", (void)lse;" if hook == "output" else ", (void)y;")
    if root is None:
        return [head, unused, "  }"]
    writer = _Writer(program, "at")
    inner = _depends(root, {"dim", "out"})
    own = {"dim": "dim", "out": "loadu(x + d)", "lse": "lse"}
    body = writer.write((root,), "    ", set(topological(root)) - inner, own)
    loop = writer.write((root,), "      ", None, own)
    return [
        head, unused, f"    constexpr int32_t kRow = {size};", "    (void)kRow;", *body,
        "    for (int32_t d = 0; d < kRow; d += VL) {",
        "      const vi dim = add(iota(), d);", "      (void)dim;", *loop,
        f"      storeu({target} + d, splat({writer.names[root]}));", "    }", "  }",
    ]  # fmt: skip


def _verdict(program: Program) -> list[str]:
    every, some = ranges.verdict(program)
    writer = _Writer(program, "t")
    body = writer.write((some, every), "    ")
    return [
        "  // 0: no pair of the tile is kept, 2: all are, 1: look",
        "  static inline int verdict(const Tile& t, const Params& p) {",
        "    (void)t, (void)p;",
        *body,
        f"    return {writer.names[every]} ? 2 : {writer.names[some]} ? 1 : 0;",
        "  }",
    ]

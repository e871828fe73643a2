"""tanh for soft caps, on the cheap where it can be: logits mostly lie well within their cap.

A special function for every element is what a tile cannot afford: they run at an eighth of the rate. So all elements
of a thread go through a polynomial, good to 7e-7 (relative, with float32's own rounding) up to |x| = LIMIT, unless any
lane of the warp holds a larger one; then all of them are computed by exponentials, good to 3e-7 of the cap. One vote
decides for all of a thread's elements: a branch per few of them would stop the flow of instructions as often.
"""

import struct

from flashloom.attention.kernels.hopper.gluon import gl, jit

_LIMIT = 0.5
LIMIT = gl.constexpr(_LIMIT)
# tanh(z * LIMIT / 2) = z * (c0 + v * (c1 + ...)) with v = z * z <= 4, of least relative error
COEFFICIENTS = (0.24999986588954926, -0.00520723732188344, 0.00012881148722954094, -2.7100968509330414e-06)


def _number(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex().upper()


def _assembly(n: int) -> str:
    """PTX for the n elements of a thread: $0 to $n-1 become tanh(z * LIMIT / 2) of $n to $2n-1."""
    each, z = range(n), [f"${n + i}" for i in range(n)]
    lines = [f".reg .b32 y<{n}>, v<{n}>, o;", ".reg .pred p, q;"]
    lines.append(f"or.b32 o, {z[0]}, {z[1]};")  # bit 30 of a float: it is 2 or more, or not a number
    lines += [f"lop3.b32 o, o, {z[i]}, {z[i + 1]}, 0xFE;" for i in range(2, n, 2)]
    lines += ["and.b32 o, o, 0x40000000;", "setp.ne.b32 p, o, 0;", "vote.sync.any.pred q, p, 0xffffffff;"]
    lines.append("@q bra.uni BEYOND;")
    lines += [f"mul.f32 v{i}, {z[i]}, {z[i]};" for i in each]
    lines += [f"mov.b32 y{i}, {_number(COEFFICIENTS[-1])};" for i in each]
    for c in COEFFICIENTS[-2::-1]:
        lines += [f"fma.rn.f32 y{i}, y{i}, v{i}, {_number(c)};" for i in each]
    lines += [f"mul.f32 y{i}, y{i}, {z[i]};" for i in each]
    lines += ["bra.uni DONE;", "BEYOND:"]  # 1 - 2 / (exp(2 x) + 1)
    for i in each:
        lines += [
            f"mul.f32 y{i}, {z[i]}, {_number(_LIMIT * 1.4426950408889634)};", f"ex2.approx.ftz.f32 y{i}, y{i};",
            f"add.f32 y{i}, y{i}, 0f3F800000;", f"rcp.approx.ftz.f32 y{i}, y{i};",
            f"fma.rn.f32 y{i}, y{i}, 0fC0000000, 0f3F800000;",
        ]  # fmt: skip
    lines.append("DONE:")
    lines += [f"mov.b32 ${i}, y{i};" for i in each]
    return "{ " + "\n".join(lines) + " }"


def _registers(n: int) -> str:
    return ",".join(["=r"] * n + ["r"] * n)


_TEXT_16, _TEXT_32, _TEXT_64 = gl.constexpr(_assembly(16)), gl.constexpr(_assembly(32)), gl.constexpr(_assembly(64))
_NAMES_16, _NAMES_32, _NAMES_64 = (
    gl.constexpr(_registers(16)),
    gl.constexpr(_registers(32)),
    gl.constexpr(_registers(64)),
)


@jit
def capped(z):
    """tanh(z * LIMIT / 2) of a block [64, 32, 64 or 128] of four warps."""
    if z.shape[1] == 32:
        return gl.inline_asm_elementwise(_TEXT_16, _NAMES_16, [z], dtype=gl.float32, is_pure=False, pack=16)
    elif z.shape[1] == 64:
        return gl.inline_asm_elementwise(_TEXT_32, _NAMES_32, [z], dtype=gl.float32, is_pure=False, pack=32)
    else:
        gl.static_assert(z.shape[1] == 128)
        return gl.inline_asm_elementwise(_TEXT_64, _NAMES_64, [z], dtype=gl.float32, is_pure=False, pack=64)

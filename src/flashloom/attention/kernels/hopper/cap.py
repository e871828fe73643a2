"""tanh for soft caps, on the cheap where it can be: logits mostly lie well within their cap.

Eight elements at a time go through a polynomial that is good to 1.7e-7 (relative, with float32's own rounding) up to
|x| = 1; if any lane of the warp holds a larger one, those are computed by exponentials. A special function for every
element is what a tile cannot afford: they run at an eighth of the rate.
"""

import struct

from flashloom.attention.kernels.hopper.gluon import gl, jit

GROUP = gl.constexpr(8)
# tanh(z / 2) = z * (1/2 + v * (c0 + v * (c1 + ...))) with v = z * z <= 4, by a weighted least-squares fit
COEFFICIENTS = (-0.04166623204946518, 0.004164502955973148, -0.0004179587122052908, 3.976518564741127e-05,
                -3.056325567740714e-06, 1.2918340530632122e-07)  # fmt: skip


def _assembly(n: int) -> str:
    """PTX for n elements: $0 to $n-1 become tanh(z / 2) of $n to $2n-1."""

    def number(x: float) -> str:
        return "0f" + struct.pack(">f", x).hex().upper()

    lines = [f".reg .b32 y<{n}>, v<{n}>, o, e, a;", ".reg .pred p, q;"]
    z = [f"${n + i}" for i in range(n)]
    each = range(n)
    lines += [f"mul.f32 v{i}, {z[i]}, {z[i]};" for i in each]
    lines += [f"mov.b32 y{i}, {number(COEFFICIENTS[-1])};" for i in each]
    for c in (*COEFFICIENTS[-2::-1], 0.5):
        lines += [f"fma.rn.f32 y{i}, y{i}, v{i}, {number(c)};" for i in each]
    lines += [f"mul.f32 y{i}, y{i}, {z[i]};" for i in each]
    lines.append(f"or.b32 o, {z[0]}, {z[1]};")  # bit 30 of a float: it is 2 or more, or not a number
    lines += [f"lop3.b32 o, o, {z[i]}, {z[i + 1]}, 0xFE;" for i in range(2, n, 2)]
    lines += ["and.b32 o, o, 0x40000000;", "setp.ne.b32 p, o, 0;", "vote.sync.any.pred q, p, 0xffffffff;"]
    lines.append("@!q bra.uni DONE;")
    for i in each:
        lines += [
            f"abs.f32 a, {z[i]};", "setp.ge.f32 p, a, 0f40000000;", f"mul.f32 e, a, {number(1.4426950408889634)};",
            "ex2.approx.ftz.f32 e, e;", "add.f32 e, e, 0f3F800000;", "rcp.approx.ftz.f32 e, e;",
            "fma.rn.f32 e, e, 0fC0000000, 0f3F800000;", f"copysign.f32 e, {z[i]}, e;", f"selp.b32 y{i}, e, y{i}, p;",
        ]  # fmt: skip
    lines.append("DONE:")
    lines += [f"mov.b32 ${i}, y{i};" for i in each]
    return "{ " + "\n".join(lines) + " }"


_TEXT = gl.constexpr(_assembly(GROUP.value))
_REGISTERS = gl.constexpr(",".join(["=r"] * GROUP.value + ["r"] * GROUP.value))


@jit
def tanh_of_half(z):
    """tanh(z / 2) of a block whose threads hold a multiple of eight elements."""
    return gl.inline_asm_elementwise(_TEXT, _REGISTERS, [z], dtype=gl.float32, is_pure=False, pack=GROUP)

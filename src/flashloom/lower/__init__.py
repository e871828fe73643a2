"""Lowerings of the expression IR: one text table per language. Torch is the interpreter and the definition."""

from __future__ import annotations

from flashloom.variant.expr import Program

LANGUAGES = ("torch", "cpp", "triton", "gluon")


def explain(program: Program, language: str, dim: int, value_dim: int) -> str:
    """The source generated for a program. Gluon kernels call the Triton functions; torch shows the expressions that the
    interpreter walks."""
    program = program.specialise(dim, value_dim)
    if language == "torch":
        return "\n".join(
            [*(f"{hook} = {root!r}" for hook, root in program.hooks.items()), f"softmax = {program.softmax}", ""]
        )
    if language == "cpp":
        from flashloom.lower import cpp

        return cpp.render(program, dim, value_dim)
    if language in ("triton", "gluon"):
        from flashloom.lower import triton

        return triton.render(program)
    raise ValueError(f"language {language!r} is not known: use one of {', '.join(LANGUAGES)}")

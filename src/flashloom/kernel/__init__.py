"""How source becomes something that can be called: toolchains on top of the store."""

from flashloom.kernel.cpp import CompileError, NoCompiler

__all__ = ["CompileError", "NoCompiler"]

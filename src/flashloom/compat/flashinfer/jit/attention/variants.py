"""Texts for jit_args: they name variants that flashloom has, and are no CUDA."""

from flashloom.compat.flashinfer._jit import SINK_TEXT

attention_sink_fa2_decl = attention_sink_fa3_decl = SINK_TEXT
attention_sink_decl = {"fa2": SINK_TEXT, "fa3": SINK_TEXT}

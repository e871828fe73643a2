"""Attention for Hopper in Gluon: warp-specialised, with the tensor memory accelerator and warpgroup products."""

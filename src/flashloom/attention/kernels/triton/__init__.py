"""Triton attention kernels as plain files: every NVIDIA GPU from sm_80 on, and the interpreter."""

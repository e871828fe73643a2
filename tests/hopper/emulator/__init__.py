"""Gluon kernels on a machine without a GPU: their Python is run as it stands, on emulated parts of a Hopper GPU.

`machine` interleaves the warps of all programs at random and keeps barriers, tensor memory copies and asynchronous
products as the hardware does: late, in any order, and with what they overwrite poisoned meanwhile. `language` stands
for `gluon.language`. What is not modelled: layouts, registers, and races between the threads of one warpgroup. So it
answers whether a kernel's logic and synchronisation are right, not whether it compiles, and not how fast it is.
"""

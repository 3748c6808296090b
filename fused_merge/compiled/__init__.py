"""Compiled code for the CPU: the eager equations block by block, in loops that numba compiles, with the same bits.

numba compiles one form for all options and dtypes, in some seconds, and keeps it on disk. Why not `torch.compile`: what
Inductor made of the eager step took 1.25 to 1.3 times as long as torch's fused AdamW for large dense tensors, and 33
to 38 times with masks or ranks. It compiles each form anew, runs eager code without a word after eight of them, and
needs a C++ compiler.
"""

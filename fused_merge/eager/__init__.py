"""The truth: each equation of the library in plain PyTorch, one file per subject.

The Triton kernels of the same names are compared with these functions, on every output and bit for bit. What
is written here is meant to be read beside the papers:

- `adamw`          Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101)
- `philox`         Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011)
- `sparsify`, `consensus`, `merging_adamw`
                   Lu et al., "Online Merging Optimizers for Boosting Rewards and Mitigating Tax in Alignment"
                   (arXiv 2405.17931)
- `interpolate`    Lin et al., "Mitigating the Alignment Tax of RLHF" (arXiv 2309.06256)
"""

"""Merge language models while they train, or along a line between two checkpoints.

- `OnDAREAdamW`, `OnTIESAdamW`, `OnProjAdamW`, `MergingAdamW`: AdamW whose every update is merged with the reference
  delta of supervised fine-tuning (Lu et al. 2024, arXiv 2405.17931).
- `ReferenceDelta`: that delta, from models or checkpoints, dense or sparse.
- `interpolate`, `RatioSweep`, `interpolate_checkpoints`: many points of the line between two models in one read
  (Lin et al. 2024, arXiv 2309.06256).
- `functional`: the same without classes.

Importing this package imports torch, numpy and safetensors; Triton is imported when a kernel first runs.
"""

from fused_merge import functional
from fused_merge._version import __version__
from fused_merge.checkpoints import interpolate_checkpoints
from fused_merge.interpolation import RatioSweep, interpolate
from fused_merge.optimizers import MergingAdamW, OnDAREAdamW, OnProjAdamW, OnTIESAdamW
from fused_merge.reference_delta import ReferenceDelta
from fused_merge.verify import verify

__all__ = [
    "MergingAdamW",
    "OnDAREAdamW",
    "OnProjAdamW",
    "OnTIESAdamW",
    "RatioSweep",
    "ReferenceDelta",
    "__version__",
    "functional",
    "interpolate",
    "interpolate_checkpoints",
    "verify",
]

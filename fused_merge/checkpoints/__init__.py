"""Whole checkpoints: model folders of many ratios, streamed from disk to disk."""

from fused_merge.checkpoints.folders import verify_checkpoint
from fused_merge.checkpoints.interpolate import interpolate_checkpoints, plan_interpolation
from fused_merge.checkpoints.job import Job

__all__ = [
    "Job",
    "interpolate_checkpoints",
    "plan_interpolation",
    "verify_checkpoint",
]

"""Several finished models merged into one, streamed from disk to disk."""

from fused_merge.merge.merge import merge_checkpoints, plan_merge, plan_mergekit

__all__ = ["merge_checkpoints", "plan_merge", "plan_mergekit"]

"""The multi-tensor forms, for frameworks that keep their own parameters: one launch or one eager loop, nothing kept."""

from fused_merge.eager.merge_stats import MergeStats
from fused_merge.eager.merging_adamw import Anchor
from fused_merge.eager.operands import Operands
from fused_merge.eager.scalars import Hyper
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.functional.inner_products import inner_products
from fused_merge.functional.interpolate import interpolate
from fused_merge.functional.merging_adamw import merging_adamw_, step_
from fused_merge.functional.sparsify import sparsify
from fused_merge.functional.workspace import Workspace
from fused_merge.methods import MergeRule, merge_rule

__all__ = [
    "Anchor",
    "Hyper",
    "MergeRule",
    "MergeStats",
    "Operands",
    "Shard",
    "ShardIndex",
    "Workspace",
    "inner_products",
    "interpolate",
    "merge_rule",
    "merging_adamw_",
    "sparsify",
    "step_",
]

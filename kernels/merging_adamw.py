"""theta += F(u) ⊕ F(tau) inside one AdamW step, for many tensors in one launch.

    g, m, v, theta, tau -> fp32
    g projected onto tau;  m = b1*m + (1 - b1)*g;  v = b2*v + (1 - b2)*g^2
    u = -(lr/bc1)*m / (sqrt(v)/sqrt(bc2) + eps);  u projected onto tau
    theta = theta*(1 - lr*wd) + (F(u) ⊕ F(tau))     rounded once

Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1. The equations: `fused_merge/eager/merging_adamw.py`.

Bytes per element, all fp32: reads theta 4, g 4, m 4, v 4; writes theta 4, m 4, v 4: 28.

- tau adds 4 (fp32) or 2 (bf16, fp16) when dense; stored sparse 1/8 + 4/1024 and 2 or 4 for each kept value.
- Where few elements are kept and nothing decays, theta is read and written only in groups of eight neighbors that
  hold one: of its 8 bytes 1.2 remain at p = 0.01 for u and for tau.
- Random masks cost arithmetic and no bytes.
- Ranked F: a first pass reads g, m, v and writes m, v, a bit, and a list of what lies near the last threshold (20 1/8
  and less than 1/8); four rounds read the list; the step reads the bits and, of m and v, the groups that hold a marked
  element, and touches theta as above. Where the last threshold tells nothing, each round and the step read m and v
  whole, 8. With 16-bit moments, step-K or statistics the passes read g, m and v instead, and the step is a whole one.
- Projection over tensors: one pass more over g and tau (over g, m, v and tau for the update). Over rows: nothing,
  since a program that owns a row finds it in the cache again.
- Step-K: the anchor is read and written at merges, and only then is tau read.
- After another optimizer's step: reads theta 4, anchor 4 and tau, writes theta 4 and the next anchor 4; between merges
  nothing. Where every step is merged no anchor is written, and one was made before the step: reads 4, writes 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import kth_largest, layout, memory, merge_stats, projection, scalars, step
from fused_merge.kernels.kth_largest import SEARCH, SEARCH_COLUMNS
from fused_merge.kernels.layout import ENTRY, Block


@triton.jit
def merging_adamw_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, and block or row
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    coefficients_ptr,  # fp32 [T or rows, 2]
    thresholds_ptr,  # int32 [T]: patterns of the k-th largest
    search_ptr,  # int64 [T, 4]: `kth_largest.SearchEntry`
    mark_bits_ptr,  # int32: a bit an element
    products_ptr,  # fp32 [blocks, 4], written where statistics are collected
    counts_ptr,  # int64 [T, 6], the same
    SPEC: tl.constexpr,
):
    """The step; one program a block of elements, or a row."""
    index, number, tensor_ptr, own_scalars_ptr = layout.locate(programs_ptr, tensors_ptr, scalars_ptr)
    if SPEC.ROW_PROGRAMS:
        if scalars.works(own_scalars_ptr, SPEC):
            along = projection.row_products(tensor_ptr, own_scalars_ptr, number, SPEC)
            for block in range(0, tl.cdiv(tl.load(tensor_ptr + ENTRY.row_length), SPEC.BLOCK)):
                base, inside = projection.block_of_row(tensor_ptr, number, block * SPEC.BLOCK, SPEC)
                b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
                step.step_block(b, along, 0, (0, 0), SPEC)
    else:
        base, inside = layout.block_of_tensor(tensor_ptr, number, SPEC)
        b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
        kth = 0
        if SPEC.RANKED:
            kth = tl.load(thresholds_ptr + index)
        if SPEC.RESUMES:
            if scalars.merges(b.scalars_ptr, SPEC):
                words = kth_largest.first_word(b.tensor_ptr, SPEC.BLOCK) + number * (SPEC.BLOCK // 32)
                marks = memory.load_bits(mark_bits_ptr + words, SPEC.BLOCK)
                # Where the threshold was sought among all elements, what is kept may have no mark.
                listed = tl.load(search_ptr + index * SEARCH_COLUMNS + SEARCH.listed)
                marks |= (listed < 0).to(tl.int32)
                step.resume_block(b, projection.coefficients(b, coefficients_ptr, SPEC), kth, marks, SPEC)
        elif scalars.works(b.scalars_ptr, SPEC):
            block = tl.load(b.tensor_ptr + ENTRY.first_block) + number
            sums_ptr = products_ptr + block * merge_stats.PRODUCTS, counts_ptr + index * merge_stats.COUNTS
            step.step_block(b, projection.coefficients(b, coefficients_ptr, SPEC), kth, sums_ptr, SPEC)

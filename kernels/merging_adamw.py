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
- Ranked F: a first pass reads g, m, v and writes m, v, a bit, and a list of u of what may be kept, 4 for each (20 1/8
  and some 1/20 at p = 0.01); up to four rounds read the list; the last pass reads the bits, those of tau, u of the list
  and kept values of tau, and of theta the sectors that hold something kept.
- Where theta decays the last pass reads and writes all of it, and of m and v the groups of eight that hold a marked
  element. Where the last threshold tells nothing, each round and the last pass read m and v whole, 8. With 16-bit
  moments, step-K or statistics the passes read g, m and v instead, and the step is a whole one.
- Projection over tensors: one pass more over g and tau (over g, m, v and tau for the update). Over rows: nothing,
  since a program that owns a row finds it in the cache again.
- Step-K: the anchor is read and written at merges, and only then is tau read.
- After another optimizer's step: reads theta 4, anchor 4 and tau, writes theta 4 and the next anchor 4; between merges
  nothing. Where every step is merged no anchor is written, and one was made before the step: reads 4, writes 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import kth_largest, layout, memory, merge_stats, operands, projection, scalars, sparse, step
from fused_merge.kernels.kth_largest import SEARCH, SEARCH_COLUMNS
from fused_merge.kernels.layout import ENTRY, SCALAR, Block

# Blocks that a program walks at once: a word of 32 elements for each of its threads.
WALK_BLOCKS = tl.constexpr(4)


@triton.jit
def walks(scalars_ptr, own_search_ptr, SPEC: tl.constexpr):
    """Whether what is kept of u is listed, and nothing but what is kept changes."""
    listed = tl.load(own_search_ptr + SEARCH.listed)
    return scalars.merges(scalars_ptr, SPEC) & (listed >= 0) & (tl.load(scalars_ptr + SCALAR.decay) == 1.0)


@triton.jit
def merging_adamw_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, and block, row, or group of blocks where lists are walked
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
    elif SPEC.RESUMES:
        own_search_ptr = search_ptr + index * SEARCH_COLUMNS
        resumes = scalars.merges(own_scalars_ptr, SPEC)
        if SPEC.WALKS:
            resumes = resumes & (walks(own_scalars_ptr, own_search_ptr, SPEC) == 0)
        if resumes:
            kth = tl.load(thresholds_ptr + index)
            # Where the threshold was sought among all elements, what is kept may have no mark.
            every = (tl.load(own_search_ptr + SEARCH.listed) < 0).to(tl.int32)
            first, end = number, number + 1
            if SPEC.WALKS:
                first, end = kth_largest.blocks_of_group(tensor_ptr, number, SPEC)
            for block in range(first, end):
                base, inside = layout.block_of_tensor(tensor_ptr, block, SPEC)
                b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
                words = kth_largest.first_word(tensor_ptr, SPEC.BLOCK) + block * (SPEC.BLOCK // 32)
                marks = memory.load_bits(mark_bits_ptr + words, SPEC.BLOCK) | every
                step.resume_block(b, projection.coefficients(b, coefficients_ptr, SPEC), kth, marks, SPEC)
    else:
        base, inside = layout.block_of_tensor(tensor_ptr, number, SPEC)
        b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
        kth = 0
        if SPEC.RANKED:
            kth = tl.load(thresholds_ptr + index)
        if scalars.works(b.scalars_ptr, SPEC):
            block = tl.load(b.tensor_ptr + ENTRY.first_block) + number
            sums_ptr = products_ptr + block * merge_stats.PRODUCTS, counts_ptr + index * merge_stats.COUNTS
            step.step_block(b, projection.coefficients(b, coefficients_ptr, SPEC), kth, sums_ptr, SPEC)


@triton.jit
def walk_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, group of WALK_BLOCKS blocks
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    thresholds_ptr,  # int32 [T]: patterns of the k-th largest
    search_ptr,  # int64 [T, 4]: `kth_largest.SearchEntry`
    mark_bits_ptr,  # int32: a bit an element
    firsts_ptr,  # int64 [blocks]: where in the list of its tensor the marked elements of a block begin
    list_ptr,  # fp32: u of marked elements, a list for each tensor
    SPEC: tl.constexpr,
):
    """The rest of a step where little is kept and all of that is listed: each lane walks the bits of a word.

    Both u and tau are `SparseTensor`s here, but for blocks of another size and lists in another order.
    """
    LANES: tl.constexpr = SPEC.BLOCK * WALK_BLOCKS // 32
    index, group, tensor_ptr, own_scalars_ptr = layout.locate(programs_ptr, tensors_ptr, scalars_ptr)
    if walks(own_scalars_ptr, search_ptr + index * SEARCH_COLUMNS, SPEC):
        kth = tl.load(thresholds_ptr + index)
        word = group * LANES + tl.arange(0, LANES)
        inside = word < tl.cdiv(tl.load(tensor_ptr + ENTRY.numel), 32)
        own_bits_ptr = mark_bits_ptr + kth_largest.first_word(tensor_ptr, SPEC.BLOCK)
        u_bits = tl.load(own_bits_ptr + word, mask=inside, other=0)
        tau_bits = tl.load(tl.load(tensor_ptr + ENTRY.tau).to(tl.pointer_type(tl.int32)) + word, mask=inside, other=0)

        own_firsts_ptr = firsts_ptr + tl.load(tensor_ptr + ENTRY.first_block)
        u_ptr = list_ptr + tl.load(tensor_ptr + ENTRY.first_listed)
        u_ptr += tl.load(own_firsts_ptr + word // (SPEC.BLOCK // 32), mask=inside, other=0)
        u_ptr += sparse.bits_before(u_bits, SPEC.BLOCK // 32)
        offsets_ptr = tl.load(tensor_ptr + ENTRY.tau_offsets).to(tl.pointer_type(tl.int32))
        tau_ptr = tl.load(tensor_ptr + ENTRY.tau_values).to(tl.pointer_type(SPEC.TAU))
        tau_ptr += tl.load(offsets_ptr + word // sparse.WORDS, mask=inside, other=0)
        tau_ptr += sparse.bits_before(tau_bits, sparse.WORDS)

        left = u_bits | tau_bits
        for _ in range(tl.max(sparse.popcount(left))):
            bit = left & -left  # the lowest that is left
            u_listed, tau_kept = (u_bits & bit) != 0, (tau_bits & bit) != 0
            element = word * 32 + sparse.popcount(bit - 1)
            b = Block(tensor_ptr, own_scalars_ptr, element, left != 0)
            u = tl.load(u_ptr, mask=u_listed, other=0.0)
            tau = tl.load(tau_ptr, mask=tau_kept, other=0.0).to(tl.float32)
            theta = operands.load_weight(b, SPEC)
            merged = step.merge(b, step.sparsified(b, u, kth, SPEC), tau, SPEC)
            touched = Block(tensor_ptr, own_scalars_ptr, element, (left != 0) & (merged != 0))
            operands.store_weight(touched, theta, merged, SPEC)
            u_ptr += u_listed.to(tl.int32)
            tau_ptr += tau_kept.to(tl.int32)
            left ^= bit

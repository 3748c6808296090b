"""What describes many tensors to one launch: a table of tensors and a table of programs, kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from fused_merge.kernels import INTERPRETED

Kept = TypeVar("Kept")

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

NUM_WARPS = 4
# Eight elements a thread: 128-bit accesses of 16-bit types, with 32 threads a warp and, on AMD, 64. The
# interpreter pays by the operation and not by the element.
DEFAULT_BLOCK = 16384 if INTERPRETED else 8 * NUM_WARPS * (64 if torch.version.hip else 32)

# Global loads and stores are 128 bits wide where every pointer is a multiple of this.
ALIGNMENT = 16


def chunk_count(numel: int, block: int) -> int:
    """Return how many chunks of `block` elements a tensor takes, at least one."""
    return max(1, -(-numel // block))


@lru_cache(maxsize=32)
def program_table(numels: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return int32 `[programs, 2]`: the tensor and the chunk of `block` elements that each program works on.

    Every tensor has a chunk, if only an empty one. Tables are kept: shapes outlive addresses. Read only.
    """
    chunks = torch.tensor([chunk_count(numel, block) for numel in numels])
    tensor = torch.repeat_interleave(torch.arange(len(numels)), chunks)
    first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    chunk = torch.arange(len(tensor)) - first
    return torch.stack((tensor, chunk), dim=1).to(torch.int32).contiguous().to(device, non_blocking=True)


def is_aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether every tensor allows 128-bit accesses."""
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors if tensor is not None)


def capturing() -> bool:
    """Return whether the current stream captures a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Remembered(Generic[Kept]):
    """What was made for something, until it is asked for something else; what a CUDA graph captured stays alive."""

    def __init__(self) -> None:
        self._made_for: Any = None
        self._made: Kept | None = None
        self._captured: list[Kept] = []

    def get(self, made_for: Any, make: Callable[[], Kept]) -> Kept:
        """Return what `make` has made for this, or makes now.

        Raises:
            RuntimeError: if it must be made while a CUDA graph is captured, since tables are copied from the host.
        """
        if self._made is None or made_for != self._made_for:
            if capturing():
                raise RuntimeError(
                    "a CUDA graph can only capture a step of tensors and options that have taken one before: take it "
                    "first, and keep the gradients where they are (zero_grad(set_to_none=False))"
                )
            self._made, self._made_for = make(), made_for
        if capturing():
            self._captured.append(self._made)
        return self._made

"""The Triton kernels, the only folder of the project that imports triton.

A file with the name of an eager file (`fused_merge/eager/X.py`) holds its equations as functions on loaded values.
`step` puts those of a step together, `merging_adamw`, `projection` and `kth_largest` make kernels of it and `launch`
launches them. `layout` is what they know of tensors and programs, `memory` loads and stores blocks, `operands` those
of a step.
"""

from __future__ import annotations

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret


def why_unusable(device: torch.device) -> str | None:
    """Return in one sentence why no kernel can run on `device`, or None where they can."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return (
            f"Triton drives no {device.type} device; use impl='eager', or set TRITON_INTERPRET=1 before triton is "
            "first imported to run the kernels in its interpreter"
        )
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        return f"Triton finds no driver ({error}); use impl='eager'"
    return None

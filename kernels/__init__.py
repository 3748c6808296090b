"""The Triton kernels, the only folder of the project that imports triton.

Each file has the name of the eager file whose equations it fuses (`fused_merge/eager/X.py`) and is compared
with it bit for bit (`tests/test_X.py`). `device` holds the small functions on loaded values that kernels
share, `tables` what describes many tensors to one launch.
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

"""One device for the whole run: a GPU where there is one, else the CPU with Triton's interpreter."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

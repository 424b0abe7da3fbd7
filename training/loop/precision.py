"""Number formats of the networks' products."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; elsewhere it is emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Matrix products and convolutions of that precision where the device computes with it, else float32."""
    lower = precision == "bfloat16" and computes_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)

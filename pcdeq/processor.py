"""What the processor is good at: which of several kernels is the fastest depends on it.

Measured on a Xeon with AMX, a Zen 4 (AVX-512) and a Zen 3 (AVX2): torch's AVX-512 kernels of tanh
and log1p in float32 are slow on an AMD, and on an Intel they are not; nor are its AVX2 kernels. Its
tanh in bfloat16 is slow with AVX-512, and not with AVX2.
"""

from pathlib import Path

import torch


def _is_amd() -> bool:
    """Whether Linux names AMD as the maker of the processor."""
    try:
        with Path("/proc/cpuinfo").open() as processors:
            return "AuthenticAMD" in processors.read(200)  # the first of maybe hundreds
    except OSError:  # another system
        return False


def _has_bfloat16() -> bool:
    """Whether oneDNN, torch's library of products, has kernels in bfloat16 for this processor."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
AMD_AVX512 = AVX512 and _is_amd()
BFLOAT16 = _has_bfloat16()

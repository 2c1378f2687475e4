"""Which processor this is: the fastest of several kernels depends on its maker.

On AMD's processors torch's tanh and log1p in float32 are slow, on Intel's they are not (measured on
a Zen 4 and on a Xeon with AMX).
"""

from pathlib import Path


def _is_amd() -> bool:
    """Whether Linux names AMD as the maker of the processor."""
    try:
        with Path("/proc/cpuinfo").open() as processors:
            return "AuthenticAMD" in processors.read(200)  # the first of maybe hundreds
    except OSError:  # another system
        return False


AMD = _is_amd()

"""The most memory that this process holds, since it was last asked to forget."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"  # Linux: the high-water mark goes back to what is held now; see proc(5)


def forget_peak(device: torch.device) -> bool:
    """Let the peak begin anew at what is held now; False where that cannot be done, and the peak only grows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    # What Python has freed, malloc may keep: glibc is asked to return it, else the next peak hides below it.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        gc.collect()
        trim(0)
    try:
        _FORGET.write_text(_PEAK)
    except OSError:  # not Linux, or not permitted
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The most that was held: on a GPU what torch allocated there, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, the others kilobytes

"""The machine that a measurement was made on, and how much of its memory this process holds.

What a system does not tell is None.
"""

import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """`cpu` (its name), `logical_cores`, `memory_bytes` (the container's limit where that is less) and `system`."""
    memory = None
    with suppress(ImportError, AttributeError, ValueError, OSError):  # not on Windows
        from phi3_mlflow.runtime.decoders.kv import machine_memory

        memory = machine_memory()
    return {
        "cpu": _cpu() or platform.processor() or platform.machine(),
        "logical_cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.system(),
    }


def line(found: Mapping[str, Any] | None = None) -> str:
    """What `machine` found, in a line."""
    found = found or machine()
    memory = f", {found['memory_bytes'] / 2**30:.0f} GiB" if found["memory_bytes"] else ""
    return f"{found['cpu']}, {found['logical_cores']} logical cores{memory}, {found['system']}"


def resident() -> int | None:
    """Bytes of memory that this process holds now."""
    kilobytes = _status("VmRSS")
    return None if kilobytes is None else kilobytes * 1024


def peak() -> int | None:
    """The most bytes of memory that this process held since `forget_peak`; since its start where that did nothing."""
    if (kilobytes := _status("VmHWM")) is not None:
        return kilobytes * 1024
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    """Lets `peak` begin anew, on Linux; elsewhere it does nothing."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # man 5 proc


def _cpu() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def _status(name: str) -> int | None:
    """A number from Linux's /proc/self/status."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return None

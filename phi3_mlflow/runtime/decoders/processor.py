"""What this machine's processor can do that decides which decoder is the faster one."""

import re
from pathlib import Path


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies 8-bit integers in one instruction (AVX512-VNNI or AVX-VNNI).

    OpenVINO computes with 8-bit activations where it does, and with floats elsewhere, which is slower than what
    onnxruntime does there.

    Args:
        cpuinfo: where Linux says it; on other systems the answer is no.
    """
    try:
        text = cpuinfo.read_text("utf-8", "replace")
    except OSError:
        return False
    return re.search(r"^flags\s*:.*\b(avx512_vnni|avx_vnni)\b", text, re.MULTILINE) is not None


# Decoder.cost of onnxruntime's int4 products. At full size on two cores one token takes 83 ms, and 16 take 480; on a
# processor without VNNI 96 and 760.
ONNXRUNTIME_COST = 0.3 if has_vnni() else 0.46

"""The kernel author's bench: is an implementation right, how far is it from the roofline, what does the compiler make of it.

    check("rms_norm", "mine", file="my_kernel.py")     against the fp64 formula, with poisoned memory around every tensor
    bench("rms_norm", model="Qwen/Qwen3-8B")           time and share of this device's measured roofline
    compile("rms_norm")                                ahead of time for sm_80, sm_90, gfx942, without a GPU
    tune("rms_norm")                                   search launch parameters on the GPU at hand

The same from a shell: qwen-ref kernels list | check | bench | compile | tune.
"""

from .check import check
from .compile import compile
from .measure import bench
from .tune import tune

__all__ = ["bench", "check", "compile", "tune"]

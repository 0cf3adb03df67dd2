"""What every operation is tried on: awkward inputs for the check, a model's own for the bench, and what a call must cost.

All tensors of a case are drawn from a seed. Bytes count what must be read once and written once.
"""

from __future__ import annotations

from ...errors import RequestError
from . import attention, delta, dual_chunk, linear, moe, norms, packed, rotary, streams, tokens
from .common import Case, Cost, Draw, Subject, as_tuple

__all__ = ["SUBJECTS", "Case", "Cost", "Draw", "Subject", "as_tuple", "subject"]

SUBJECTS = {
    found.formula.__name__: found
    for found in (
        linear.LINEAR,
        norms.RMS_NORM,
        norms.ADD_RMS_NORM,
        norms.SWIGLU,
        norms.SIGMOID_GATE,
        norms.TAKE_COLUMNS,
        norms.ZERO_CENTRED_RMS_NORM,
        norms.GATED_RMS_NORM,
        rotary.ROPE,
        rotary.NORM_ROPE_WRITE,
        attention.ATTENTION,
        attention.ATTENTION_PREFILL,
        attention.ATTENTION_DECODE,
        attention.ATTENTION_PAGED,
        dual_chunk.DUAL_CHUNK_ATTENTION,
        delta.CAUSAL_CONV1D,
        delta.GATED_DELTA_RULE,
        delta.GATED_DELTA_STEP,
        streams.BLOCK_SCORES,
        streams.SPARSE_BLOCK_ATTENTION,
        streams.STREAM_MIX,
        streams.STREAM_WRITE,
        moe.ROUTER_TOPK,
        moe.MOE_EXPERTS,
        tokens.SAMPLE,
        tokens.CROSS_ENTROPY,
        *packed.SUBJECTS,
    )
}


def subject(operation: str) -> Subject:
    if operation not in SUBJECTS:
        raise RequestError(f"the bench has no inputs for {operation!r}; it has {list(SUBJECTS)}")
    return SUBJECTS[operation]

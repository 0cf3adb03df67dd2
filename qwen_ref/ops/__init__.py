"""Every formula of the models as a pure function of tensors.

These are the reference: any dtype, any device, no state, and no in-place work on an argument (but for the caches that
`norm_rope_write` is given to write to, and the state of `gated_delta_step`). Each rounds where the official model rounds,
and the comment beside the cast says so. Faster implementations are registered in `backend` under the same name and are
checked against these.

Letters: B batch, T query tokens, S key tokens, H hidden, N query heads, K kv heads, D head dim, I intermediate,
M tokens flattened (B*T), E experts, k experts per token, V vocabulary.
"""

from .attention import (
    attention,
    attention_decode,
    attention_paged,
    attention_pattern,
    attention_prefill,
    attention_scores,
    attention_softmax,
    causal_mask,
    logn_scale,
    repeat_kv,
    visible,
)
from .block_attention import (
    block_mask,
    block_means,
    block_scores,
    block_starts,
    complete_blocks,
    select_blocks,
    sparse_block_attention,
    sparse_block_scores,
)
from .delta import (
    causal_conv1d,
    delta_gates,
    gated_delta_chunked,
    gated_delta_pattern,
    gated_delta_rule,
    gated_delta_step,
)
from .dtypes import at_least_fp32
from .dual_chunk import dual_chunk_attention, dual_chunk_blocked, dual_chunk_positions, dual_chunk_scores, length_scale
from .feed_forward import linear, moe_experts, router_topk, sigmoid_gate, swiglu, take_columns
from .ngram import (
    dilated_conv1d,
    is_prime,
    ngram_gate,
    ngram_match,
    ngram_multipliers,
    ngram_rows,
    primes_from,
    splitmix64,
)
from .norms import add_rms_norm, gated_rms_norm, l2_norm, rms_norm, zero_centred_rms_norm
from .rotary import norm_rope_write, ntk_alpha, rope, rope_frequencies, rope_tables, yarn_frequencies
from .streams import stream_gain, stream_mix, stream_write
from .tokens import cross_entropy, last_token, sample

"""Instruments for looking inside a model: one small file each, with its formula and its source.

    from qwen_ref.study import attribution, heads, logit_lens, patching, profiles, routing

    logit_lens.lens(model, ids)                     what each layer would answer
    attribution.attribute(model, ids, token)        who wrote that logit: embedding, heads, feed-forwards
    patching.patch(model, clean, corrupted, ...)    which activation carries the answer
    heads.summary(model, ids)                       what each head looks at; induction heads
    routing.route(model, ids)                       which experts, how evenly, which together
    profiles.profile(model, ids)                    norms, massive activations and attention sinks by depth

All take token ids, of one sequence: a list, (T,) or (1, T). They return numbers; `qwen_ref.plot` draws them. They read
the activations of `qwen_ref.hooks` and change nothing: no weight is folded or centred.
"""

from . import attribution, heads, logit_lens, patching, profiles, routing

__all__ = ["attribution", "heads", "logit_lens", "patching", "profiles", "routing"]

# %% [markdown]
# # Logit lens, attribution, patching
#
# Three ways to ask where in a model an answer comes from. The *lens* reads the residual stream at every depth as if it were
# the last. *Attribution* splits one logit into what each part has written directly. *Patching* replaces one activation by
# that of another prompt and sees whether the answer follows: the only one of the three that tests a cause.

# %%
import torch

import qwen_ref as qr
from qwen_ref import plot
from qwen_ref.study import attribution, logit_lens, patching

MODEL = "tiny"

torch.manual_seed(0)
torch.set_grad_enabled(False)
qr.backend.use("eager")  # run every operation as its formula stands, not as a fused kernel
model, tokenizer = qr.load(MODEL, device="cpu", dtype="float32", progress=False)
L, N = model.config.num_hidden_layers, model.config.num_attention_heads

# %% [markdown]
# ## A question with two answers
#
# Two prompts that differ in one word, and two words that may follow. What we measure is the difference of their logits,
# $\ell_\text{she} - \ell_\text{he}$: the log of how many times more likely the one is than the other.

# %%
PROMPT = "Once upon a time, there was a little {} who liked to play. One day,"
clean, corrupted = (tokenizer.encode(PROMPT.format(word)) for word in ("girl", "boy"))
[she], [he] = tokenizer.encode(" she"), tokenizer.encode(" he")
T = len(clean)
[word] = [t for t in range(T) if clean[t] != corrupted[t]]  # the one position that differs
labels = plot.token_labels(tokenizer, clean)
metric = patching.logit_difference(model, she, he)

for name, ids in (("girl", clean), ("boy", corrupted)):
    logits = model(torch.tensor([ids]))[0]
    best = logits[-1].softmax(-1).topk(3)
    guesses = [f"{tokenizer.decode([int(i)])!r} {p:.0%}" for p, i in zip(*best, strict=True)]
    print(f"{name:5} she - he = {metric(logits):6.2f}   best: {', '.join(guesses)}")
print(f"{T} tokens; they differ at position {word}, {labels[word]!r}")

# %% [markdown]
# ## Logit lens
#
# After $d$ blocks the stream is $x_d$. The last one is normed and multiplied by the head to give the logits; nothing forbids
# to do the same to the earlier ones:
#
# $$\ell_d = W_\text{head}\, \operatorname{norm}(x_d).$$
#
# At $d = L$ that is the model's answer, to the last bit.

# %%
ids = torch.tensor([clean])
lens = logit_lens.lens(model, clean)
logits, acts = model.run_with_cache(ids, "blocks.*.hook_resid_post")
by_hand = model.lm_head(model.model.norm(acts["resid_post", L - 1]))
assert torch.equal(by_hand, logits)
assert torch.equal(lens.top_ids[-1], logits[0].topk(5).indices)
plot.logit_lens(lens, tokenizer)

# %% [markdown]
# A row further up is a later depth; a framed cell guesses the token that follows. One number for the whole: how far the guess
# at each depth is from the final one, as the divergence $\text{KL}(p_L \,\|\, p_d)$ in nats, and at which place of its
# ranking the token stands that really follows.

# %%
for i, depth in enumerate(lens.depths):
    rank = lens.next_rank[i].float().median()
    print(f"after {depth:2} blocks: KL {lens.kl[i].mean():6.2f}, median rank of the following token {rank:6.0f}")
assert lens.kl[-1].abs().max() < 1e-5

# %% [markdown]
# The same for our question alone: she minus he at the last position, at each depth.

# %%
_, acts = model.run_with_cache(ids, ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"])
for depth, x in enumerate(acts.values()):
    print(f"after {depth:2} blocks: {metric(logit_lens.at_depth(model, x)[0]):6.2f}")

# %% [markdown]
# ## Direct logit attribution
#
# The stream is a sum: the embedding, plus what every head and every feed-forward has added. Hold the last norm's divisor $s$
# where it is, and a logit is linear in the stream, so it is the sum of one share per part:
#
# $$\ell_y = \sum_{\text{parts } c} c \cdot d_y, \qquad d_y = \frac{w_\text{norm} \odot W_\text{head}[y]}{s}.$$
#
# For a difference of two logits, take the difference of the directions.

# %%
shares = attribution.attribute(model, clean, she, versus=he)
print(f"sum of all shares {shares.total:.4f}, the model's own difference {shares.logit:.4f}")
torch.testing.assert_close(shares.total, shares.logit, rtol=1e-3, atol=1e-3)
print("largest shares:", ", ".join(f"{name} {value:+.2f}" for name, value in shares.ranked(6)))
plot.attribution(shares)

# %% [markdown]
# One share by hand: a head writes its mixed values $z$ through its columns of the output projection.

# %%
layer, head = divmod(int(shares.heads.abs().argmax()), N)
_, acts = model.run_with_cache(ids, [f"blocks.{layer}.attn.hook_result", "ln_final.hook_scale"], pos_slice=-1)
direction = model.model.norm.weight * (model.lm_head.weight[she] - model.lm_head.weight[he]) / acts["ln_final.hook_scale"][0, 0]
by_hand = acts["result", layer][0, 0, head] @ direction
print(f"layer {layer}, head {head}: {shares.heads[layer, head]:+.4f}, by hand {by_hand:+.4f}")
torch.testing.assert_close(by_hand, shares.heads[layer, head], rtol=1e-3, atol=1e-4)

# %% [markdown]
# Attribution counts direct writing only. It cannot see the head that first carried the word's gender to the last position
# for others to read, and it does not say what would have happened otherwise.
#
# ## Activation patching
#
# Run the "boy" prompt, but replace one activation by that of the "girl" run. How much of the answer returns?
#
# $$\text{restored} = \frac{m_\text{patched} - m_\text{boy}}{m_\text{girl} - m_\text{boy}}$$
#
# 0 means as "boy", 1 as "girl". Below, the residual stream at the input of every block, one position at a time.

# %%
stream = patching.patch(model, clean, corrupted, "blocks.*.hook_resid_pre", metric)
plot.patching(stream, labels)

# %% [markdown]
# Three things in this picture must be so in any model. In row 0 the only position that matters is that of the differing
# word, for nothing else differs, and patching it restores everything. Positions before the word restore nothing at any
# depth, since a token sees only what is before it. And after the last block only the last position counts.

# %%
rest = [t for t in range(T) if t != word]
torch.testing.assert_close(stream.restored[0, word], torch.tensor(1.0), rtol=0, atol=1e-3)
assert stream.restored[0, rest].abs().max() < 1e-3
assert stream.restored[:, :word].abs().max() < 1e-3
end = patching.patch(model, clean, corrupted, f"blocks.{L - 1}.hook_resid_post", metric)
torch.testing.assert_close(end.restored[0, -1], torch.tensor(1.0), rtol=0, atol=1e-3)
assert end.restored[0, :-1].abs().max() < 1e-3

# %% [markdown]
# What lies between is the model's own affair: when does the answer leave the word, and by which way does it come to the end?

# %%
at_word, at_end = stream.restored[:, word], stream.restored[:, -1]
between = stream.restored[:, word + 1 : T - 1]
print("input of block   at the word   at the end   largest in between")
for i in range(L):
    share, t = between[i].max(0)
    print(f"{i:14}   {at_word[i]:11.2f}   {at_end[i]:10.2f}   {share:.2f} at {labels[word + 1 + int(t)]!r}")
arrived = [i for i in range(L) if at_end[i] > 0.5]
where = f"at the input of block {arrived[0]}" if arrived else "only in the last block"
print("-> more than half has arrived at the end", where)

# %% [markdown]
# One cell by hand, with a hook that writes the clean vector into the corrupted run:

# %%
block = L // 2
name = f"blocks.{block}.hook_resid_pre"
_, acts = model.run_with_cache(torch.tensor([clean]), name)


def put(x, hook):  # (B, T, H)
    x[0, word] = acts[name][0, word]


m = metric(model.run_with_hooks(torch.tensor([corrupted]), [(name, put)])[0]).item()
by_hand = (m - stream.corrupted) / (stream.clean - stream.corrupted)
print(f"block {block}, position {word}: {stream.restored[block, word]:.4f}, by hand {by_hand:.4f}")
torch.testing.assert_close(torch.tensor(by_hand), stream.restored[block, word], rtol=0, atol=1e-3)

# %% [markdown]
# ## Which heads carry it
#
# Now single heads: each head's output $z$ at all positions. A head that restores much either carries the information or reads
# it out.

# %%
by_head = patching.patch(model, clean, corrupted, "blocks.*.attn.hook_z", metric, by="head")
plot.patching(by_head)

# %% [markdown]
# The strongest head looks from the last position at:

# %%
layer, head = divmod(int(by_head.restored.argmax()), N)
_, acts = model.run_with_cache(ids, f"blocks.{layer}.attn.hook_pattern")
looks = acts["pattern", layer][0, head]  # (T, T)
print(f"layer {layer}, head {head} restores {by_head.restored[layer, head]:.0%}", end="; ")
print(f"its direct share was {shares.heads[layer, head]:+.2f}")
for share, t in zip(*looks[-1].topk(4), strict=True):
    print(f"  {share:4.0%} at position {int(t):2}, {labels[int(t)]!r}")

# %% [markdown]
# Are attribution and patching the same after all? Their correlation over all heads says how far direct writing explains what
# a head does.

# %%
both = torch.stack((shares.heads.flatten(), by_head.restored.flatten()))
print(f"correlation of direct share and restored share, over {L * N} heads: {torch.corrcoef(both)[0, 1]:.2f}")

# %% [markdown]
# ## Attention or feed-forward
#
# Everything a layer's attention or feed-forward writes, at the last position and at the word:

# %%
attention, feed_forward = (
    patching.patch(model, clean, corrupted, f"blocks.*.hook_{part}_out", metric, positions=[word, T - 1]).restored
    for part in ("attn", "mlp")
)  # (L, 2) each
print("           at the word                at the end")
print("layer   attention  feed-forward    attention  feed-forward")
for i in range(L):
    print(f"{i:5}   {attention[i, 0]:9.2f}  {feed_forward[i, 0]:12.2f}    {attention[i, 1]:9.2f}  {feed_forward[i, 1]:12.2f}")

# %% [markdown]
# Only attention moves information from one position to another; a feed-forward works on each position by itself.
#
# ## The same on a real model
#
# Set `MODEL = "Qwen/Qwen3-0.6B"` in the first cell and run all cells again (a download of 1.5 GB, 3 GB of memory in 32-bit,
# and some minutes: patching runs the model a few hundred times).

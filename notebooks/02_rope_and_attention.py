# %% [markdown]
# # Rotary positions and attention
#
# How a Qwen knows where a token stands, who may look at whom, and what trained heads look at. Each property is a formula
# first and a number after it. Letters: $T$ tokens, $N$ query heads, $K$ key/value heads, $D$ head dimension.

# %%
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import qwen_ref as qr
from qwen_ref import ops, plot
from qwen_ref.config import Rope
from qwen_ref.models import qwen2, qwen3
from qwen_ref.study import heads

MODEL = "tiny"
TEXT = "Once upon a time, there was a little girl named Lily. Lily had a red ball. Lily"

torch.manual_seed(0)
torch.set_grad_enabled(False)
qr.backend.use("eager")  # run every operation as its formula stands, not as a fused kernel
model, tokenizer = qr.load(MODEL, device="cpu", dtype="float32", progress=False)
config = model.config
N, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
print(f"{config.num_hidden_layers} layers, N={N}, K={K}, D={D}, rotary base {config.rope.theta:,.0f}")

# %% [markdown]
# ## Pairs and angles
#
# RoPE takes a head's $D$ numbers as $D/2$ points of the plane, $(x_j, x_{j+D/2})$, and turns the $j$-th by the angle
# $m\,\omega_j$ at position $m$, where $\omega_j = \theta^{-2j/D}$. The first pair turns by one radian per token; every
# further one is slower by the same factor. They are clock hands: the fast ones tell neighbours apart, the slow ones regions.

# %%
omega = config.rope.frequencies(D)  # (D/2,) radians per token
print("radians per token:    ", [f"{w:.2g}" for w in omega[:: D // 8].tolist()])
print("tokens per full turn: ", [f"{2 * math.pi / w:.0f}" for w in omega[:: D // 8].tolist()])
torch.testing.assert_close(omega[1:] / omega[:-1], torch.full((D // 2 - 1,), config.rope.theta ** (-2 / D)))

figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
positions = torch.arange(64)
for j in (0, D // 16, D // 8, D // 4):
    axes.plot(positions, (positions * omega[j]).cos(), label=f"pair {j}")
axes.set(xlabel="position", ylabel="cosine of the angle")
axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
plt.show()

# %% [markdown]
# ## Three properties
#
# Write $R_m$ for the rotation at position $m$. It is linear, it changes no length, and angles add up: $R_a R_b = R_{a+b}$.
# From these follows what makes it useful, that a score depends on positions only through their difference:
#
# $$(R_m q) \cdot (R_n k) = q \cdot R_m^\top R_n\, k = q \cdot R_{n-m}\, k.$$


# %%
def rotate(x, position):  # x (D,) fp64
    cos, sin = ops.rope_tables(torch.tensor([[position]]), omega.double(), 1.0, torch.float64)
    return ops.rope(x[None, None, None], cos, sin)[0, 0, 0]


q, k = torch.randn(2, D, dtype=torch.float64)
print("length before and after:   ", q.norm().item(), rotate(q, 37).norm().item())
print("R_3 R_5 against R_8:       ", f"{(rotate(rotate(q, 5), 3) - rotate(q, 8)).abs().max():.0e}")
scores = [(rotate(q, 7 + shift) @ rotate(k, 3 + shift)).item() for shift in (0, 10, 100, 1000)]
print("score at (7, 3) and shifted by 10, 100, 1000:", [f"{s:.4f}" for s in scores])
torch.testing.assert_close(torch.tensor(scores), torch.full((4,), scores[0]), rtol=0, atol=1e-3)

# %% [markdown]
# Angles are 32-bit numbers, as in the official code, so the equality ends near the seventh digit of the angle. Since all
# that depends on positions is scores, the whole model inherits the property: move every token by 100 and no logit changes.

# %%
ids = torch.tensor([tokenizer.encode(TEXT)])
T = ids.shape[1]
here = model(ids, torch.arange(T)[None])
there = model(ids, torch.arange(T)[None] + 100)
print(f"largest difference of any logit: {(here - there).abs().max():.1e}; largest logit: {here.abs().max():.1f}")
torch.testing.assert_close(here, there, rtol=0, atol=1e-3 * here.abs().max().item())

# %% [markdown]
# A query and a key that are the same vector score highest where they stand together. As the distance grows, the hands
# drift apart and the sum of cosines, $\sum_j \cos(\Delta\, \omega_j)$ for a vector of ones, falls and starts to waver.

# %%
distance = torch.arange(256)
similarity = (distance[:, None] * omega).cos().mean(-1)
ones = torch.ones(D, dtype=torch.float64)
direct = torch.stack([rotate(ones, 0) @ rotate(ones, int(d)) / D for d in distance])
torch.testing.assert_close(similarity.double(), direct, rtol=0, atol=1e-4)

figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
axes.plot(distance, similarity)
axes.axhline(0, color="gray", linewidth=0.6)
axes.set(xlabel="distance, tokens", ylabel="score, 1 = together")
plt.show()

# %% [markdown]
# ## Grouped queries
#
# There are fewer key/value heads than query heads: query head $n$ reads key/value head $\lfloor n K / N \rfloor$. Written
# out head by head, it is ordinary attention with some keys and values used more than once.

# %%
q, k, v = torch.randn(1, N, T, D), torch.randn(1, K, T, D), torch.randn(1, K, T, D)
hidden = torch.ones(T, T).triu(1).bool()
by_hand = []
for n in range(N):
    key, value = k[0, n * K // N], v[0, n * K // N]  # (T, D)
    pattern = (q[0, n] @ key.T / D**0.5).masked_fill(hidden, -torch.inf).softmax(-1)  # (T, T)
    by_hand.append(pattern @ value)
torch.testing.assert_close(torch.stack(by_hand)[None], ops.attention(q, k, v))
print("query head -> key/value head:", {n: n * K // N for n in range(N)})

# %% [markdown]
# What it is for: a running conversation keeps the keys and values of all its tokens, $2 K D$ numbers per layer and token.
# Three official models of about equal size, from one key/value head per query head to one per four and per seven:

# %%
common = {"num_attention_heads": 32, "max_position_embeddings": 32768}
qwen15_7b = {**common, "model_type": "qwen2", "hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 32}
qwen25_7b = {**common, "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
             "num_key_value_heads": 4}  # fmt: skip
qwen3_8b = {**common, "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_key_value_heads": 8}
configs = {
    "Qwen1.5-7B, 32 of 32": qwen2.Config.from_json(qwen15_7b),
    "Qwen3-8B, 8 of 32": qwen3.Config.from_json(qwen3_8b),
    "Qwen2.5-7B, 4 of 28": qwen2.Config.from_json(qwen25_7b),
}
for name, c in configs.items():
    print(f"{name:22} {plot.kv_bytes(c, [32768])[0] / 2**30:5.2f} GiB for 32,768 tokens in bf16")
plot.kv_memory(configs)

# %% [markdown]
# ## Sliding windows
#
# Some configs let a layer see only the last $w$ positions: key $s$ is visible to query $t$ if $t - w < s \le t$. Left the
# full mask, right a window of 4.

# %%
place = torch.arange(12)[None]
figure, panels = plt.subplots(1, 2, figsize=(4.6, 2.4), layout="constrained")
for axes, window in zip(panels, (None, 4), strict=True):
    axes.imshow(ops.visible(place, place, window)[0, 0], cmap="Blues", vmin=0, vmax=1.4)
    axes.set(title=f"window {window}" if window else "full", xlabel="key", ylabel="query",
             xticks=range(0, 12, 2), yticks=range(0, 12, 2))  # fmt: skip
plt.show()

# %% [markdown]
# A token still learns of things further back, because what it sees in a layer has itself seen $w - 1$ positions before: $L$
# layers reach $L(w-1)$ back, and not one further. To prove it, change the token at position 20 of a random model and look
# at which outputs move.

# %%
L, window = 3, 4
windowed = {**qwen3.TINY, "num_hidden_layers": L, "use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
small = qwen3.Model(qwen3.Config.from_json(windowed)).eval()
for p in small.parameters():
    p.normal_(std=p.shape[-1] ** -0.5)
tokens = torch.randint(0, 211, (1, 48))
changed = tokens.clone()
changed[0, 20] = (tokens[0, 20] + 1) % 211
moved = (small(tokens) != small(changed)).any(-1)[0].nonzero().flatten().tolist()
print("positions whose logits move:", moved)
print(f"furthest: {max(moved) - 20} tokens on; L (w - 1) = {L * (window - 1)}")
assert moved == list(range(20, 20 + L * (window - 1) + 1))

# %% [markdown]
# ## YaRN: a longer context without much training
#
# A pair that never completes a turn within the training context shows the model, at longer ones, angles it has never met.
# YaRN divides the frequencies of such slow pairs by the stretch factor $s$, so that the familiar angles cover the longer
# context. Pairs that turn often have met every angle; they keep telling neighbours apart and stay as they are. Between
# them a linear ramp $\gamma$ runs from 0 to 1:
#
# $$\omega_j' = (1 - \gamma_j)\,\omega_j + \gamma_j\,\frac{\omega_j}{s}.$$
#
# $\gamma$ is 0 for pairs with more than 32 turns within the original context and 1 for those with less than one.

# %%
factor, context = 4.0, 32768  # as the official configs of Qwen2.5 and Qwen3 suggest
plain = replace(config, head_dim=128, rope=Rope(1e6), max_position_embeddings=context)
stretched = replace(plain, rope=Rope(1e6, factor, context, attention_factor=0.1 * math.log(factor) + 1))
before, after = plain.rope.frequencies(128), stretched.rope.frequencies(128)
turns = context * before / (2 * math.pi)  # of each pair within the original context
ratio = before / after
print("pairs unchanged:", int((ratio == 1).sum()), " fully stretched:", int((ratio > factor - 1e-3).sum()), " of", len(ratio))
print(f"fewest turns among the unchanged: {turns[ratio == 1].min():.1f}")
print(f"most turns among the fully stretched: {turns[ratio > factor - 1e-3].max():.2f}")
assert turns[ratio == 1].min() > 32 and turns[ratio > factor - 1e-3].max() < 1
plot.rope_frequencies({"plain": plain, "YaRN, factor 4": stretched})

# %% [markdown]
# Over a longer context a softmax has more keys to spread over. YaRN makes up for it by multiplying queries and keys by
# $0.1 \ln s + 1$ each, which is done where it costs nothing, in the tables of cosines and sines. So all scores grow by the
# square of that.

# %%
q, k = torch.randn(2, 1, 1, 9, 128, dtype=torch.float64)
tables = [ops.rope_tables(torch.arange(9)[None], after.double(), scale, torch.float64)
          for scale in (1.0, stretched.rope.attention_factor)]  # fmt: skip
without, scaled = (ops.rope(q, *t) @ ops.rope(k, *t).mT for t in tables)
print(f"attention factor {stretched.rope.attention_factor:.4f}, scores times {(scaled / without).mean():.4f}")
torch.testing.assert_close(scaled, without * stretched.rope.attention_factor**2)

# %% [markdown]
# ## What trained heads look at
#
# Numbers for every head of the trained model on one text, all from its attention pattern $a_{ts}$ alone: how much it looks
# at the token before, how much at the very first token (the "sink", where heads look that have nothing to say), and how far
# back on average.

# %%
labels = plot.token_labels(tokenizer, ids[0])
summary = heads.summary(model, ids)
for name in ("previous", "first", "distance"):
    score = getattr(summary, name)  # (L, N)
    layer, head = divmod(int(score.argmax()), N)
    print(f"largest {name:9} {score.max():6.2f} at layer {layer}, head {head};  median of all heads {score.median():6.2f}")
plot.layers_by_heads(summary.previous, "attention to the token before")

# %% [markdown]
# The strongest previous-token head, and another head of its layer:

# %%
layer, strongest = divmod(int(summary.previous.argmax()), N)
plot.attention(heads.patterns(model, ids)[layer], labels, heads=[strongest, (strongest + 1) % N], title=f"layer {layer}")

# %% [markdown]
# ## Induction heads: first a circuit that is known
#
# If a text contained "A B" and now reads "A" again, "B" is a good guess. Two heads in a row can do it (Elhage et al. 2021,
# Olsson et al. 2022): one in an early layer notes at each token which token came before it; one in a later layer looks for
# the place that noted the present token, and copies the token that stands there.
#
# A measuring instrument should be tried where the answer is known. So here is that circuit, written by hand into the weights
# of a random two-layer Qwen3: directions of the stream for "I am token $i$", "before me was $i$" and "next is $i$", one for a
# constant, layer 0 head 1 and layer 1 head 2 to move between them. The other heads keep their random weights.

# %%
V, SIZE = 40, 64
circuit = qwen3.Model(qwen3.Config.from_json({
    "model_type": "qwen3", "vocab_size": V, "hidden_size": 160, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": SIZE, "rope_theta": 1e6, "max_position_embeddings": 512,
})).eval()  # fmt: skip
for p in circuit.parameters():
    if p.dim() > 1:
        p.normal_(std=0.3 * p.shape[-1] ** -0.5)
directions = torch.linalg.qr(torch.randn(160, 160)).Q  # rows at right angles to each other
token, previous, following, constant = directions[:V], directions[V : 2 * V], directions[2 * V : 3 * V], directions[3 * V]
circuit.model.embed_tokens.weight.copy_(token + constant)
circuit.lm_head.weight.copy_(following)


def write_head(layer, head, query, key, value, output):
    """query, key, value: (D, H); output: (H, D). A key/value head serves two query heads here."""
    attention = circuit.model.layers[layer].self_attn
    for projection, index, matrix in (("q_proj", head, query), ("k_proj", head // 2, key), ("v_proj", head // 2, value)):
        getattr(attention, projection).weight[index * SIZE : (index + 1) * SIZE] = matrix
    attention.o_proj.weight[:, head * SIZE : (head + 1) * SIZE] = output
    attention.q_norm.weight.fill_(4)  # sharp
    attention.k_norm.weight.fill_(4)


code = torch.linalg.qr(torch.randn(SIZE, SIZE)).Q[:, :V]  # (D, V): a token as a head's value

# Layer 0: every key the same vector, every query that vector turned one position back: a perfect match one token ago.
flat = torch.ones(SIZE)
frequencies = circuit.config.rope.frequencies(SIZE)
turned_back = ops.rope(flat[None, None, None], *ops.rope_tables(torch.tensor([[-1]]), frequencies, 1.0, torch.float32))
write_head(0, 1, turned_back.flatten()[:, None] * constant, flat[:, None] * constant, code @ token, previous.T @ code.T)

# Layer 1: the query says "I am i", the key "before me was i", in the slow pairs, which hardly turn. Value: "next is me".
slow = torch.arange(SIZE) % (SIZE // 2) >= SIZE // 4
match = torch.nn.functional.normalize(torch.randn(SIZE, V) * slow[:, None], dim=0)  # (D, V)
write_head(1, 2, match @ token, match @ previous, code @ token, 4 * following.T @ code.T)

# %% [markdown]
# The test: tokens in random order, read twice. Nothing but the repetition predicts the second reading. The induction score
# of a head is its mean attention, in the second reading, to the token after the same token's first occurrence. It finds the
# head that was planted in layer 1, and the previous-token score the one in layer 0.

# %%
PERIOD = 32
repeated = torch.randperm(V)[:PERIOD].repeat(2)  # (2P,) no token twice in one reading
print("the tokens repeat:", repeated[:4].tolist(), "...", repeated[PERIOD : PERIOD + 4].tolist())
pattern = heads.patterns(circuit, repeated)  # (L, N, T, T)
induction, back = heads.induction(pattern, PERIOD), heads.previous_token(pattern)
print("induction, by layer and head:     ", [[round(x, 2) for x in row] for row in induction.tolist()])
print("previous token, by layer and head:", [[round(x, 2) for x in row] for row in back.tolist()])
assert divmod(int(induction.argmax()), 4) == (1, 2) and divmod(int(back.argmax()), 4) == (0, 1)

# %% [markdown]
# Looking is not yet doing. To learn what a head is *for*, it is ablated: its output is set to zero while the model runs, and
# the loss, the mean of $-\log p(\text{next token})$, is measured again on each reading.


# %%
def losses(model, ids, ablated=()):
    """(first reading, second reading), in nats, with the given (layer, head)s silent. ids (B, 2P)."""

    def silence(which):
        def hook(z, hook):  # (B, T, N, D)
            z[:, :, which] = 0

        return hook

    layers = {layer for layer, _ in ablated}
    hooks = [(f"blocks.{i}.attn.hook_z", silence([n for l, n in ablated if l == i])) for i in layers]
    logprobs = model.run_with_hooks(ids, hooks)[:, :-1].log_softmax(-1)
    loss = -logprobs.gather(-1, ids[:, 1:, None])[..., 0]  # (B, 2P-1)
    half = ids.shape[1] // 2
    return loss[:, : half - 1].mean().item(), loss[:, half:].mean().item()


many = torch.stack([torch.randperm(V)[:PERIOD].repeat(2) for _ in range(8)])
print(f"second reading of the whole model: {losses(circuit, many)[1]:.2f} nats; guessing evenly costs {math.log(V):.2f}")
print(f"without layer 1, head 2: {losses(circuit, many, [(1, 2)])[1]:.2f}")
print(f"without layer 0, head 1: {losses(circuit, many, [(0, 1)])[1]:.2f}")
others = [(layer, head) for layer in range(2) for head in range(4) if (layer, head) not in ((0, 1), (1, 2))]
print(f"without the six others:  {losses(circuit, many, others)[1]:.2f}")
assert max(losses(circuit, many)[1], losses(circuit, many, others)[1]) < 1
assert min(losses(circuit, many, [(1, 2)])[1], losses(circuit, many, [(0, 1)])[1]) > 3

# %% [markdown]
# Without either of the two heads the model does no better than guessing; without all the others it loses nothing. That is
# what an induction circuit looks like to these instruments.
#
# ## Induction heads in the trained model
#
# The same measurement on the model of the first cell. A head that looks at all tokens alike would score what the first line
# says; the picture shows how far above that the heads are.

# %%
T2 = 2 * PERIOD
even = torch.tensor([1 / (t + 1) for t in range(PERIOD, T2)]).mean().item()
strongest = summary.induction.flatten().argsort(descending=True)[:4].tolist()
chosen = [divmod(i, N) for i in strongest]
print(f"even attention scores {even:.3f}; the strongest heads:")
for layer, head in chosen:
    print(f"  layer {layer}, head {head}: {summary.induction[layer, head]:.3f}")
plot.layers_by_heads(summary.induction, "induction score")

# %% [markdown]
# The four strongest are ablated together, and against them, ten times, four of the other heads drawn at random: silencing
# any four heads does some damage, and only what goes beyond that is theirs.

# %%
many = torch.stack([heads.repeated_tokens(config.vocab_size, PERIOD, seed=seed) for seed in range(8)])
first, second = losses(model, many)
without = losses(model, many, chosen)[1]
others = [divmod(i, N) for i in range(config.num_hidden_layers * N) if i not in strongest]
draws = [[others[i] for i in torch.randperm(len(others))[:4].tolist()] for _ in range(10)]
control = [losses(model, many, draw)[1] for draw in draws]
print(f"whole model: first reading {first:.2f}, second {second:.2f}: the repetition saves {first - second:.2f} nats per token")
print(f"second reading without the 4 strongest: {without:.2f}")
print(f"second reading without 4 random others: {min(control):.2f} to {max(control):.2f}, mean {sum(control) / 10:.2f}")
if first - second > 1 and without > max(control):
    print("-> This model has induction heads, and these are they.")
elif without > max(control):
    print("-> These heads matter here more than others do, but the model makes little of the repetition.")
else:
    print("-> No induction heads: no set of heads that the repetition depends on, and little use made of it.")

# %% [markdown]
# Induction heads appear rather suddenly in training; Olsson et al. saw it after 2.5 to 5 billion tokens. A model that has read
# a few million, as the bundled ones have, may have none. The official ones have seen trillions.
#
# ## The same on a real model
#
# Set `MODEL = "Qwen/Qwen3-0.6B"` in the first cell and run all cells again (a download of 1.5 GB, and 3 GB of memory in
# 32-bit): the last three cells are the ones to compare.

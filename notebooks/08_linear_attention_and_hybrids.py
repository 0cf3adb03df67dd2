# %% [markdown]
# # Linear attention and hybrids
#
# Since Qwen3-Next, three of four layers keep no keys and values. Each of their heads keeps one matrix, however long the text
# is, and every token changes it by the *gated delta rule* (Yang et al. 2024). This notebook derives the rule from attention
# in small steps, with numbers, and then opens a trained hybrid: how long its heads remember, what they look at, what is lost
# when their memory is wiped, and why a model like this cannot simply go back one token.
#
# Letters: $T$ tokens, $P$ heads of a linear layer, keys and queries of $D_k$ numbers, values of $D_v$, the state $S$
# ($D_k \times D_v$).

# %%
import math

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap

import qwen_ref as qr
from qwen_ref import ops, plot
from qwen_ref.errors import RequestError
from qwen_ref.models import qwen3, qwen3_5

MODEL = "tiny-hybrid"

torch.manual_seed(0)
torch.set_grad_enabled(False)
qr.backend.use("eager")  # run every operation as its formula stands, not as a fused kernel
model, tokenizer = qr.load(MODEL, device="cpu", dtype="float32", progress=False)
config = model.config
linear = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
P, KEY, VALUE = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
print("linear layers:", linear, " full attention:", full)
print(f"a state: {P} heads of {KEY} x {VALUE} numbers in every linear layer")

STYLE = plot.THEMES["light"]
SIGNED = LinearSegmentedColormap.from_list("signed", STYLE.diverging)
PLAIN = LinearSegmentedColormap.from_list("plain", STYLE.sequential)

# %% [markdown]
# ## Attention without its softmax is a matrix
#
# Attention reads a weighted sum of values. Leave out the softmax, and the sum can be taken the other way round, because a
# product of matrices does not care where its brackets stand:
#
# $$o_t = \sum_{s \le t} (q_t \cdot k_s)\, v_s = \Big(\underbrace{\sum_{s \le t} k_s v_s^\top}_{S_t}\Big)^{\!\top} q_t.$$
#
# On the left all keys and values must be kept. On the right one matrix is enough: each token adds its $k_t v_t^\top$.

# %%
T, Dk, Dv = 12, 8, 5
q, k, v = (torch.randn(T, d, dtype=torch.float64) for d in (Dk, Dk, Dv))

all_kept = (q @ k.T).tril() @ v  # (T, Dv), the left side

S = torch.zeros(Dk, Dv, dtype=torch.float64)
one_matrix = []
for t in range(T):
    S = S + k[t, :, None] * v[t]
    one_matrix.append(S.T @ q[t])
print(f"largest difference: {(torch.stack(one_matrix) - all_kept).abs().max():.0e}")
print(f"kept after {T} tokens: {k.numel() + v.numel()} numbers on the left, {S.numel()} on the right")
torch.testing.assert_close(torch.stack(one_matrix), all_kept, rtol=0, atol=1e-12)

# %% [markdown]
# ## What it saves
#
# Two official models of like size and depth, and what each must hold of *one* running conversation. In Qwen3-32B all 64
# layers keep keys and values in 16 bits. In Qwen3.5-27B 16 do, and 48 hold a state in 32 bits and the last four inputs of a
# short convolution.

# %%
qwen3_32b = qwen3.Config.from_json({
    "model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960,
})  # fmt: skip
qwen35_27b = qwen3_5.Config.from_json({
    "model_type": "qwen3_5_text", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 24,
    "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
})  # fmt: skip


def state_bytes(config, itemsize=2):
    """Of one linear layer: the heads' matrices in fp32, and the convolution's inputs in the activations' dtype."""
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * key + heads * value
    return 4 * heads * key * value + itemsize * channels * config.linear_conv_kernel_dim


def held(config, tokens, itemsize=2):
    states = config.layer_types.count("linear_attention")
    return plot.kv_bytes(config, [tokens], itemsize)[0] + (states * state_bytes(config, itemsize) if states else 0)


print("tokens      Qwen3-32B    Qwen3.5-27B")
for tokens in (1, 1024, 32768, 262144):
    print(f"{tokens:7} {held(qwen3_32b, tokens) / 1e6:11,.1f} MB {held(qwen35_27b, tokens) / 1e6:11,.1f} MB")
row = 2 * 2 * qwen35_27b.num_key_value_heads * qwen35_27b.head_dim
assert held(qwen35_27b, 1) > held(qwen3_32b, 1) and held(qwen35_27b, 1024) < held(qwen3_32b, 1024)
print(f"one linear layer's state takes {state_bytes(qwen35_27b) / 1e6:.1f} MB, as much as the keys and values of "
      f"{state_bytes(qwen35_27b) // row} tokens")

# %% [markdown]
# For a short question the states are the larger of the two. They win by not growing. That the formula is right, the caches of
# the model of the first cell say:

# %%
ids = torch.randint(0, config.vocab_size, (1, 300))
for tokens in (1, 37, 300):
    cache = model.make_cache()
    model(ids[:, :tokens], cache=cache)
    kept = cache.snapshot()  # a copy no larger than it needs to be
    assert kept.nbytes() == held(config, tokens, itemsize=4)
    states = {kept.layers[i].nbytes() for i in linear}
    print(f"{tokens:3} tokens: each linear layer {states} bytes, each full layer {kept.layers[full[0]].nbytes():,} bytes")
    assert states == {state_bytes(config, itemsize=4)}

figure, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
lengths = [2**i for i in range(6, 19)]
for name, official in (("Qwen3-32B", qwen3_32b), ("Qwen3.5-27B", qwen35_27b)):
    axes.loglog(lengths, [held(official, n) / 1e9 for n in lengths], label=name)
axes.set(xlabel="tokens", ylabel="GB of one conversation")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What it costs: memories pile up
#
# A sum cannot correct itself. Write one key with two values, read with that key, and both values come back added.
#
# The *delta rule* first reads what the state holds under the key, and writes only the difference, of which it takes the share
# $\beta$:
#
# $$S_t = S_{t-1} + k_t\, \beta_t\, (v_t - S_{t-1}^\top k_t)^\top.$$

# %%
key = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)  # of length one, as the rule makes all keys
first, second = torch.tensor([[1.0, 2.0], [5.0, -1.0]], dtype=torch.float64)


def write(S, key, value, beta):
    return S + key[:, None] * beta * (value - S.T @ key)


empty = torch.zeros(3, 2, dtype=torch.float64)
piled = empty + key[:, None] * first + key[:, None] * second
print("plain sum reads      ", (piled.T @ key).tolist())
for beta in (1.0, 0.5):
    S = write(write(empty, key, first, 1.0), key, second, beta)
    print(f"delta, beta {beta}, reads", [round(x, 6) for x in (S.T @ key).tolist()])
    torch.testing.assert_close(S.T @ key, (1 - beta) * first + beta * second)

# %% [markdown]
# The same rule as *erase, then write*: $S_t = (I - \beta k k^\top)\, S_{t-1} + \beta\, k v^\top$. What is erased is what lay
# in the direction of $k$. A key at right angles to it keeps its value untouched; a similar one loses a part.

# %%
S = torch.randn(3, 2, dtype=torch.float64)
beta = 0.7
erased = S - beta * key[:, None] * (key @ S) + beta * key[:, None] * second
torch.testing.assert_close(write(S, key, second, beta), erased)

across, close = torch.tensor([[0.8, -0.6, 0.0], [0.8, 0.6, 0.0]], dtype=torch.float64)
for name, other in (("at right angles", across), ("similar", close)):
    S = write(write(empty, other, first, 1.0), key, second, 1.0)
    now = [round(x, 3) for x in (S.T @ other).tolist()]
    print(f"{name:15} (cosine {key @ other:.2f}): value was {first.tolist()}, is now {now}")
    torch.testing.assert_close(S.T @ other, first + (key @ other) * (second - (key @ other) * first))

# %% [markdown]
# So how much fits into one matrix? Write $n$ pairs with keys of random directions in 32 dimensions, then ask for every one.
# Attention finds them all, for it has kept them all. The sum confuses them from the start. The delta rule is exact for the
# last pair, good for the recent ones, and has lost those that 32 dimensions have no room for.

# %%
size, most = 32, 96
keys = torch.nn.functional.normalize(torch.randn(most, size, dtype=torch.float64), dim=-1)
values = torch.randn(most, size, dtype=torch.float64)


def error(read):
    """Of each pair: distance of what was read to its value, as a share of the value's length."""
    return (read - values[: len(read)]).norm(dim=-1) / values[: len(read)].norm(dim=-1)


counts, errors = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96], {"plain sum": [], "delta rule": [], "attention": []}
for n in counts:
    K, V = keys[:n], values[:n]
    S = torch.zeros(size, size, dtype=torch.float64)
    for t in range(n):
        S = write(S, K[t], V[t], 1.0)
    reads = {"plain sum": K @ (K.T @ V), "delta rule": K @ S, "attention": (20 * K @ K.T).softmax(-1) @ V}
    for name, read in reads.items():
        errors[name].append(error(read).mean().item())
by_age = error(K @ S).flip(0)  # of the last and fullest state
assert by_age[0] < 1e-12 and errors["delta rule"][3] < errors["plain sum"][3]

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained", sharey=True)
for name, mean in errors.items():
    left.plot(counts, mean, marker=".", label=name)
left.axvline(size, color="gray", linewidth=0.6)
left.set(xlabel="pairs written", ylabel="error of what is read", ylim=(-0.05, 2))
left.legend(fontsize=7, frameon=False)
right.plot(by_age, color="C1", marker=".", linestyle="")
right.set(xlabel=f"how many pairs ago, of {most}")
plt.show()

# %% [markdown]
# With keys at right angles, 32 pairs fit exactly, and the 33rd must overwrite. Training is what makes keys point where they do
# not disturb each other.

# %%
rectangular = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
S = torch.zeros(size, size, dtype=torch.float64)
for t in range(size):
    S = write(S, rectangular[t], values[t], 1.0)
print(f"largest error of {size} pairs with keys at right angles: {error(rectangular @ S).max():.0e}")
assert error(rectangular @ S).max() < 1e-12

# %% [markdown]
# ## Forgetting: the gate
#
# What is never overwritten would stay for ever. So before each write a head lets its whole state fade by a factor
# $a_t = e^{g_t}$ between 0 and 1, which it computes from the token, as it does $\beta_t$. Both together are the *gated delta
# rule*:
#
# $$S_t = a_t S_{t-1} + k_t\, \beta_t\, (v_t - a_t S_{t-1}^\top k_t)^\top, \qquad o_t = S_t^\top q_t.$$
#
# Here it is in six lines, on numbers that a layer of the trained model really has: the queries, keys, values and gates that
# its first layer makes of a story.

# %%
STORY = """\
Once upon a time, there was a little girl named Lily. Lily had a small red ball. She loved to play with her ball in \
the park. One day, Lily saw a big dog near the tree. The dog was sad because he had no one to play with. "Do you want \
to play with my ball?" asked Lily. The dog was very happy. They ran and jumped and played all day. Then the ball \
rolled into the pond. Lily started to cry. "Do not be sad," said the dog. He jumped into the water and swam to the red \
ball. He gave it back to Lily. "Thank you!" said Lily, and she gave the dog a big hug. When the sun went down, Lily \
went home and told her mom about her new friend. Her mom smiled and said, "You are a kind girl, Lily." From that day \
on, Lily and the dog played with the red ball in the park every day, and they were very happy."""
story = torch.tensor([tokenizer.encode(STORY)])
labels = plot.token_labels(tokenizer, story[0])
T = story.shape[1]
names = ["blocks.*.attn.hook_" + part for part in ("q", "k", "v", "decay", "beta", "out", "state", "pattern")]
logits, acts = model.run_with_cache(story, names)


def rule_of(layer, acts=acts):
    """A layer's numbers in fp64: q, k (T, P, Dk) scaled as the rule scales them, v (T, P, Dv), decay and beta (T, P)."""
    q, k, v, decay, beta = (acts[name, layer].double() for name in ("q", "k", "v", "decay", "beta"))
    q, k = ops.delta.unit_queries_keys(q, k, P)
    return q[0], k[0], v[0], decay[0], beta[0]


def states(k, v, decay, beta):
    """The state after every token, (T, P, Dk, Dv): the gated delta rule."""
    S, kept = torch.zeros(P, KEY, VALUE, dtype=torch.float64), []
    for t in range(len(k)):
        S = decay[t, :, None, None] * S
        read = torch.einsum("pkv,pk->pv", S, k[t])
        S = S + torch.einsum("pk,pv->pkv", k[t], beta[t, :, None] * (v[t] - read))
        kept.append(S)
    return torch.stack(kept)


q, k, v, decay, beta = rule_of(linear[0])
S = states(k, v, decay, beta)  # (T, P, Dk, Dv)
print(f"{T} tokens; state after the last: {[*S[-1].shape]}, against the model's own {[*acts['state', linear[0]].shape]}")
torch.testing.assert_close(S[-1].float(), acts["state", linear[0]][0], rtol=1e-4, atol=1e-5)

# %% [markdown]
# ## Three ways to the same numbers
#
# Token by token is how a model writes. It is a poor way to *read* a long prompt: thousands of small steps, one after the
# other. Two other forms compute the same:
#
# - in *chunks* of 64 tokens: inside one, what the tokens write depends on what those before them wrote, which is one
#   triangular system of equations for all of them; only the states between chunks are taken in turn;
# - as *attention*: one chunk that holds everything. Then $o = A v$ with a matrix $A$ ($T \times T$) for each head, which says
#   how much of each value reaches each token, erasing and fading included.

# %%
raw = [acts[name, linear[0]].double() for name in ("q", "k", "v")]
g, beta = acts["decay", linear[0]].double().log(), acts["beta", linear[0]].double()
one_by_one, last = ops.gated_delta_rule(*raw, g, beta)  # (1, T, P, Dv)
chunked, last_chunked = ops.gated_delta_chunked(*raw, g, beta)
A = ops.gated_delta_pattern(raw[0], raw[1], g, beta)  # (1, P, T, T)
as_attention = (A @ raw[2].transpose(1, 2)).transpose(1, 2)
by_hand = torch.einsum("tpkv,tpk->tpv", S, q)[None]

scale = one_by_one.abs().max()
for name, out in (("in chunks", chunked), ("as attention", as_attention), ("by hand", by_hand)):
    print(f"{name:13} differs from token by token by {(out - one_by_one).abs().max() / scale:.0e} of the largest output")
    torch.testing.assert_close(out, one_by_one, rtol=0, atol=1e-11 * scale.item())
torch.testing.assert_close(last_chunked, last, rtol=1e-10, atol=1e-12)
torch.testing.assert_close(acts["out", linear[0]].double(), one_by_one, rtol=0, atol=1e-5 * scale.item())

# %% [markdown]
# ## How long the heads remember
#
# If a token fades the state by $a$, half of a write is left after $\ln 2 / (-\ln a)$ such tokens. Each bar is one head: its
# half-life at the middle half of the story's tokens, and at the median one. Beside it, the share $\beta$ that a token writes.

# %%
decay, beta = acts.stack("decay")[:, 0], acts.stack("beta")[:, 0]  # (layers, T, P)
half_life = math.log(2) / -decay.clamp(1e-30, 1 - 1e-7).log()
assert bool(((decay > 0) & (decay <= 1)).all()) and bool(((beta > 0) & (beta < 1)).all())

figure, panels = plt.subplots(1, 2, figsize=(7, 4.2), layout="constrained", sharey=True)
rows = range(len(linear) * P)
colors = [STYLE.lines[i % 6] for i in range(len(linear)) for _ in range(P)]
for axes, measure, label in ((panels[0], half_life, "half-life, tokens"), (panels[1], beta, "share written, beta")):
    low, middle, high = measure.transpose(0, 1).flatten(1).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)  # (layers * P,)
    axes.hlines(rows, low, high, colors=colors, linewidth=3, alpha=0.5)
    axes.scatter(middle, rows, c=colors, s=9)
    axes.set_xlabel(label)
panels[0].set_xscale("log")
panels[0].axvline(T, color="gray", linewidth=0.6)
panels[0].text(T, len(rows), " the story's length", fontsize=6, va="top")
panels[0].set_yticks([(i + 0.5) * P - 0.5 for i in range(len(linear))], [f"layer {i}" for i in linear])
plt.show()

typical = half_life.median(1).values  # (layers, P)
print(f"shortest-lived head: half a write is gone after {typical.min():.2g} tokens; longest-lived: after {typical.max():,.0f}")
assert typical.max() > 10 * typical.min()
print(f"heads that keep half a write for 10 tokens or more: {int((typical >= 10).sum())} of {typical.numel()}")

# %% [markdown]
# Some heads see a few tokens only, others keep a thing for as long as the text is, often in the same layer. The decay is no
# constant: it is the token's decision. Here are the tokens at which the longest-lived head lets go of most, and those at which
# it holds fast.

# %%
layer = int(typical.max(1).values.argmax())
head = int(typical[layer].argmax())
kept = decay[layer, :, head]
print(f"layer {linear[layer]}, head {head}, which remembers longest:")
for name, order in (("lets go of most at ", kept.argsort()), ("lets go of least at", kept.argsort(descending=True))):
    print(f"  {name}", ", ".join(f"{labels[t]!r} {1 - kept[t]:.2%}" for t in order[:6].tolist()))

# %% [markdown]
# ## The state over a story
#
# Can a memory that every token adds to grow without end? No: a write with $\beta \le 1$ along a key of length one never makes
# the rest of the state larger, so
#
# $$\lVert S_t \rVert \;\le\; a_t \lVert S_{t-1} \rVert + \beta_t \lVert v_t \rVert.$$

# %%
norms = []
for layer in linear:
    _, k, v, decay_t, beta_t = rule_of(layer)
    norm = states(k, v, decay_t, beta_t).flatten(2).norm(dim=-1)  # (T, P)
    before = torch.cat((torch.zeros(1, P, dtype=torch.float64), norm[:-1]))
    assert bool((norm <= (decay_t * before + beta_t * v.norm(dim=-1)) * (1 + 1e-9)).all())
    norms.append(norm)

figure, panels = plt.subplots(2, (len(linear) + 1) // 2, figsize=(7, 3.4), layout="constrained", sharex=True)
for axes, layer, norm in zip(panels.flat, linear, norms, strict=False):
    axes.plot(norm, linewidth=0.8)
    axes.set_title(f"layer {layer}", fontsize=8)
figure.supxlabel("token of the story", fontsize=8)
figure.supylabel("size of the state, a line per head", fontsize=8)
plt.show()

# %% [markdown]
# ## What is new is written, what is known is not
#
# A state that already holds what a token says learns nothing from it: the error $v - S^\top k$ is small. In the first layer
# keys and values depend on the last four tokens alone, because of the short convolution. So a sentence that is read twice has
# the same keys and values twice, and the second time should find them known, to heads that remember that far.

# %%
SENTENCE = " Lily had a small red ball and a big brown dog."
twice = tokenizer.encode(SENTENCE + " The sun was hot." + SENTENCE)
one = len(tokenizer.encode(SENTENCE))
_, found = model.run_with_cache(torch.tensor([twice]), names[:5])
_, k, v, decay_t, beta_t = rule_of(linear[0], found)
S = states(k, v, decay_t, beta_t)
before = torch.cat((torch.zeros(1, *S.shape[1:], dtype=torch.float64), S[:-1])) * decay_t[..., None, None]
news = (v - torch.einsum("tpkv,tpk->tpv", before, k)).norm(dim=-1) / v.norm(dim=-1)  # (T, P); 1 = nothing was known
assert bool((news[0] - 1).abs().max() < 1e-12)  # of an empty state nothing is known

torch.testing.assert_close(k[3:one], k[3 - one :], rtol=1e-4, atol=1e-5)  # the first three tokens see others before them
torch.testing.assert_close(v[3:one], v[3 - one :], rtol=1e-4, atol=1e-5)
readings = [news[3:one].mean(0), news[3 - one :].mean(0)]
print("share of a value that is news, by head of the first layer")
for name, reading in zip(("first reading ", "second reading"), readings, strict=True):
    print(f"  {name}", [f"{x:.2f}" for x in reading.tolist()])
known = int((readings[1] < readings[0] - 0.02).sum())
print(f"-> {known} of {P} heads found less news in the second reading")

# %% [markdown]
# ## What linear heads look at
#
# $A$ shows a linear head as if it were attention. Its rows do not sum to one, and entries may be negative: to erase is to
# subtract. Each row is divided here by the sum of its absolute values, since each head's output is normed before it goes on.
# Below, the heads of a linear layer, and of the full attention layer after it, on the same words.

# %%
few = 26
block = full[0]
weights = acts["pattern", block - 1][0, :, :few, :few]  # (P, few, few)
weights = weights / weights.abs().sum(-1, keepdim=True)
softmax = acts["pattern", block][0, :, :few, :few]
torch.testing.assert_close(softmax.sum(-1), torch.ones(softmax.shape[:2]))

shown = min(P, len(softmax), 6)
figure, panels = plt.subplots(2, shown, figsize=(9, 3.7), layout="constrained", sharex=True, sharey=True)
for head in range(shown):
    panels[0, head].imshow(weights[head], cmap=SIGNED, vmin=-0.6, vmax=0.6)
    panels[1, head].imshow(softmax[head], cmap=PLAIN, vmin=0, vmax=1)
    panels[0, head].set_title(f"layer {block - 1}, head {head}", fontsize=7)
    panels[1, head].set_title(f"layer {block}, head {head}", fontsize=7)
for row in panels[:, 0]:
    row.set_yticks(range(0, few, 2), [plot.shown(x, 9) for x in labels[:few:2]], fontsize=6)
for axes in panels[1]:
    axes.set_xticks([])
plt.show()

# %% [markdown]
# A linear head draws with two colours and has a reach: beyond it nothing is left. Softmax spreads over the whole text, and
# never subtracts. How far back, on average, and how much is taken away rather than added:

# %%
distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp_min(0)
print("layer  kind     mean distance of each head, tokens")
for i, kind in enumerate(config.layer_types):
    share = acts["pattern", i][0].abs()
    share = share / share.sum(-1, keepdim=True)
    back = (share * distance).sum(-1).mean(-1)  # (heads,)
    print(f"{i:5}  {kind.split('_')[0]:8} {'  '.join(f'{x:5.1f}' for x in back.tolist())}")
entries = torch.cat([acts["pattern", i].flatten() for i in linear])
print(f"{entries[entries < 0].abs().sum() / entries.abs().sum():.0%} of all that linear heads weigh is negative")
assert bool((entries < 0).any())

# %% [markdown]
# ## Wiping the memory
#
# What are the states for? The model reads the first half of the story, and then, before it goes on, its states are emptied by
# a hook. Or else its full attention layers are made blind to that half. How much worse does it guess the second half?


# %%
half = T // 2


def empty_state(heads=slice(None)):
    def edit(state, hook):  # (B, P, Dk, Dv)
        state[:, heads] = 0

    return edit


def look_away(pattern, hook):  # (B, N, T, S): as if the first half were not there
    pattern[..., :half] = 0
    return pattern / pattern.sum(-1, keepdim=True)


def second_half(while_reading=(), afterwards=()):
    """Loss on the second half, in nats per token, with hooks while the first is read and afterwards."""
    cache = model.make_cache()
    with model.hooks(while_reading):
        model(story[:, :half], cache=cache)
    with model.hooks(afterwards):
        logprobs = model(story[:, half:-1], cache=cache).log_softmax(-1)
    return -logprobs.gather(-1, story[:, half + 1 :, None]).mean().item()


wipe = [(f"blocks.{i}.attn.hook_state", empty_state()) for i in linear]
blind = [(f"blocks.{i}.attn.hook_pattern", look_away) for i in full]
whole = second_half()
full_pass = model(story)[0, half:-1].log_softmax(-1).gather(-1, story[0, half + 1 :, None])
torch.testing.assert_close(torch.tensor(whole), -full_pass.mean(), rtol=1e-4, atol=1e-4)

print(f"with its memory          {whole:.3f} nats per token")
cost = {
    "states emptied": second_half(wipe) - whole,
    "full layers made blind": second_half((), blind) - whole,
    "both": second_half(wipe, blind) - whole,
}
for name, change in cost.items():
    print(f"{name:24} {change:+.3f}")
if cost["both"] < 0.02:
    print("-> This model makes next to nothing of what it has read.")
elif cost["states emptied"] > cost["full layers made blind"]:
    print("-> It relies more on its states than on the keys of its full layers.")
else:
    print("-> It relies more on the keys of its full layers than on its states.")

# %% [markdown]
# The same for one head at a time. A head that matters here should have a long half-life, for what another one held would soon
# have faded anyway; but a long life alone does not make it matter.

# %%
damage = torch.zeros(len(linear), P)
for i, layer in enumerate(linear):
    for head in range(P):
        damage[i, head] = second_half([(f"blocks.{layer}.attn.hook_state", empty_state([head]))]) - whole

figure, panels = plt.subplots(1, 2, figsize=(7, 2.5), layout="constrained", width_ratios=(1.2, 1))
reach = damage.abs().max().item()
image = panels[0].imshow(damage, cmap=SIGNED, vmin=-reach, vmax=reach, aspect="auto", origin="lower")
panels[0].set_yticks(range(len(linear)), [f"layer {i}" for i in linear])
panels[0].set(xlabel="head")
figure.colorbar(image, ax=panels[0], label="change of the loss, nats")
panels[1].semilogx(typical, damage.abs(), "o", color=STYLE.lines[0], markersize=3)
panels[1].set(xlabel="half-life, tokens", ylabel="change, either way")
plt.show()
short = damage[typical < 0.5].abs()
if len(short):
    print(f"largest change by a head that keeps half a write for less than half a token: {short.max():.4f}")
print(f"largest change by any: {damage.abs().max():.4f}")

# %% [markdown]
# ## Going back
#
# An assistant that has guessed wrong, a search that tries two continuations, a chat whose last answer is regenerated: all take
# back tokens. Keys and values of a token can be dropped. But a state has swallowed it. Can the rule be undone? On paper yes:
#
# $$S_{t-1} = \tfrac{1}{a_t} \Big(I + \tfrac{\beta_t}{1 - \beta_t} k_t k_t^\top\Big)(S_t - \beta_t k_t v_t^\top).$$
#
# But it divides by what was nearly erased. Going back in 32 bits through one layer of the story:

# %%
layer = linear[0]
_, k, v, a, b = rule_of(layer)
true = states(k, v, a, b)
k, v, a, b, S = (x.float() for x in (k, v, a, b, true[-1]))
print("tokens taken back   relative error of each head's state")
for back in range(1, 9):
    t = T - back
    S = S - torch.einsum("pk,pv->pkv", k[t], b[t, :, None] * v[t])
    S = S + (b[t] / (1 - b[t]))[:, None, None] * torch.einsum("pk,pv->pkv", k[t], torch.einsum("pk,pkv->pv", k[t], S))
    S = S / a[t, :, None, None]
    if back & (back - 1) == 0:
        wrong = (S - true[t - 1]).flatten(1).norm(dim=-1) / true[t - 1].flatten(1).norm(dim=-1)
        print(f"{back:17}   {'  '.join(f'{x:7.0e}' for x in wrong.tolist())}")

# %% [markdown]
# Whatever fades fast is lost beyond recall. So a state must be *remembered* where one may wish to come back to. A cache of
# this package remembers nothing by itself, and says so:

# %%
prompt, wrong_turn, right_turn = (torch.tensor([tokenizer.encode(text)]) for text in (
    "Lily had a small red", " dog and", " ball. She"))  # fmt: skip
length = prompt.shape[1]
cache = model.make_cache()
model(prompt, cache=cache)
model(wrong_turn, cache=cache)
try:
    cache.truncate(length)
except RequestError as refusal:
    print(refusal)

# %% [markdown]
# `mark` remembers the present place, at the cost of one more state per linear layer:

# %%
cache = model.make_cache()
model(prompt, cache=cache)
cache.mark()
before = cache.snapshot().nbytes()
model(wrong_turn, cache=cache)
print(f"{before:,} bytes at the mark; {cache.snapshot().nbytes():,} with the wrong turn and the state at the mark")
cache.truncate(length)
again = model(right_turn, cache=cache)
fresh = model(torch.cat((prompt, right_turn), dim=1))[:, length:]
print(f"largest difference to a model that never took the wrong turn: {(again - fresh).abs().max():.0e}")
torch.testing.assert_close(again, fresh, rtol=0, atol=1e-4)

# %% [markdown]
# `snapshot` copies everything into a cache of its own, to branch as often as one likes; and `rewind` remembers the state at
# each of the last few tokens, which is what guessing ahead needs.

# %%
cache = model.make_cache()
model(prompt, cache=cache)
branch = cache.snapshot()
for text in (" ball", " dog", " car"):
    cache.restore(branch)
    following = model(torch.tensor([tokenizer.encode(text)]), cache=cache)[0, -1]
    print(f"Lily had a small red{text} -> {tokenizer.decode([int(following.argmax())])!r}")

cache = model.make_cache(rewind=3)
model(prompt, cache=cache)
for token in right_turn[0, :3]:
    model(token[None, None], cache=cache)
at = cache.length
print(f"{at} tokens; can be cut back to", [n for n in range(1, at + 1) if cache.reachable(n) == n])
assert all(cache.reachable(n) == n for n in range(at - 3, at + 1))

# %% [markdown]
# ## Guessing ahead
#
# That is also what the *draft layer* of these models (multi-token prediction) rests on. It guesses a few tokens, the model
# reads them all in one pass, and at the first wrong guess all caches go back. The text is the same as without guesses.

# %%
START = "Once upon a time, there was a little girl named Lily."
plain = qr.generate(model, tokenizer, START, max_tokens=60, temperature=0)[0]
print(repr(plain.text))
for guesses in (1, 2, 3):
    drafted = qr.generate(model, tokenizer, START, max_tokens=60, temperature=0, speculate=guesses)[0]
    usage = drafted.usage
    print(f"{guesses} at a time: {usage.accepted_tokens} of {usage.drafted_tokens} guesses right, "
          f"{usage.completion_tokens - usage.accepted_tokens} passes for {usage.completion_tokens} tokens")
    assert drafted.token_ids == plain.token_ids

# %% [markdown]
# ## The same on a real model
#
# Set `MODEL = "Qwen/Qwen3.5-0.8B"` in the first cell and run all cells again (a download of about 2 GB, 6 GB of memory in
# 32-bit, and some minutes for the heads that are wiped one by one). Its linear layers have 16 heads of 128 x 128 numbers.
#
# What else has changed from generation to generation is in [the family tree](09_family_tree.ipynb).

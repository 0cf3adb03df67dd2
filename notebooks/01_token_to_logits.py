# %% [markdown]
# # From a token to the logits
#
# A language model is a function: a list of token numbers goes in, one score per token of the vocabulary comes out. This
# notebook computes that function by hand, with nothing but tensor operations, for one prompt and for every layer. After
# each step the result is compared with what the package's model computed at the same place.
#
# Letters in shapes: $B$ sequences in the batch (here 1), $T$ tokens, $H$ hidden size, $N$ query heads, $K$ key/value
# heads, $D$ head dimension, $I$ width of the feed-forward, $V$ vocabulary.

# %%
import matplotlib.pyplot as plt
import torch

import qwen_ref as qr

MODEL = "tiny"
PROMPT = "Once upon a time, there was a little girl named"

torch.manual_seed(0)
torch.set_grad_enabled(False)
qr.backend.use("eager")  # run every operation as its formula stands, not as a fused kernel
model, tokenizer = qr.load(MODEL, device="cpu", dtype="float32", progress=False)
config = model.config
weight = dict(model.named_parameters())  # official name -> tensor
print(f"{model.num_parameters():,} parameters, {config.num_hidden_layers} layers")
H, N, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
print(f"H={H}, N={N}, K={K}, D={D}, I={config.intermediate_size}, V={config.vocab_size}")

# %% [markdown]
# ## Text to tokens
#
# The tokenizer cuts the text into pieces of its vocabulary and gives each piece's number. A piece is a run of *bytes*, and
# it usually carries the space before a word. Put together again the pieces are the text, byte for byte.

# %%
ids = tokenizer.encode(PROMPT)
T = len(ids)
for position, i in enumerate(ids):
    print(position, i, tokenizer.token_bytes(i))
assert b"".join(tokenizer.token_bytes(i) for i in ids) == PROMPT.encode()

# %% [markdown]
# ## The answers, to check against
#
# `run_with_cache` runs the model once and keeps the activations whose names match. Here all of them: `*`. `check` compares
# a tensor of ours with the one the model had at that place, by the relative error
#
# $$\frac{\lVert \text{ours} - \text{model's} \rVert_2}{\lVert \text{model's} \rVert_2},$$
#
# which in 32-bit arithmetic should be near $10^{-7}$: sums taken in another order round differently, nothing more.

# %%
input_ids = torch.tensor([ids])  # (B, T)
logits, acts = model.run_with_cache(input_ids, "*")


def check(name, ours, allowed=1e-5):
    theirs = acts[name]
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert ours.shape == theirs.shape and error <= allowed, (name, ours.shape, theirs.shape, error)
    print(f"{name:32} {list(ours.shape)!s:18} relative error {error:.0e}")


print(len(acts), "activations captured; those of layer 0:")
print(", ".join(name.removeprefix("blocks.0.") for name in acts if name.startswith("blocks.0.")))

# %% [markdown]
# ## Embedding
#
# Each token number selects one row of a table $E \in \mathbb{R}^{V \times H}$. Selecting row $i$ is the same as multiplying
# a vector that is 1 at $i$ and 0 elsewhere by the table, so the embedding is a linear layer like the others. The $T$ rows
# are the start of the *residual stream*: every layer reads it and adds something to it.

# %%
table = weight["model.embed_tokens.weight"]  # (V, H)
x = table[input_ids]  # (B, T, H)
one_hot = torch.nn.functional.one_hot(input_ids, config.vocab_size).float()  # (B, T, V)
torch.testing.assert_close(one_hot @ table, x)
check("hook_embed", x)

# %% [markdown]
# ## RMSNorm
#
# Before a layer reads the stream, each vector is scaled to a root mean square of one and then, coordinate by coordinate,
# by a learned weight $w$:
#
# $$\operatorname{rms}(x) = \sqrt{\tfrac1H \textstyle\sum_j x_j^2 + \varepsilon}, \qquad
#   \operatorname{norm}(x)_j = w_j \, \frac{x_j}{\operatorname{rms}(x)}.$$
#
# No mean is subtracted and no bias is added. The length of a vector in the stream is thereby hidden from the layer; its
# direction is what is read.


# %%
def rms_norm(x, w):
    rms = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    return w * (x / rms)


layer = "model.layers.0"
normed = rms_norm(x, weight[f"{layer}.input_layernorm.weight"])  # (B, T, H)
check("blocks.0.ln1.hook_out", normed)
print("length of the vectors before:", x[0].norm(dim=-1)[:4])
print("without the weight, after:   ", acts["normalized", 0, "ln1"][0].norm(dim=-1)[:4], f"= sqrt({H}) = {H**0.5:.4f}")

# %% [markdown]
# ## Queries, keys, values
#
# Three matrices turn each normed vector into a query ("what am I looking for"), a key ("what can I be found by") and a
# value ("what do I pass on"). They are cut into heads of $D$ numbers. There are $N$ query heads and only $K$ key and value
# heads: $N/K$ query heads share one, and the cache that a running chat has to keep is $N/K$ times smaller for it.


# %%
def heads(x, projection):
    return (x @ weight[projection].T).unflatten(-1, (-1, D))  # (B, T, heads, D)


q = heads(normed, f"{layer}.self_attn.q_proj.weight")  # (B, T, N, D)
k = heads(normed, f"{layer}.self_attn.k_proj.weight")  # (B, T, K, D)
v = heads(normed, f"{layer}.self_attn.v_proj.weight")  # (B, T, K, D)
check("blocks.0.attn.hook_q", q)
check("blocks.0.attn.hook_k", k)
check("blocks.0.attn.hook_v", v)

# %% [markdown]
# Qwen3 then normalises every query and every key, head by head, over its $D$ numbers. One weight vector serves all query
# heads of a layer and another all its key heads. Values are left alone. (Qwen2 has biases instead; notebook 05 turns one
# into the other.)

# %%
q = rms_norm(q, weight[f"{layer}.self_attn.q_norm.weight"])  # (B, T, N, D)
k = rms_norm(k, weight[f"{layer}.self_attn.k_norm.weight"])  # (B, T, K, D)
check("blocks.0.attn.hook_q_normed", q)
check("blocks.0.attn.hook_k_normed", k)

# %% [markdown]
# ## Rotation by position
#
# Nothing so far knows where a token stands. RoPE pairs number $j$ of a head with number $j + D/2$, takes each pair for a
# complex number, and turns it by an angle that grows with the position $m$:
#
# $$z_j = x_j + i\,x_{j+D/2}, \qquad z_j' = z_j \, e^{\,i m \omega_j}, \qquad \omega_j = \theta^{-2j/D}.$$
#
# The package does this with cosines and sines; here it is done with complex numbers, and the two agree.


# %%
def rotate(x, first_position=0):  # (B, T, heads, D)
    frequencies = config.rope.theta ** (-torch.arange(0, D, 2) / D)  # (D/2,) radians per position
    angles = torch.arange(first_position, first_position + x.shape[1])[:, None] * frequencies  # (T, D/2)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])  # (B, T, heads, D/2)
    z = z * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((z.real, z.imag), dim=-1)  # (B, T, heads, D)


q, k = rotate(q), rotate(k)
check("blocks.0.attn.hook_rot_q", q)
check("blocks.0.attn.hook_rot_k", k)

# %% [markdown]
# ## Scores, mask, softmax
#
# The score of a query $t$ for a key $s$ is their dot product, divided by $\sqrt D$ so that its spread does not grow with
# the head dimension. A query must not see later tokens: those scores are set to the lowest number there is, and the
# softmax makes them exactly zero. Every row of the pattern then sums to one.
#
# $$p_{ts} = \operatorname{softmax}_s\!\left(\frac{q_t \cdot k_s}{\sqrt D}\right) \quad \text{over } s \le t.$$

# %%
keys = k.repeat_interleave(N // K, dim=2)  # (B, T, N, D): query head n reads key head n // (N/K)
scores = torch.einsum("btnd,bsnd->bnts", q, keys) / D**0.5  # (B, N, T, T)
causal = torch.ones(T, T).tril().bool()
scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
powers = (scores - scores.amax(-1, keepdim=True)).exp()  # the largest subtracted, so that none overflows
pattern = powers / powers.sum(-1, keepdim=True)  # softmax, by its definition
torch.testing.assert_close(scores[..., causal], acts["attn_scores", 0][..., causal], rtol=1e-4, atol=1e-4)
check("blocks.0.attn.hook_pattern", pattern)
print("largest weight on a later token:", pattern[..., ~causal].max().item())

# %% [markdown]
# One head's pattern. Each row is a token that looks, each column one that is looked at; a row's numbers sum to one.

# %%
tokens = [tokenizer.decode([i]) for i in ids]
figure, axes = plt.subplots(figsize=(4.2, 3.6))
axes.imshow(pattern[0, 0], cmap="Blues", vmin=0, vmax=1)
axes.set(xticks=range(T), yticks=range(T), xlabel="key", ylabel="query", title="layer 0, head 0")
axes.set_xticklabels(tokens, rotation=90)
axes.set_yticklabels(tokens)
plt.show()

# %% [markdown]
# ## Mixing the values, and back into the stream
#
# Each head returns the average of the values under its pattern. The heads are laid side by side and one matrix brings them
# back to $H$ numbers. Because that matrix is linear, the output is also a sum of one contribution per head, which is why
# one can speak of what a single head writes.

# %%
values = v.repeat_interleave(N // K, dim=2)  # (B, T, N, D)
z = torch.einsum("bnts,bsnd->btnd", pattern, values)  # (B, T, N, D)
check("blocks.0.attn.hook_z", z)
output = weight[f"{layer}.self_attn.o_proj.weight"]  # (H, N*D)
attention_out = z.flatten(2) @ output.T  # (B, T, H)
check("blocks.0.hook_attn_out", attention_out)
per_head = torch.einsum("btnd,hnd->btnh", z, output.unflatten(1, (N, D)))  # (B, T, N, H)
check("blocks.0.attn.hook_result", per_head)
torch.testing.assert_close(per_head.sum(2), attention_out, rtol=1e-4, atol=1e-5)

x = x + attention_out
check("blocks.0.hook_resid_mid", x)

# %% [markdown]
# ## The feed-forward
#
# The second half of a block treats every position by itself. Two matrices go up to $I$ numbers; one result, through the
# smooth gate $\operatorname{silu}(g) = g\,\sigma(g)$, says how much of the other passes; a third matrix goes back down:
#
# $$\operatorname{mlp}(x) = W_\text{down}\,\bigl(\operatorname{silu}(W_\text{gate}\,x) \odot W_\text{up}\,x\bigr).$$


# %%
def mlp(x, path):
    gate = x @ weight[f"{path}.gate_proj.weight"].T  # (B, T, I)
    up = x @ weight[f"{path}.up_proj.weight"].T  # (B, T, I)
    return (gate * torch.sigmoid(gate) * up) @ weight[f"{path}.down_proj.weight"].T  # (B, T, H)


mlp_out = mlp(rms_norm(x, weight[f"{layer}.post_attention_layernorm.weight"]), f"{layer}.mlp")
check("blocks.0.hook_mlp_out", mlp_out)
x = x + mlp_out
check("blocks.0.hook_resid_post", x)

# %% [markdown]
# ## All layers
#
# That was one block; the others do the same with their own weights. Here it is in one piece, run through the whole model.


# %%
def attention(x, path):
    q = rotate(rms_norm(heads(x, f"{path}.q_proj.weight"), weight[f"{path}.q_norm.weight"]))
    k = rotate(rms_norm(heads(x, f"{path}.k_proj.weight"), weight[f"{path}.k_norm.weight"]))
    v = heads(x, f"{path}.v_proj.weight")
    k, v = (tensor.repeat_interleave(N // K, dim=2) for tensor in (k, v))
    scores = torch.einsum("btnd,bsnd->bnts", q, k) / D**0.5
    pattern = scores.masked_fill(~causal, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("bnts,bsnd->btnd", pattern, v).flatten(2) @ weight[f"{path}.o_proj.weight"].T


def block(x, path):
    x = x + attention(rms_norm(x, weight[f"{path}.input_layernorm.weight"]), f"{path}.self_attn")
    return x + mlp(rms_norm(x, weight[f"{path}.post_attention_layernorm.weight"]), f"{path}.mlp")


x = table[input_ids]
for i in range(config.num_hidden_layers):
    x = block(x, f"model.layers.{i}")
    check(f"blocks.{i}.hook_resid_post", x, allowed=1e-4)

# %% [markdown]
# ## The head
#
# A last norm, and then every vocabulary entry's vector is compared with the final vector by a dot product. In small Qwen
# models these vectors are the embedding table itself ("tied" weights): what reads tokens in also reads them out.

# %%
final = rms_norm(x, weight["model.norm.weight"])  # (B, T, H)
check("ln_final.hook_out", final, allowed=1e-4)
ours = final @ model.lm_head.weight.T  # (B, T, V)
check("hook_logits", ours, allowed=1e-4)
print("tied:", config.tie_word_embeddings)
print(f"largest difference of any logit from model(input_ids): {(ours - model(input_ids)).abs().max():.1e}")

# %% [markdown]
# The softmax of the last row is the model's bet on the next token, given the whole prompt. The earlier rows are its bets
# after each prefix: all $T$ predictions come out of one pass, which is what makes training affordable.

# %%
probability, best = ours[0, -1].softmax(-1).topk(5)
for p, i in zip(probability.tolist(), best.tolist(), strict=True):
    print(f"{p:6.1%}  {tokenizer.decode([i])!r}")

[result] = qr.generate(model, tokenizer, PROMPT, max_tokens=1, temperature=0)
print("\nqr.generate at temperature 0 chooses:", repr(result.text))
assert result.token_ids == [int(best[0])]

# %% [markdown]
# ## Why a cache is enough
#
# To go on, the new token is appended and the function is computed again. Earlier rows of every layer cannot change, since
# no row looks at a later one. And of an earlier position a later one only ever reads the rotated key and the value. Kept,
# those make the next step a pass over one single token.

# %%
longer = torch.cat((input_ids, best[:1][None]), dim=1)  # (B, T+1)
everything_again = model(longer)[:, -1]

cache = model.make_cache()
model(input_ids, cache=cache)  # the prompt fills the cache
one_token = model(longer[:, -1:], cache=cache)[:, -1]
torch.testing.assert_close(one_token, everything_again, rtol=1e-4, atol=1e-4)
print(f"largest difference between the two: {(one_token - everything_again).abs().max():.1e}")
numbers = 2 * config.num_hidden_layers * K * D
print(f"kept per token: 2 x {config.num_hidden_layers} layers x {K} heads x {D} = {numbers:,} numbers")

# %% [markdown]
# ## The same on a real model
#
# Set `MODEL = "Qwen/Qwen3-0.6B"` in the first cell and run all cells again: nothing else changes but the sizes (a download
# of 1.5 GB, and 3 GB of memory in 32-bit). Any dense Qwen3 will do.

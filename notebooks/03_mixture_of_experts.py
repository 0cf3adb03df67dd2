# %% [markdown]
# # Mixture of experts
#
# In a sparse layer the feed-forward is split into $E$ small ones, the experts, and a router sends each token through $k$ of
# them. The model holds the parameters of all and pays, per token, for $k$. This notebook routes by hand, then watches the
# routers of a trained model: how even their load is, what their experts take, and what the choice is worth.

# %%
import torch
import torch.nn.functional as F

import qwen_ref as qr
from qwen_ref import plot
from qwen_ref.study import routing

MODEL = "tiny-moe"

torch.manual_seed(0)
torch.set_grad_enabled(False)
qr.backend.use("eager")  # run every operation as its formula stands, not as a fused kernel
model, tokenizer = qr.load(MODEL, device="cpu", dtype="float32", progress=False)
config = model.config
E, k = config.num_experts, config.num_experts_per_tok
sparse = [i for i, is_sparse in enumerate(config.sparse_layers) if is_sparse]
print(f"{config.model_type}: {E} experts, {k} per token, in {len(sparse)} of {config.num_hidden_layers} layers")

# %% [markdown]
# Some simple English to route, eight short texts:

# %%
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play with her dog, Max. One day, Max ran away.",
    "Tom and Sam were best friends. They played in the park every day. Tom had a red ball and Sam had a blue kite.",
    "The old king had three sons. The first was strong, the second was clever, and the youngest was kind to all animals.",
    'Mia looked out of the window. "It is raining, Mom!" she said. "Can I go outside and jump in the puddles?"',
    'A small bird sat in a tall tree. It wanted to fly, but it was afraid. Its mother said, "Do not be scared. Try again!"',
    "Ben found a shiny stone near the river. He put it in his pocket and ran home to show it to his grandma.",
    "The cat was hungry. She looked for food in the kitchen, but there was only a bowl of milk. She drank it all.",
    "They shared the cake and laughed. At night they were tired, so they said good night and went to bed. The end.",
]
ids = [tokenizer.encode(text) for text in TEXTS]
print(sum(map(len, ids)), "tokens,", len({i for row in ids for i in row}), "different")

# %% [markdown]
# ## Routing by hand
#
# The router is one matrix: a score per expert. The scores become probabilities over *all* experts first; then the $k$ largest
# are taken; then, if the config says so, these are divided by their sum. The output is the weighted sum of what the chosen
# experts compute, each a small SwiGLU:
#
# $$p = \operatorname{softmax}(W_r x), \qquad C = \text{top-}k(p), \qquad
#   y = \sum_{e \in C} \frac{p_e}{\sum_{c \in C} p_c}\; f_e(x), \qquad
#   f_e(x) = W^\text{down}_e \bigl(\operatorname{silu}(W^\text{gate}_e x) \odot W^\text{up}_e x\bigr).$$

# %%
layer = sparse[0]
row = torch.tensor([ids[0]])
logits, acts = model.run_with_cache(row, f"blocks.{layer}.*")
x = acts["out", layer, "ln2"][0]  # (T, H) what the sparse layer reads
mlp = model.model.layers[layer].mlp

probabilities = (x @ mlp.gate.weight.T).softmax(-1)  # (T, E)
chosen = probabilities.argsort(-1, descending=True)[:, :k]  # (T, k)
weights = probabilities.gather(1, chosen)  # (T, k)
if config.norm_topk_prob:
    weights = weights / weights.sum(-1, keepdim=True)

weight = dict(mlp.experts.named_parts())  # each expert's three matrices, by their names in the checkpoint
by_hand = torch.zeros_like(x)
for t in range(len(x)):
    for e, share in zip(chosen[t].tolist(), weights[t], strict=True):
        gate, up = x[t] @ weight[f"{e}.gate_proj.weight"].T, x[t] @ weight[f"{e}.up_proj.weight"].T
        by_hand[t] += share * ((F.silu(gate) * up) @ weight[f"{e}.down_proj.weight"].T)

assert torch.equal(chosen, acts["topk_idx", layer][0])
torch.testing.assert_close(weights, acts["topk_weights", layer][0])
torch.testing.assert_close(by_hand, acts["expert_out", layer][0], rtol=1e-4, atol=1e-5)
print(f"largest difference of the layer's output: {(by_hand - acts['expert_out', layer][0]).abs().max():.1e}")
for t in range(3):
    mix = ", ".join(f"{share:.0%} of expert {e}" for e, share in zip(chosen[t].tolist(), weights[t].tolist(), strict=True))
    print(f"{tokenizer.decode(row[0, t : t + 1])!r:10} takes {mix}")

# %% [markdown]
# What a token pays for, against what the model holds:

# %%
expert = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
total = model.num_parameters()
print(f"parameters {total:,}, of which in experts {expert:,}; active per token {total - expert + expert * k // E:,}")

# %% [markdown]
# ## Load
#
# Let $f_e$ be the share of all choices that fell on expert $e$; even would be $1/E$. Three numbers say how even a layer is:
# the *effective* number of experts $\exp(-\sum_e f_e \ln f_e)$, which is $E$ if all are used alike; the routers' mean
# entropy, which is $\ln E$ if they are undecided on every token and 0 if sure; and the *balance* $E \sum_e f_e \bar p_e$,
# the quantity that training holds near 1 lest a few experts take everything.

# %%
routes = routing.route(model, *ids)
print(f"layer  effective of {E}  entropy of {torch.tensor(E).log():.2f}  balance")
for i, number in enumerate(routes.layers):
    print(f"{number:5}  {routes.effective[i]:14.2f}  {routes.entropy[i]:15.2f}  {routes.balance[i]:7.3f}")
share = routes.experts[0].flatten().bincount(minlength=E) / routes.experts[0].numel()
torch.testing.assert_close(share, routes.load[0])
plot.router_load(routes)

# %% [markdown]
# ## What an expert takes
#
# For each expert of a layer, the tokens it prefers: those whose chance to be sent to it exceeds the average token's the
# most, among tokens that occur at least twice. The layer shown is the one in which the token says most about the expert.
#
# How much it says is the mutual information of token and first choice. Few tokens always seem to say something, by
# accident; so the same is computed with the choices shuffled among the tokens, ten times, and the mean taken off.


# %%
def information(a, b):
    """Mutual information of two label sequences, in nats."""
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1).index_put((a, b), torch.ones(len(a)), accumulate=True) / len(a)
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    return torch.special.xlogy(joint, joint / independent.clamp_min(1e-12)).sum().item()


vocabulary, token = routes.ids.unique(return_inverse=True)  # token (T,): index into vocabulary
said = []
for i, number in enumerate(routes.layers):
    first = routes.experts[i, :, 0]
    accident = sum(information(token, first[torch.randperm(len(first))]) for _ in range(10)) / 10
    said.append(information(token, first) - accident)
    print(f"layer {number}: the token says {said[-1]:.2f} nats more about the first expert than by accident")
clearest = max(range(len(said)), key=said.__getitem__)

# %%
layer = routes.layers[clearest]
went = torch.zeros(len(routes.ids), E).scatter(1, routes.experts[clearest], 1.0)  # (T, E): 1 where sent
count = token.bincount(minlength=len(vocabulary))  # occurrences of each token
rate = torch.zeros(len(vocabulary), E).index_add(0, token, went) / count[:, None]  # how often each was sent where
lift = (rate - went.mean(0)).masked_fill(count[:, None] < 2, -torch.inf)
for e in range(min(E, 12)):
    best = [i for i in lift[:, e].argsort(descending=True)[:8].tolist() if lift[i, e] > 0.2]
    print(f"layer {layer}, expert {e}: " + " ".join(repr(tokenizer.decode([int(vocabulary[i])])) for i in best))

# %% [markdown]
# One text through that layer: each column is a token, its coloured cells the experts it takes and how much of each.

# %%
one = routing.route(model, ids[0])
plot.experts_by_token(one, layer, plot.token_labels(tokenizer, ids[0]))

# %% [markdown]
# ## Token or context?
#
# The first sparse layers see little besides the token itself, later ones the sentence around it. If the choice hung on the
# token alone, two occurrences of it would always be sent to the same first expert. How often they are, against how often two
# tokens drawn at random are:

# %%
same_token = (token[:, None] == token).triu(1)  # (T, T) pairs of occurrences
for i, number in enumerate(routes.layers):
    first = routes.experts[i, :, 0]
    agree = first[:, None] == first
    everyone = agree.float().fill_diagonal_(0).sum() / (len(first) * (len(first) - 1))
    print(f"layer {number}: same token {agree[same_token].float().mean():4.0%}, any two {everyone:4.0%}")

# %% [markdown]
# ## Who works together
#
# A token takes $k$ experts, so some pairs meet often. The most frequent pairs of the layer above, against chance: choices
# made by the loads alone. No token takes an expert twice, so chance is a little less than the product of the two loads
# (the factor is exact where the loads are even).

# %%
together = routes.coactivation[clearest]
alone = together.diagonal()
twice = (k - 1) / k * E / (E - 1)  # k (k-1) ordered pairs among E (E-1), against k^2 among E^2
pairs = [(float(together[a, b]), float(alone[a] * alone[b]) * twice, a, b) for a in range(E) for b in range(a)]
for seen, expected, a, b in sorted(pairs, reverse=True)[:4]:
    print(f"experts {b} and {a}: {seen:.1%} of tokens, by chance {expected:.1%}")
torch.testing.assert_close(alone.sum(), torch.tensor(float(k)))  # k experts per token
plot.coactivation(routes, layer)

# %% [markdown]
# ## What renormalisation changes
#
# Before dividing, the chosen probabilities add up to less than one, the less the more undecided the router is. Dividing
# therefore multiplies the layer's output by the inverse of that sum, and gives every token an output of full strength.

# %%
for i, number in enumerate(routes.layers):
    kept = routes.probs[i].topk(k).values.sum(-1)
    print(f"layer {number}: the {k} chosen hold {kept.mean():.0%} on average, {kept.min():.0%} to {kept.max():.0%}")

mlp = model.model.layers[sparse[0]].mlp
_, acts = model.run_with_cache(row, f"blocks.{sparse[0]}.*")
mlp.normalize = not mlp.normalize
_, other = model.run_with_cache(row, f"blocks.{sparse[0]}.*")
mlp.normalize = not mlp.normalize
normed, plain = (acts, other) if mlp.normalize else (other, acts)
kept = normed["router_probs", sparse[0]].topk(k).values.sum(-1, keepdim=True)  # (B, T, 1)
torch.testing.assert_close(plain["expert_out", sparse[0]], kept * normed["expert_out", sparse[0]], rtol=1e-4, atol=1e-5)
print("plain output = sum of the chosen probabilities * renormalised output")

# %% [markdown]
# A model trained with one rule and run with the other has all its experts too quiet or too loud. That is a real and silent
# bug class: nothing crashes. The loss is the mean of $-\log p(\text{next token})$ over the eight texts.


# %%
def loss(hooks=()):
    total = 0.0
    for row in ids:
        tokens = torch.tensor([row])
        logprobs = model.run_with_hooks(tokens, hooks)[:, :-1].log_softmax(-1)
        total -= logprobs.gather(-1, tokens[:, 1:, None]).sum().item()
    return total / sum(len(row) - 1 for row in ids)


def set_normalize(value):
    for i in sparse:
        model.model.layers[i].mlp.normalize = value


as_trained = loss()
set_normalize(not config.norm_topk_prob)
print(f"as the config says (norm_topk_prob {config.norm_topk_prob}): {as_trained:.3f}; the other way: {loss():.3f}")
set_normalize(config.norm_topk_prob)

# %% [markdown]
# ## What the choice is worth
#
# The router's choice is replaced by others: only the first of its experts, its weight unchanged; the next best $k$, with
# the weights that their own scores give; and $k$ drawn at random, under the weights of the experts they replace. If experts
# were interchangeable, the last two would cost nothing.


# %%
def next_best(logits, hook):  # (B, T, E): the k best can no longer be chosen
    return logits.scatter(-1, logits.topk(k).indices, torch.finfo(logits.dtype).min)


def at_random(chosen, hook):  # (B, T, k)
    return torch.rand(*chosen.shape[:-1], E).argsort(-1)[..., :k]


def only_first(weights, hook):  # (B, T, k), best first
    weights[..., 1:] = 0


print(f"router's choice          {as_trained:.3f}")
print(f"first expert of it only  {loss([('blocks.*.mlp.hook_topk_weights', only_first)]):.3f}")
if 2 * k <= E:
    print(f"next best {k}              {loss([('blocks.*.mlp.hook_router_logits', next_best)]):.3f}")
print(f"random {k}                 {loss([('blocks.*.mlp.hook_topk_idx', at_random)]):.3f}")

# %% [markdown]
# ## The same on a real model
#
# `Qwen/Qwen3-0.6B` is dense and has no router. Set `MODEL = "Qwen/Qwen3-30B-A3B"` in the first cell and run all cells again
# on a machine with 130 GB of memory, or 65 GB with `dtype="bfloat16"` in `load` and wider tolerances.

"""The studies against closed forms, hand-made models' own numbers, and identities that hold exactly."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conftest import TINY, make_pair

import qwen_ref as qr
from qwen_ref import backend
from qwen_ref.errors import RequestError
from qwen_ref.models import qwen1
from qwen_ref.study import attribution, heads, logit_lens, patching, profiles, routing

ALL = [pytest.param(config, id=name) for name, (_, config) in TINY.items()]
FAMILIES = {**{name: config for name, (_, config) in TINY.items()}, "qwen1": qwen1.TINY}
IDS = torch.randint(0, 211, (11,), generator=torch.Generator().manual_seed(5))


def network(kind):
    """A model of any family; transformers has no Qwen 1 to be paired with."""
    if kind != "qwen1":
        return make_pair(FAMILIES[kind])[0]
    torch.manual_seed(0)
    return qwen1.Model(qwen1.Config.from_json(qwen1.TINY)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def dense():
    return make_pair(TINY["qwen3"][1])[0]


@pytest.fixture(scope="module")
def moe():
    return make_pair(TINY["qwen3_moe"][1])[0]


# ------------------------------------------------------------------------------------------------- logit lens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ALL)
def test_the_last_entry_of_the_lens_is_the_model(config, dtype):
    model, _ = make_pair(config, dtype)
    with torch.no_grad():
        logits = model(IDS[None])[0]
    result = logit_lens.lens(model, IDS, top=211)
    expected = logits.log_softmax(-1, dtype=torch.float32)
    assert torch.equal(result.top_logprobs[-1], expected.gather(1, result.top_ids[-1]))
    assert torch.equal(result.kl[-1], torch.zeros(11))
    order = logits[:-1].float().argsort(-1, descending=True)
    for t in range(10):
        place = (order[t] == IDS[t + 1]).nonzero().item()
        ties = int((logits[t] == logits[t, IDS[t + 1]]).sum())
        assert result.next_rank[-1, t] <= place < result.next_rank[-1, t] + ties
    assert torch.equal(result.next_logprob[-1], expected[:-1].gather(1, IDS[1:, None])[:, 0])


def test_every_depth_of_the_lens_by_hand():
    """Depth d is transformers' hidden state after d blocks through its own norm and head."""
    ours, theirs = make_pair(TINY["qwen3_moe"][1])
    states = []
    for layer in theirs.model.layers:
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    final = theirs(IDS[None]).logits[0].log_softmax(-1)
    result = logit_lens.lens(ours, IDS, top=3)
    assert result.depths == (0, 1, 2, 3) and result.top_ids.shape == (4, 11, 3) and torch.equal(result.ids, IDS)
    for d, state in enumerate(states):
        here = theirs.lm_head(theirs.model.norm(state))[0].log_softmax(-1)
        torch.testing.assert_close(result.top_logprobs[d], here.topk(3).values, atol=1e-4, rtol=1e-4)
        kl = torch.nn.functional.kl_div(here, final, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(result.kl[d], kl, atol=1e-4, rtol=1e-3)
        assert (kl > 0).all()


def test_depths_can_be_chosen(dense):
    full, few = logit_lens.lens(dense, IDS), logit_lens.lens(dense, IDS.tolist(), layers=[-1, 0, 2])
    assert few.depths == (3, 0, 2)
    assert torch.equal(few.kl, full.kl[[3, 0, 2]]) and torch.equal(few.top_ids, full.top_ids[[3, 0, 2]])
    for wrong in ([4], [-5]):
        with pytest.raises(RequestError, match="no depth"):
            logit_lens.lens(dense, IDS, layers=wrong)
    for top in (0, 212):
        with pytest.raises(RequestError, match="top is"):
            logit_lens.lens(dense, IDS, top=top)
    assert logit_lens.lens(dense, [3]).next_rank.shape == (4, 0)


# ------------------------------------------------------------------------------------------------- attribution


@pytest.mark.parametrize("dtype,close", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("kind", [kind for kind, config in FAMILIES.items() if "hc_count" not in config])
def test_shares_sum_to_the_logit(kind, dtype, close):
    model, config = network(kind).to(dtype), FAMILIES[kind]
    for position, versus in ((-1, None), (4, 9)):
        result = attribution.attribute(model, IDS, 30, versus, position)
        with torch.no_grad():
            logits = model(IDS[None])[0, position]
        expected = logits[30] - (logits[9] if versus is not None else 0)
        assert torch.equal(result.logit, expected) and result.logit.dtype == dtype
        assert abs(float(result.total - expected)) < close
        assert result.heads.shape == ((5, 9) if "linear_num_key_heads" in config else (3, 6))
        assert result.mlp.shape == (len(model.model.layers),) and not result.bias.any()


def test_a_head_s_share_is_what_its_own_writing_adds_to_the_logit():
    """From the points' own names: hook_result and hook_mlp_out, pushed through the frozen norm and the head."""
    model, _ = make_pair({**TINY["qwen3"][1], "attention_bias": True}, torch.float64)
    result = attribution.attribute(model, IDS, 17)
    with backend.use({"attention": "eager"}):
        _, acts = model.run_with_cache(IDS[None], "*hook_*")
    scale = acts["ln_final.hook_scale"][0, -1]

    def share(vector):
        return (vector / scale * model.model.norm.weight) @ model.lm_head.weight[17]

    for i in range(3):
        torch.testing.assert_close(result.heads[i], share(acts["result", i][0, -1]))
        torch.testing.assert_close(result.mlp[i], share(acts["mlp_out", i][0, -1]))
        torch.testing.assert_close(result.attn[i], share(acts["attn_out", i][0, -1]))
        torch.testing.assert_close(result.bias[i], share(model.model.layers[i].self_attn.o_proj.bias))
    torch.testing.assert_close(result.embed, share(acts["hook_embed"][0, -1]))
    assert abs(float(result.total - result.logit)) < 1e-11 and result.bias.abs().min() > 0


def test_ranked_names_the_largest(dense):
    result = attribution.attribute(dense, IDS, 17)
    ranked = result.ranked(100)
    assert len(ranked) == 1 + 18 + 3 and sum(v for _, v in ranked) == pytest.approx(float(result.total), abs=1e-5)
    assert [abs(v) for _, v in ranked] == sorted((abs(v) for _, v in ranked), reverse=True)
    assert dict(ranked)["blocks.1.head.4"] == pytest.approx(float(result.heads[1, 4]))
    assert dict(ranked)["blocks.2.mlp"] == pytest.approx(float(result.mlp[2])) and len(result.ranked(3)) == 3


# ------------------------------------------------------------------------------------------------- patching


CLEAN, CORRUPTED = IDS.clone(), IDS.clone()
CORRUPTED[[2, 6]] = torch.tensor([100, 101])


@pytest.mark.parametrize("config", ALL)
def test_patching_everything_is_the_clean_run(config):
    model, _ = make_pair(config)
    clean, acts = model.run_with_cache(CLEAN[None], "blocks.*.hook_resid_p*")
    assert torch.equal(patching.run_patched(model, CORRUPTED, acts), clean)
    _, acts = model.run_with_cache(CLEAN[None], "hook_embed")
    whole = "ple_layer_ids" not in config  # or the tokens' numbers are read once more, by the n-grams
    assert torch.equal(patching.run_patched(model, CORRUPTED, acts), clean) == whole
    assert torch.equal(patching.run_patched(model, CORRUPTED, acts, [2, 6]), clean) == whole  # where the prompts differ
    assert not torch.equal(patching.run_patched(model, CORRUPTED, acts, [2]), clean)
    _, own = model.run_with_cache(CORRUPTED[None], "blocks.*.attn.hook_z")
    with torch.no_grad():
        assert torch.equal(patching.run_patched(model, CORRUPTED, own), model(CORRUPTED[None]))


def test_each_cell_is_one_run_of_its_own(dense):
    """A grid is computed in batches; every cell must be what a single patched run gives."""
    metric = patching.logit_difference(dense, 17, 30)
    names = ["blocks.*.hook_resid_pre", "blocks.1.attn.hook_rot_k"]
    grid = patching.patch(dense, CLEAN, CORRUPTED, names, metric)
    assert grid.restored.shape == (4, 11) and grid.columns == tuple(range(11)) and grid.by == "position"
    logits, acts = dense.run_with_cache(CLEAN[None], names)
    assert grid.names == (*(f"blocks.{i}.hook_resid_pre" for i in range(3)), "blocks.1.attn.hook_rot_k")
    assert grid.clean == pytest.approx(float(logits[0, -1, 17] - logits[0, -1, 30]))
    for i, name in enumerate(grid.names):
        for at in range(11):
            alone = float(metric(patching.run_patched(dense, CORRUPTED, {name: acts[name]}, [at])[0]))
            assert float(grid.restored[i, at]) == pytest.approx((alone - grid.corrupted) / (grid.clean - grid.corrupted), abs=1e-4)
    # before anything has moved, the difference is at the two positions; at the last layer nearly all is at the end
    assert grid.restored[0, [0, 1, 3, 4, 5, 7, 8, 9, 10]].abs().max() < 1e-5 and grid.restored[0, 2].abs() > 1e-3


def test_patching_by_head(dense, monkeypatch):
    metric = patching.logit_difference(dense, 17, 30)
    grid = patching.patch(dense, CLEAN, CORRUPTED, "blocks.*.attn.hook_z", metric, by="head")
    assert grid.restored.shape == (3, 6) and grid.columns == (0, 1, 2, 3, 4, 5)
    _, acts = dense.run_with_cache(CLEAN[None], "*hook_z")

    def by_hand(i, head, where=slice(None)):
        def edit(value, hook):
            value[:, where, head] = acts["z", i][:, where, head]

        logits = dense.run_with_hooks(CORRUPTED[None], [(f"blocks.{i}.attn.hook_z", edit)])
        return float(logits[0, -1, 17] - logits[0, -1, 30] - grid.corrupted) / (grid.clean - grid.corrupted)

    with torch.no_grad():
        for i in range(3):
            assert grid.restored[i].tolist() == pytest.approx([by_hand(i, head) for head in range(6)], abs=1e-4)
        few = patching.patch(dense, CLEAN, CORRUPTED, "blocks.1.attn.hook_z", metric, [2, -1], by="head")
        assert few.restored[0].tolist() == pytest.approx([by_hand(1, head, [2, 10]) for head in range(6)], abs=1e-4)
    monkeypatch.setattr(patching, "ROWS", 4)  # more cells than rows
    again = patching.patch(dense, CLEAN, CORRUPTED, "blocks.*.attn.hook_z", metric, by="head")
    torch.testing.assert_close(again.restored, grid.restored, atol=1e-4, rtol=1e-4)
    kv = patching.patch(dense, CLEAN, CORRUPTED, "blocks.0.attn.hook_v", metric, by="head")
    assert kv.columns == (0, 1)
    with backend.use({"attention": "eager"}):
        pattern = patching.patch(dense, CLEAN, CORRUPTED, "blocks.0.attn.hook_pattern", metric, by="head")
    assert pattern.columns == tuple(range(6))


def test_patching_refuses(dense, moe):
    metric = patching.logit_difference(dense, 17, 30)
    for call, message in (
        (lambda: patching.patch(dense, CLEAN, CORRUPTED[:-1], "hook_embed", metric), "11 tokens.* 10"),
        (lambda: patching.patch(dense, CLEAN, CLEAN, "hook_embed", metric), "nothing to restore"),
        (lambda: patching.patch(dense, CLEAN, CORRUPTED, "hook_embde", metric), "hook_embed"),
        (lambda: patching.patch(dense, CLEAN, CORRUPTED, "model.norm", metric), "named points"),
        (lambda: patching.patch(dense, CLEAN, CORRUPTED, "hook_embed", metric, [11]), "positions is 11"),
        (lambda: patching.patch(dense, CLEAN, CORRUPTED, "hook_embed", metric, by="head"), "by head"),
        (lambda: patching.patch(dense, CLEAN, CORRUPTED, "hook_embed", metric, by="layer"), "'layer'"),
        (lambda: patching.patch(dense, CLEAN, CORRUPTED, ["*hook_q", "*hook_k"], metric, by="head"), "separate calls"),
        (lambda: patching.patch(moe, CLEAN, CORRUPTED, "*router_probs", metric), "router_probs"),
        (lambda: patching.logit_difference(dense, 17, 211), "wrong is 211"),
    ):
        with pytest.raises(RequestError, match=message):
            call()


# ------------------------------------------------------------------------------------------------- heads


def test_head_scores_of_hand_made_patterns():
    t = 6
    previous = torch.eye(t)[[0, 0, 1, 2, 3, 4]]  # t looks at t-1, the first at itself
    first = torch.eye(t)[0].expand(t, t)
    even = torch.ones(t, t).tril() / torch.arange(1, t + 1)[:, None]
    itself = torch.eye(t)
    all4 = torch.stack((previous, first, even, itself))
    harmonic = sum(1 / n for n in range(2, t + 1)) / (t - 1)
    assert heads.previous_token(all4).tolist() == pytest.approx([1, 1 / 5, harmonic, 0])
    assert heads.first_token(all4).tolist() == pytest.approx([1 / 5, 1, harmonic, 0])
    assert heads.entropy(all4).tolist() == pytest.approx([0, 0, math.log(math.factorial(t)) / t, 0])
    assert heads.distance(all4).tolist() == pytest.approx([5 / 6, 15 / 6, 15 / 12, 0])


def test_induction_score_of_hand_made_patterns():
    period = 4
    perfect = torch.zeros(8, 8)
    perfect[:4, 0] = 1
    for t in range(4, 8):  # the same token stood at t - 4; what followed it at t - 3
        perfect[t, t - 3] = 1
    same = torch.zeros(8, 8)
    same[:4, 0] = 1
    for t in range(4, 8):
        same[t, t - 4] = 1  # looks at the token itself: not induction
    half = perfect.clone()
    half[5, 2], half[5, 0] = 0.5, 0.5
    score = heads.induction(torch.stack((perfect, same, half)), period)
    assert score.tolist() == pytest.approx([1, 0, 3.5 / 4])
    with pytest.raises(RequestError, match="read twice has 10"):
        heads.induction(perfect, 5)
    with pytest.raises(RequestError, match="at least 2"):
        heads.first_token(torch.ones(1, 1))
    with pytest.raises(RequestError, match="T, T"):
        heads.distance(torch.ones(3, 4))


def test_repeated_tokens_repeat():
    ids = heads.repeated_tokens(211, 9, seed=3)
    assert ids.shape == (18,) and torch.equal(ids[:9], ids[9:]) and not torch.equal(ids, heads.repeated_tokens(211, 9, seed=4))
    with pytest.raises(RequestError):
        heads.repeated_tokens(211, 1)


def test_a_model_s_patterns_and_summary(dense):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asking for patterns is what the study does: no warning about it
        summary = heads.summary(dense, IDS, period=7, seed=2)
        pattern = heads.patterns(dense, IDS)
    assert backend.attention.resolve(torch.device("cpu"), torch.float32).name == "torch"
    with backend.use({"attention": "eager"}):
        _, acts = dense.run_with_cache(IDS[None], "*pattern")
        _, twice = dense.run_with_cache(heads.repeated_tokens(211, 7, seed=2)[None], "*pattern")
    assert torch.equal(pattern, acts.stack("pattern")[:, 0]) and pattern.shape == (3, 6, 11, 11)
    by_hand = torch.stack([pattern[:, :, t, t - 1] for t in range(1, 11)]).mean(0)
    torch.testing.assert_close(summary.previous, by_hand)
    by_hand = torch.stack([twice.stack("pattern")[:, 0, :, t, t - 6] for t in range(7, 14)]).mean(0)
    torch.testing.assert_close(summary.induction, by_hand)
    for values in vars(summary).values():
        assert values.shape == (3, 6)
    with pytest.raises(RequestError, match="at least 2"):
        heads.summary(dense, [4])


# ------------------------------------------------------------------------------------------------- routing


def test_router_statistics_of_hand_made_choices():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])  # T=4, k=2, E=5
    load = routing.load(experts, 5)
    assert load.tolist() == pytest.approx([3 / 8, 3 / 8, 1 / 8, 1 / 8, 0])
    entropy = -(2 * 3 / 8 * math.log(3 / 8) + 2 / 8 * math.log(1 / 8))
    assert float(routing.effective(load)) == pytest.approx(math.exp(entropy))
    together = routing.coactivation(experts, 5)
    assert torch.equal(together, together.mT) and float(together.diagonal().sum()) == 2
    assert together.diagonal().tolist() == [0.75, 0.75, 0.25, 0.25, 0]
    assert (together[0, 1], together[0, 2], together[1, 3], together[2, 3]) == (0.5, 0.25, 0.25, 0)
    even = torch.full((4, 5), 0.2)
    assert routing.entropy(even).tolist() == pytest.approx([math.log(5)] * 4)
    assert routing.entropy(torch.eye(5)).tolist() == [0] * 5
    assert float(routing.balance(load, even)) == pytest.approx(1)  # one of the two even is enough
    sure = torch.eye(5)[[0, 0, 0, 3]]
    assert float(routing.balance(load, sure)) == pytest.approx(5 * (3 / 8 * 3 / 4 + 1 / 8 * 1 / 4))
    assert float(routing.effective(torch.full((7,), 1 / 7))) == pytest.approx(7)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_routing_of_a_model(kind):
    ours, theirs = make_pair(TINY[kind][1])
    logits = []
    for i in (0, 2):
        theirs.model.layers[i].mlp.gate.register_forward_pre_hook(
            lambda module, args: logits.append(args[0].reshape(-1, 48 if kind == "qwen3_moe" else 96) @ module.weight.T)
        )
    other = IDS.flip(0)[:5]
    for ids in (IDS, other):
        theirs(ids[None])
    probs = torch.stack([torch.cat(logits[i::2]) for i in range(2)]).softmax(-1)
    result = routing.route(ours, IDS, other.tolist())
    assert result.layers == (0, 2) and torch.equal(result.ids, torch.cat((IDS, other)))
    torch.testing.assert_close(result.probs, probs, atol=1e-5, rtol=1e-4)
    assert torch.equal(result.experts, probs.topk(3).indices)
    weights = probs.topk(3).values
    if kind == "qwen3_moe":
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(result.weights, weights, atol=1e-5, rtol=1e-4)
    by_token = result.by_token(2)
    assert by_token.shape == (7, 16) and ((by_token > 0).sum(0) == 3).all()
    assert by_token[result.experts[1, 4, 1], 4] == result.weights[1, 4, 1]
    assert result.load.shape == (2, 7) and result.coactivation.shape == (2, 7, 7)
    torch.testing.assert_close(result.load.sum(-1), torch.ones(2))
    torch.testing.assert_close(result.coactivation.diagonal(dim1=1, dim2=2).sum(-1), torch.full((2,), 3.0))
    torch.testing.assert_close(result.entropy, -(probs * probs.log()).sum(-1).mean(-1))
    assert ((result.effective >= 3) & (result.effective <= 7)).all() and (result.balance > 0).all()
    with pytest.raises(RequestError, match=r"layer 1 has no router; those with one: \[0, 2\]"):
        result.by_token(1)
    with pytest.raises(RequestError, match="at least one"):
        routing.route(ours)


@pytest.mark.parametrize("kind", FAMILIES)
def test_routing_of_every_family(kind):
    """What the gates of a forward said, in the layers that have one; a model without any is refused."""
    model, logits = network(kind), []
    gates = {i: block.mlp.gate for i, block in enumerate(model.model.layers) if hasattr(block.mlp, "experts")}
    assert bool(gates) == ("num_experts" in FAMILIES[kind])
    if not gates:
        with pytest.raises(RequestError, match=f"{model.config.model_type} model is dense: it has no router"):
            routing.route(model, IDS)
        return
    for gate in gates.values():
        gate.register_forward_hook(lambda module, args, output: logits.append(output.view(11, -1)))
    with torch.no_grad():
        model(IDS[None])
    result = routing.route(model, IDS)
    assert result.layers == tuple(gates)
    assert torch.equal(result.probs, torch.stack(logits[: len(gates)]).softmax(-1))


# ------------------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("config", ALL)
def test_profiles_by_hand(config):
    model, _ = make_pair(config)
    result = profiles.profile(model, IDS)
    with backend.use({"attention": "eager"}):
        _, acts = model.run_with_cache(IDS[None], "*hook_*")
    states = [x[0].flatten(1) for x in (acts["resid_pre", 0], *(acts["resid_post", i] for i in range(3)))]
    for d, x in enumerate(states):
        torch.testing.assert_close(result.resid_norm[d], x.pow(2).sum(-1).sqrt())
        assert torch.equal(result.resid_max[d], x.abs().max(-1).values)
        assert torch.equal(x.abs().gather(1, result.resid_channel[d][:, None])[:, 0], result.resid_max[d])
        assert result.resid_median[d] == x.abs().flatten().sort().values[(x.numel() - 1) // 2]
    for i in range(3):
        torch.testing.assert_close(result.attn_norm[i], acts["attn_out", i][0].norm(dim=-1))
        torch.testing.assert_close(result.mlp_norm[i], acts["mlp_out", i][0].norm(dim=-1))
    attention = [i for i, block in enumerate(model.model.layers) if hasattr(block, "self_attn")]
    assert len(result.sink) == len(result.received) == len(attention)
    for i, layer in enumerate(attention):
        pattern = acts["pattern", layer][0]
        torch.testing.assert_close(result.sink[i], pattern[:, 1:, 0].mean(-1))
        by_hand = torch.stack([pattern[:, s:, s].mean() for s in range(11)])
        torch.testing.assert_close(result.received[i], by_hand)


def test_massive_activations_are_found(dense):
    """One token whose embedding holds one huge channel: massive there, and nowhere else before a block has run."""
    model, _ = make_pair(TINY["qwen3"][1])
    model.model.embed_tokens.weight[7] *= 1e-3
    model.model.embed_tokens.weight[7, 31] = -5000
    result = profiles.profile(model, [3, 7, 5])
    assert result.resid_max[0, 1] == 5000 and result.resid_channel[0, 1] == 31
    assert result.massive()[0].tolist() == [False, True, False]
    assert not profiles.profile(dense, [3, 8, 5]).massive().any()
    assert not result.massive(least=6000).any() and not result.massive(times=1e9).any()


# ------------------------------------------------------------------------------------------------- what they take


@pytest.mark.parametrize(
    "ids,message",
    [([], "at least"), ([[1, 2], [3, 4]], "one sequence"), ([1.5, 2], "one sequence"), ([True, False], "one sequence"),
     ("text", "this str is none"), (None, "this NoneType is none"), ([[1, 2], [3]], "this list is none"), ([1 << 70], "this list"),
     ([3, 211], "0..210"), ([-1, 3], "0..210"), (torch.zeros(513, dtype=torch.long), "context of 512")],
)  # fmt: skip
def test_ids_that_are_not_one_sequence_are_refused(dense, ids, message):
    for study in (logit_lens.lens, heads.summary, profiles.profile, lambda m, i: attribution.attribute(m, i, 3)):
        with pytest.raises(RequestError, match=message):
            study(dense, ids)


def test_tokens_and_positions_that_do_not_exist_are_refused(dense):
    for options, message in (({"token": 211}, "token is 211"), ({"token": 3, "versus": -1}, "versus is -1"),
                             ({"token": "a"}, "token is 'a'; it must be a whole"), ({"token": 1.5}, "token is 1.5; it must"),
                             ({"token": 3, "versus": "b"}, "versus is 'b'"), ({"token": 3, "position": [1]}, "position is"),
                             ({"token": 3, "position": 11}, "position is 11"), ({"token": 3, "position": -12}, "11 tokens")):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            attribution.attribute(dense, IDS, **options)


def test_numbers_that_are_none_are_refused(dense):
    def patch(**options):
        return patching.patch(dense, IDS, IDS.flip(0), "hook_embed", patching.logit_difference(dense, 3, 4), **options)

    for call, message in ((lambda: logit_lens.lens(dense, IDS, layers=3), r"layers is 3; it must be a list, as \[3\]"),
                          (lambda: logit_lens.lens(dense, IDS, layers="ab"), "one of layers is 'a'; it must be a whole number"),
                          (lambda: logit_lens.lens(dense, IDS, top="a"), "top is 'a'"),
                          (lambda: patch(positions=1), r"positions is 1; it must be a list, as \[1\]"),
                          (lambda: patch(positions=torch.tensor(1)), "positions is .*must be a list"),
                          (lambda: patch(positions=[0.5]), "one of positions is 0.5"),
                          (lambda: patching.logit_difference(dense, "a", 3), "answer is 'a'"),
                          (lambda: patching.logit_difference(dense, 4, 3, "last"), "position is 'last'"),
                          (lambda: heads.summary(dense, IDS, period=2.5), "period is 2.5")):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            call()
    seven, places = torch.tensor(7), torch.tensor([1, -1])  # what stands for whole numbers
    assert attribution.attribute(dense, IDS, seven).logit == attribution.attribute(dense, IDS, 7).logit
    assert patch(positions=places).columns == (1, 10)


def test_a_model_without_a_head_is_refused():
    model, _ = make_pair(TINY["qwen3"][1])
    model.lm_head = None
    for call in (lambda: logit_lens.lens(model, IDS), lambda: attribution.attribute(model, IDS, 3)):
        with pytest.raises(RequestError, match="embedding model"):
            call()


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_what_any_trained_model_shows(name):
    """On text like its training text: the guess gets better with depth, and the last blocks have decided."""
    model, tokenizer = qr.load(name, dtype=torch.float32)
    ids = tokenizer.encode("Once upon a time, there was a little girl named Lily. She loved to play with her dog.")
    result = logit_lens.lens(model, ids)
    assert result.next_logprob[-1].mean() > result.next_logprob[1].mean() > result.next_logprob[0].mean()
    assert result.kl[1].mean() > result.kl[-2].mean()
    token = int(result.top_ids[-1, -1, 0])
    shares = attribution.attribute(model, ids, token)
    assert abs(float(shares.total - shares.logit)) < 1e-4 and shares.logit > 0


# ------------------------------------------------------------------------------------------------- found by a reader


def test_attention_received_in_a_window_is_averaged_over_those_that_see_a_token():
    config = {**TINY["qwen3"][1], "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model, _ = make_pair(config)
    ids, count = torch.arange(12) * 7 % 211, 12
    with backend.use({"attention": "eager"}):
        _, acts = model.run_with_cache(ids[None], "*hook_pattern")
    got = profiles.profile(model, ids).received
    for layer, window in enumerate(model.config.windows):
        for s in range(count):
            seen = range(s, min(count, s + (window or count)))
            wanted = torch.stack([acts["pattern", layer][0, :, t, s] for t in seen]).mean()
            torch.testing.assert_close(got[layer, s], wanted)


def test_a_lens_of_some_depths_knows_the_answers(dense):
    assert logit_lens.lens(dense, torch.arange(5), layers=[0, 1]).blocks == len(dense.model.layers)
    with pytest.raises(RequestError, match="layers is empty"):
        logit_lens.lens(dense, torch.arange(5), layers=[])


def test_activations_that_do_not_fit_are_not_put_in(dense, moe):
    ids = torch.arange(6)
    _, acts = dense.run_with_cache(torch.arange(7)[None], "blocks.1.hook_resid_pre")
    for bad, text in ((dict(acts), "as many tokens"), ({"blocks.1.hook_resid_pre": 3}, "gives tensors"),
                      ({"blocks.1.hook_resid_pre": torch.zeros(1, 6, 5)}, "as many tokens"), ({"model.layers.0": acts}, "named points"),
                      ({"blocks.1.ln1.hook_scale": torch.zeros(1, 6, 1)[..., :0]}, "as many tokens")):  # fmt: skip
        with pytest.raises(RequestError, match=text):
            patching.run_patched(dense, ids, bad)
    _, acts = dense.run_with_cache(ids[None], "blocks.1.hook_resid_pre", dtype=torch.float64)
    torch.testing.assert_close(patching.run_patched(dense, ids, dict(acts)), dense(ids[None]))
    with pytest.raises(RequestError, match="position is 99"):
        patching.patch(dense, ids, ids.flip(0), "blocks.1.hook_resid_pre", patching.logit_difference(dense, 1, 2, position=99))

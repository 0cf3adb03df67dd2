"""L0, L2, L3 and L4 (L1: `operations`, L5: `relations`): what is measured, and how far apart two numbers may lie.

**fp32.** Both sides do the same operations, so only rounding can differ, and only where a sum is taken in another order.
It grows as the square root of depth: `EXACT_ULPS` eps sqrt(1 + layer). With every sum in another order (fused attention;
an fp64 run) the small models, random and trained, lose 3 to 5 of these units; the rest of the margin is for attention
scores of real models, whose rounding a softmax multiplies by their size. In fp64 transformers still takes norms and
softmax in fp32, so the unit stays fp32's eps, and fewer of them are spent. A Gated DeltaNet norms what it reads from its
memory, which is small where nothing was stored under that key: the rounding of a small difference of large numbers is
scaled up with it. Random hybrids lose a third of `recurrent` times as much.

**Half precision** cannot agree exactly, so it is bounded by the oracle itself: our error against the fp32 run may be
`HALF_RATIO` times that of transformers in the same dtype. Where transformers loses less than a quarter of eps (an
output both sides round to the same bits), a quarter of eps is what is multiplied; 1.25 times nothing could not be met
by another order of the same sum. The root mean square of n errors itself scatters by 1/sqrt(2n), the ratio of two by
1/sqrt(n), and two of these are added: 0.4 % for the logits of a real model, 26 % for one gate of 60 tokens.

**Choices** (experts, tokens) are right or wrong, except at a tie: a swap is excused where the oracle's own numbers for
the two lie closer together than twice the error each side is allowed there. The error that is allowed, not the one that
was made: two numbers that have changed places always lie closer together than twice the error that moved them, and a
rule by that would excuse everything. After a choice both sides go on with the oracle's, so that one tie is counted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import backend
from ..errors import CheckpointError, RequestError
from ..models import module_for
from ..models.common import LanguageModel
from . import bundle, oracle
from .report import Check, Row

Acts = Mapping[str, Tensor]
Choice = Mapping[str, str]  # operation -> implementation

HALF = (torch.bfloat16, torch.float16)

@dataclass(frozen=True)
class Tolerances:
    """The contract of a comparison; a bundle carries the one it was written under."""

    exact_ulps: float = 32.0  # fp32, in eps sqrt(1 + layer)
    fp64_ulps: float = 8.0  # fp64, in fp32's eps sqrt(1 + layer)
    recurrent: float = 4.0  # times exact_ulps in a model with Gated DeltaNets
    half_ratio: float = 1.25  # half precision: of transformers' own error
    extreme_ratio: float = 2.0  # the same for a maximum or a last percentile, which scatter more than a mean
    logits_max: float = 1e-4  # fp32: largest difference, in units of the largest logit
    kl: float = 1e-8  # fp32: nats
    one_minus_cosine: float = 1e-4  # half precision: of the logits, unless transformers itself loses more

    def relative_l2(
        self, dtype: torch.dtype, layer: int, own: float, count: int = 1 << 30, *, recurrent: bool = False
    ) -> float:
        """The bound on an activation of `count` numbers after `layer` blocks, of which the oracle itself loses `own`."""
        if dtype in HALF:
            scatter = 1 + 2 / math.sqrt(max(count, 1))
            return self.half_ratio * scatter * max(own, torch.finfo(dtype).eps / 4)
        units = self.fp64_ulps if dtype == torch.float64 else self.exact_ulps
        if recurrent:  # in fp64 as well: there transformers computes the rule in fp32
            units = self.recurrent * self.exact_ulps
        return units * torch.finfo(torch.float32).eps * math.sqrt(1 + layer)

    def uncertainty(self, theirs: Tensor, exact: Tensor, dtype: torch.dtype, bound: float) -> Tensor:
        """By how much the numbers (..., E) a choice is made from may be off: (..., 1).

        `bound` of their size in fp32. In half precision what transformers itself is off there, or a quarter of eps of
        their size, times `extreme_ratio`: it is judged by single numbers.
        """
        size = exact.double().abs().amax(-1, keepdim=True)
        if dtype not in HALF:
            return bound * size
        own = (theirs.double() - exact.double()).abs().amax(-1, keepdim=True)
        return self.extreme_ratio * own.maximum(size * torch.finfo(dtype).eps / 4)

    @classmethod
    def of(cls, contract: Mapping[str, float]) -> Tolerances:
        if set(contract) != {field.name for field in fields(cls)}:
            raise CheckpointError("the bundle's tolerances are not those this version knows: write it again")
        return cls(**contract)

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def is_recurrent(model: nn.Module) -> bool:
    """Whether a model has Gated DeltaNets: either side's."""
    return any(hasattr(block, "linear_attn") for block in model.model.layers)  # type: ignore[union-attr]


class Oracle(Protocol):
    """What a comparison needs of the other side: `Live`, or a bundle read from a file."""

    @property
    def prompts(self) -> list[Tensor]: ...  # (1, T) each
    def theirs(self, i: int) -> Acts: ...  # activations of prompt i in the dtype under test
    def exact(self, i: int) -> Acts: ...  # in fp32 at least; the same as `theirs` but for half precision
    def own_error(self, name: str) -> float: ...  # relative L2 of `theirs` against `exact`, all prompts together
    @property
    def greedy(self) -> bundle.Greedy: ...


@dataclass(frozen=True)
class Live:
    """transformers' models, run when asked."""

    theirs_model: nn.Module
    exact_model: nn.Module
    prompts: list[Tensor]
    new_tokens: int

    def theirs(self, i: int) -> Acts:
        return oracle.capture_theirs(self.theirs_model, self.prompts[i])

    def exact(self, i: int) -> Acts:
        return oracle.capture_theirs(self.exact_model, self.prompts[i])

    def own_error(self, name: str) -> float:
        if self.theirs_model is self.exact_model:
            return 0.0
        sums = _Sums()
        for i in range(len(self.prompts)):
            theirs, exact = self.theirs(i)[name], self.exact(i)[name]
            sums.add(exact, theirs, exact)
        return sums.own

    @cached_property
    def greedy(self) -> bundle.Greedy:
        return bundle.continuation(self.theirs_model, self.prompts[0], self.new_tokens)


# ------------------------------------------------------------------------------------------------- L0


def structure(ours: LanguageModel, theirs: nn.Module) -> Iterator[Check]:
    """Names, shapes, values and config, as each side has read them. Values are left out on the meta device."""
    mine, other, held = dict(ours.named_weights()), dict(theirs.named_parameters()), dict(ours.named_parameters())
    shared = [name for name in mine if name in other]
    yield _listed("parameters transformers does not have", [name for name in mine if name not in other])
    yield _listed("parameters only transformers has", [name for name in other if name not in mine])
    yield _listed("shapes that differ", [f"{name} {list(mine[name].shape)} here, {list(other[name].shape)} there"
                                         for name in shared if mine[name].shape != other[name].shape])
    counts = [sum(p.numel() for p in side.values()) for side in (mine, other)]
    yield Check("L0", "difference of parameter counts", abs(counts[0] - counts[1]), detail=f"{counts[0]:,} here")
    if not any(p.is_meta for p in (*mine.values(), *other.values())):
        yield _listed("weights that differ in value", [
            name for name in shared
            if mine[name].shape == other[name].shape and not _equal(mine[name], other[name], name in held)])
    yield _listed("config values that differ", _config_differences(ours, theirs))


def _equal(mine: Tensor, other: Tensor, held: bool) -> bool:
    """To the bit. What is packed and dequantised anew may multiply in another order: two roundings in fp32, then its own."""
    if held:
        return torch.equal(mine, other)
    return torch.allclose(mine, other, rtol=2 * torch.finfo(mine.dtype).eps, atol=0)


def _listed(name: str, wrong: list[str]) -> Check:
    return Check("L0", name, len(wrong), detail=", ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else ""))


def _config_differences(ours: LanguageModel, theirs: Any) -> list[str]:
    """Our config against the one transformers has made of the same file, its defaults filled in, read again by us."""
    again = module_for(raw := theirs.config.to_dict()).Config.from_json(raw)
    return [f"{field.name}: {getattr(ours.config, field.name)} here, {getattr(again, field.name)} there"
            for field in fields(ours.config) if getattr(ours.config, field.name) != getattr(again, field.name)]


# ------------------------------------------------------------------------------------------------- running our side


def run(model: LanguageModel, ids: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
    """Logits, or final hidden states where the checkpoint has no head. (B, T, V or H)"""
    return (model if model.lm_head is not None else model.model)(ids, positions, cache)


@torch.no_grad()
def capture(model: LanguageModel, ids: Tensor, choice: Choice, follow: Acts) -> Acts:
    """Our activations by name, with the chosen implementations and the oracle's experts.

    A fused attention never has its pattern, and asking for it would run the formula in its place: it is left out then.
    """
    names = [name for name in oracle.points(model) if choice["attention"] == "eager" or not name.endswith("hook_pattern")]
    experts = [follow[name] for name in names if name.endswith("topk_idx")]
    try:
        with oracle.recording_ours(model, names) as acts, backend.use(choice, strict=True), following(experts):
            run(model, ids)
    except RuntimeError as error:  # torch's, of an implementation that cannot take what the model gives it
        other = [f"{name} for {operation}" for operation, name in choice.items() if name != "eager"]
        raise RequestError(f"our side could not run with {', '.join(other) or 'the formulas'}: {error}") from error
    if absent := [name for name in names if name not in acts]:
        raise RequestError(f"our model never computed {absent[0]}: one of its modules was replaced or is never called")
    return {name: acts[name] for name in names}


@contextmanager
def following(experts: Sequence[Tensor]) -> Iterator[None]:
    """For one forward, every mixture of experts sends its tokens to these (..., k), one tensor per layer in order.

    What a router chose by itself is seen by the hooks before. The weights are its own probabilities of the experts it is
    sent to; a token whose choice agrees keeps exactly what was computed.
    """
    wanted = iter(experts)

    def send(choose: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
        weights, chosen = choose(logits, k, normalize)
        oracles = next(wanted).flatten(0, -2).to(chosen)  # (M, k)
        differs = (oracles.sort(-1).values != chosen.sort(-1).values).any(-1, keepdim=True)  # (M, 1)
        if not differs.any():
            return weights, chosen
        given = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).gather(-1, oracles)
        given = given / given.sum(-1, keepdim=True) if normalize else given
        return torch.where(differs, given.to(weights.dtype), weights), torch.where(differs, oracles, chosen)

    if not experts:
        yield
        return
    with backend.intercept("router_topk", send):
        yield


# ------------------------------------------------------------------------------------------------- L2


class Comparison:
    """Rows of activations, summed over prompts as they are captured."""

    def __init__(self, model: LanguageModel, tolerances: Tolerances, dtype: torch.dtype) -> None:
        self.points, self.layers = oracle.points(model), len(model.model.layers)
        self.recurrent = is_recurrent(model)
        self.tolerances, self.dtype = tolerances, dtype
        self.sums: dict[str, _Sums] = {}

    def add(self, ours: Acts, theirs: Acts, exact: Acts) -> None:
        for name, value in ours.items():
            sums = self.sums.setdefault(name, _Sums())
            if not name.endswith("topk_idx"):  # other integers, rows of a table, are compared as numbers: they are exact
                sums.add(value, theirs[name], exact[name])
            else:
                logits = name.replace("topk_idx", "router_logits")
                bound = self.tolerances.relative_l2(self.dtype, self._depth(name), 0.0, recurrent=self.recurrent)
                unsure = self.tolerances.uncertainty(theirs[logits], exact[logits], self.dtype, bound)
                sums.add_choices(value, exact[name], exact[logits], unsure)

    def rows(self) -> list[Row]:
        """One row per activation added so far, in order; what was summed is forgotten."""
        made, self.sums = [self._row(name, sums) for name, sums in self.sums.items()], {}
        return made

    def _row(self, name: str, sums: _Sums) -> Row:
        depth = self._depth(name)
        allowed = 0.0 if sums.choices else self.tolerances.relative_l2(
            self.dtype, depth, sums.own, sums.count, recurrent=self.recurrent)
        return Row(name, self.points[name].path, sums.relative_l2, sums.max_abs, sums.cosine, allowed)

    def _depth(self, name: str) -> int:
        """How many blocks came before."""
        layer = self.points[name].layer
        if layer is not None:
            return layer
        return self.layers if name.startswith(("ln_final", "hook_logits")) else 0


class _Sums:
    """||a - b||^2 and its like, over the prompts: a ours, t theirs in the same dtype, b theirs exact."""

    def __init__(self) -> None:
        self.aa = self.bb = self.ab = self.difference = self.own_difference = self.max_abs = 0.0
        self.count, self.choices = 0, False

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        if ours.shape != exact.shape:
            self.difference = self.max_abs = math.inf
            return
        a, b = ours.double(), exact.double()
        self._add(a, b, a - b)
        if theirs is not exact:
            self.own_difference += float((theirs.double() - b).pow(2).sum())

    def add_choices(self, ours: Tensor, exact: Tensor, logits: Tensor, uncertainty: Tensor) -> None:
        """Experts (B, T, k) as 0/1 over all experts; a swap at a tie is no difference, but lowers the cosine."""
        self.choices = True
        numbers = logits.double()  # (B, T, E)
        a, b = (torch.zeros_like(numbers).scatter_(-1, choice, 1.0) for choice in (ours, exact))
        self._add(a, b, (a - b) * ~at_a_tie(a, b, numbers, uncertainty))

    def _add(self, a: Tensor, b: Tensor, difference: Tensor) -> None:
        self.count += a.numel()
        self.aa, self.bb = self.aa + float(a.pow(2).sum()), self.bb + float(b.pow(2).sum())
        self.ab += float((a * b).sum())
        self.difference += float(difference.pow(2).sum())
        largest = float(difference.abs().max())
        self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)

    @property
    def scale(self) -> float:
        return max(math.sqrt(self.bb), 1e-300)

    @property
    def relative_l2(self) -> float:
        return math.sqrt(self.difference) / self.scale

    @property
    def own(self) -> float:
        return math.sqrt(self.own_difference) / self.scale

    @property
    def cosine(self) -> float:
        return self.ab / max(math.sqrt(self.aa) * math.sqrt(self.bb), 1e-300)


def at_a_tie(ours: Tensor, oracles: Tensor, numbers: Tensor, uncertainty: Tensor) -> Tensor:
    """Where two 0/1 choices (..., E) differ only by a tie: (..., 1) bool.

    Of the oracle's `numbers`, by which it chose, those of what only it chose and those of what only we chose lie within
    twice the `uncertainty` (..., 1): it may have moved each of the two.
    """
    gap = (numbers.masked_fill(~((oracles > 0) & (ours == 0)), -math.inf).amax(-1, keepdim=True)
           - numbers.masked_fill(~((ours > 0) & (oracles == 0)), math.inf).amin(-1, keepdim=True))
    return gap <= 2 * uncertainty


# ------------------------------------------------------------------------------------------------- L3


class Logits:
    """Differences of the next-token distributions, position by position, gathered over prompts."""

    def __init__(self, tolerances: Tolerances, dtype: torch.dtype) -> None:
        self.tolerances, self.dtype = tolerances, dtype
        self.ours, self.theirs = _Distances(), _Distances()

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        unsure = self.tolerances.uncertainty(theirs, exact, self.dtype, self.tolerances.logits_max)
        self.ours.add(ours, exact, unsure)
        self.theirs.add(theirs, exact, unsure)

    def checks(self) -> Iterator[Check]:
        half, tol, scale = self.dtype in HALF, self.tolerances, self.ours.scale
        floor = torch.finfo(self.dtype).eps / 4  # as in L2: what both sides round alike must still be allowed something
        mine, own = self.ours.summary(), self.theirs.summary()
        for name, value in mine.items():
            kl, mean = name.startswith("KL"), " mean" in name
            ratio = tol.half_ratio if mean else tol.extreme_ratio
            if half and kl:  # quadratic in the logits' error, half its variance
                allowed = max(ratio**2 * own[name], (ratio * floor * scale) ** 2 / 2)
            elif half:
                allowed = ratio * max(own[name], floor)
            else:
                allowed = tol.kl if kl else tol.logits_max
            yield Check("L3", name, value, allowed)
        if half:  # in fp32 it is far below what the row of hook_logits allows
            allowed = max(tol.one_minus_cosine, tol.half_ratio**2 * self.theirs.one_minus_cosine)
            yield Check("L3", "1 - cosine", self.ours.one_minus_cosine, allowed)
        for k in (1, 5):
            wrong, equal, count = self.ours.wrong[k], self.ours.equal[k], self.ours.positions * k
            name = "top-1 that differ" if k == 1 else "top-5 that are missing"
            yield Check("L3", name, wrong, detail=f"{equal} of {count} equal, {count - equal - wrong} at a tie")


class _Distances:
    def __init__(self) -> None:
        self.largest = self.total = self.scale = self.aa = self.bb = self.ab = 0.0
        self.count = self.positions = 0
        self.kl: list[Tensor] = []
        self.equal, self.wrong = {1: 0, 5: 0}, {1: 0, 5: 0}

    def add(self, ours: Tensor, exact: Tensor, uncertainty: Tensor) -> None:
        a, b = ours.double().flatten(0, -2), exact.double().flatten(0, -2)  # (positions, V)
        d = (a - b).abs()
        self.largest = max(self.largest, float(d.max().nan_to_num(math.inf)))
        self.total, self.count = self.total + float(d.sum()), self.count + d.numel()
        self.scale, self.positions = max(self.scale, float(b.abs().max())), self.positions + len(b)
        self.aa, self.bb = self.aa + float(a.pow(2).sum()), self.bb + float(b.pow(2).sum())
        self.ab += float((a * b).sum())
        log_p, log_q = b.log_softmax(-1), a.log_softmax(-1)
        self.kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))  # the sum of rounded terms may dip below
        for k in (1, 5):
            mine, oracles = (torch.zeros_like(b).scatter_(-1, x.topk(k).indices, 1.0) for x in (a, b))
            missing = (oracles > mine).sum(-1, keepdim=True)  # (positions, 1)
            self.equal[k] += int((k - missing).sum())
            self.wrong[k] += int((missing * ~at_a_tie(mine, oracles, b, uncertainty.flatten(0, -2))).sum())

    def summary(self) -> dict[str, float]:
        kl, scale = torch.cat(self.kl), max(self.scale, 1e-300)
        return {
            "logits max difference / scale": self.largest / scale,
            "logits mean difference / scale": self.total / self.count / scale,
            "KL mean": float(kl.mean()),
            "KL p99": float(kl.quantile(0.99)),
            "KL max": float(kl.max()),
        }

    @property
    def one_minus_cosine(self) -> float:
        return 1 - self.ab / max(math.sqrt(self.aa) * math.sqrt(self.bb), 1e-300)


# ------------------------------------------------------------------------------------------------- L4


@torch.no_grad()
def greedy(model: LanguageModel, prompt: Tensor, other: Oracle, choice: Choice, tolerances: Tolerances,
           bar: Callable[..., Any]) -> Check:
    """Greedy tokens with our cache, after the oracle's tokens, so that one tie costs one.

    A different choice passes only where the oracle itself was undecided: its best leads ours by less than twice what a
    logit may be off (half precision, where three may be equal: transformers' own relative error on the prompts).
    """
    theirs, cache, step = other.greedy, model.make_cache(), prompt
    unsure = tolerances.half_ratio * other.own_error("hook_logits") if model.dtype in HALF else tolerances.logits_max
    wrong, ties, first = 0, 0, ""
    with backend.use(choice, strict=True):
        for i, token in bar(list(enumerate(theirs.tokens)), desc="L4 greedy tokens"):
            ours = int(run(model, step, cache=cache)[0, -1].argmax())
            reference = theirs.logits[i].double()  # (V,)
            if ours != token:
                margin, size = float(reference[token] - reference[ours]), float(reference.abs().max())
                tie = margin <= 2 * unsure * size
                ties, wrong = ties + tie, wrong + (not tie)
                if not tie and not first:
                    first = f"; token {i + 1} is {ours}, the oracle's {token}, which leads by {margin:.2g}"
            step = torch.tensor([[token]], device=prompt.device)
    count = len(theirs.tokens)
    return Check("L4", "greedy tokens that differ", wrong,
                 detail=f"{count - wrong - ties} of {count} equal, {ties} at a tie{first}")

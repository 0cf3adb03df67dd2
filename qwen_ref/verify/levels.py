"""L0 to L5 but L1 (`operations`): what is measured, and how far apart two numbers may lie.

**fp32.** Both sides do the same operations, so only rounding can differ, and only where a sum is taken in another order.
It grows as the square root of depth: `EXACT_ULPS` eps sqrt(1 + layer). With every sum in another order (fused attention;
an fp64 run) the small models, random and trained, lose 3 to 5 of these units; the rest of the margin is for attention
scores of real models, whose rounding a softmax multiplies by their size. In fp64 transformers still takes norms and
softmax in fp32, so the unit stays fp32's eps, and fewer of them are spent.

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

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import backend
from ..backend import OPERATIONS
from ..errors import CheckpointError, RequestError
from ..models import module_for
from ..models.common import LanguageModel
from . import bundle, oracle
from .report import Check, Row

Acts = Mapping[str, Tensor]
Choice = Mapping[str, str]  # operation -> implementation

HALF = (torch.bfloat16, torch.float16)
_SHORT = 24  # tokens of the prompt that L5 cuts at every point
_LONGEST_WINDOW = 64  # a sliding window up to this many tokens is reached by repeating the prompt


@dataclass(frozen=True)
class Tolerances:
    """The contract of a comparison; a bundle carries the one it was written under."""

    exact_ulps: float = 32.0  # fp32, in eps sqrt(1 + layer)
    fp64_ulps: float = 8.0  # fp64, in fp32's eps sqrt(1 + layer)
    half_ratio: float = 1.25  # half precision: of transformers' own error
    extreme_ratio: float = 2.0  # the same for a maximum or a last percentile, which scatter more than a mean
    logits_max: float = 1e-4  # fp32: largest difference, in units of the largest logit
    kl: float = 1e-8  # fp32: nats
    one_minus_cosine: float = 1e-4  # half precision: of the logits, unless transformers itself loses more

    def relative_l2(self, dtype: torch.dtype, layer: int, own: float, count: int = 1 << 30) -> float:
        """The bound on an activation of `count` numbers after `layer` blocks, of which the oracle itself loses `own`."""
        if dtype in HALF:
            scatter = 1 + 2 / math.sqrt(max(count, 1))
            return self.half_ratio * scatter * max(own, torch.finfo(dtype).eps / 4)
        units = self.fp64_ulps if dtype == torch.float64 else self.exact_ulps
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
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    shared = [name for name in mine if name in other]
    yield _listed("parameters transformers does not have", [name for name in mine if name not in other])
    yield _listed("parameters only transformers has", [name for name in other if name not in mine])
    yield _listed("shapes that differ", [f"{name} {list(mine[name].shape)} here, {list(other[name].shape)} there"
                                         for name in shared if mine[name].shape != other[name].shape])
    counts = [sum(p.numel() for p in side.values()) for side in (mine, other)]
    yield Check("L0", "difference of parameter counts", abs(counts[0] - counts[1]), detail=f"{counts[0]:,} here")
    if not any(p.is_meta for p in (*mine.values(), *other.values())):
        yield _listed("weights that differ in value", [
            name for name in shared if mine[name].shape == other[name].shape and not torch.equal(mine[name], other[name])])
    yield _listed("config values that differ", _config_differences(ours, theirs))


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
        self.tolerances, self.dtype = tolerances, dtype
        self.sums: dict[str, _Sums] = {}

    def add(self, ours: Acts, theirs: Acts, exact: Acts) -> None:
        for name, value in ours.items():
            sums = self.sums.setdefault(name, _Sums())
            if value.is_floating_point():
                sums.add(value, theirs[name], exact[name])
            else:
                logits = name.replace("topk_idx", "router_logits")
                bound = self.tolerances.relative_l2(self.dtype, self._depth(name), 0.0)
                unsure = self.tolerances.uncertainty(theirs[logits], exact[logits], self.dtype, bound)
                sums.add_choices(value, exact[name], exact[logits], unsure)

    def rows(self) -> list[Row]:
        """One row per activation added so far, in order; what was summed is forgotten."""
        made, self.sums = [self._row(name, sums) for name, sums in self.sums.items()], {}
        return made

    def _row(self, name: str, sums: _Sums) -> Row:
        bound = self.tolerances.relative_l2(self.dtype, self._depth(name), sums.own, sums.count)
        allowed = 0.0 if sums.choices else bound
        return Row(name, self.points[name].path, sums.relative_l2, sums.max_abs, sums.cosine, allowed)


    def _depth(self, name: str) -> int:
        """How many blocks came before."""
        layer = self.points[name].layer
        return layer if layer is not None else self.layers if name.startswith(("ln_final", "hook_logits")) else 0


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
            kl, extreme = name.startswith("KL"), name.split()[1] in ("max", "p99")
            ratio = tol.extreme_ratio if extreme else tol.half_ratio
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


# ------------------------------------------------------------------------------------------------- L5


class Relations:
    """L5: ways to compute the same logits, compared among each other; no oracle takes part.

    Those that concern cache, batch, padding and chunks hold to rounding only, and half precision's rounding is as large
    as a small fault: in half precision they run on an fp32 copy of the model. The implementations of operations are
    compared in the dtype itself, by what each loses against that copy.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Tensor], choice: Choice, tolerances: Tolerances) -> None:
        self.half, self.choice, self.tolerances = model.dtype in HALF, choice, tolerances
        self.model = model
        self.exact = copy.deepcopy(model).float() if self.half else model
        self.prompts = [_short(prompt, model.config.windows) for prompt in prompts]
        self.ids = self.prompts[0]
        self.eps_units = tolerances.relative_l2(torch.float32, len(model.model.layers), 0.0)
        if model.dtype == torch.float64:  # both sides are ours here, and fp64 throughout
            self.eps_units *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

    def beyond_reach(self) -> list[int]:
        """Sliding windows that are longer than the prompt, so that nothing slides."""
        return sorted({w for w in self.model.config.windows if w is not None and w >= self.ids.shape[1]})

    @torch.no_grad()
    def checks(self, bar: Callable[..., Any]) -> Iterator[Check]:
        relations = {"cached = full, at every split": self._cached, "chunked prefill = whole": self._chunked,
                     "batch = single": self._batched, "left padding = none": self._padded}
        with backend.use(self.choice):  # not strict: what runs in half precision only has nothing to say about fp32
            whole = run(self.exact, self.ids)
            for name, pairs in relations.items():
                yield self._check(name, bar(pairs(whole), desc=f"L5 {name}"))
        yield from self._implementations()

    def _check(self, name: str, pairs: Iterator[tuple[str, Tensor, Tensor]]) -> Check:
        """The worst of (where, one way, the other way); a way that cannot be gone at all is infinitely far off."""
        errors = []
        try:
            errors += [(where, _relative_l2(ours, other)) for where, ours, other in pairs]
        except (RuntimeError, IndexError) as error:  # what torch raises where shapes do not fit
            return Check("L5", name, math.inf, self.eps_units, f"{type(error).__name__}: {str(error).splitlines()[0]:.100}")
        worst, value = max(errors, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
        first = next((where for where, error in errors if not error <= self.eps_units), None)
        return Check("L5", name, value, self.eps_units, f"first {first}" if first else f"worst {worst}")

    def _read(self, pieces: Sequence[Tensor], positions: Tensor | None = None) -> Tensor:
        cache, out = self.exact.make_cache(), []
        for piece in pieces:
            out.append(run(self.exact, piece, positions, cache))
            positions = None
        return torch.cat(out, dim=1)

    def _cached(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        count = self.ids.shape[1]
        for s in range(1, count):
            yield f"split after {s}", self._read(self.ids.split([s, count - s], dim=1)), whole
        yield "token by token", self._read(self.ids.split(1, dim=1)), whole

    def _chunked(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        for size in (2, 3, 7):
            yield f"chunks of {size}", self._read(self.ids.split(size, dim=1)), whole

    def _batched(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        length = min(prompt.shape[1] for prompt in self.prompts)
        rows = [prompt[:, :length] for prompt in self.prompts] + [self.ids[:, :length].flip(1)]
        together = run(self.exact, torch.cat(rows))
        for i, row in enumerate(rows):
            yield f"row {i}", together[i : i + 1], run(self.exact, row)

    def _padded(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """One row padded, one not, in one batch; at once, and with the last tokens read from the cache."""
        pad, count = 3, self.ids.shape[1]
        other = self.ids.flip(1)[:, :pad]
        ids = torch.cat((torch.cat((other, self.ids), 1), torch.cat((self.ids, other), 1)))  # (2, pad + T)
        positions = torch.arange(pad + count, device=ids.device).repeat(2, 1)
        positions[0] = (positions[0] - pad).clamp_min(-1)
        yield "padded row", run(self.exact, ids, positions)[:1, pad:], whole
        cut = pad + count - 2
        cached = self._read([ids[:, :cut], *ids[:, cut:].split(1, 1)], positions[:, :cut])
        yield "padded row, cached", cached[:1, pad:], whole
        yield "full row beside it, cached", cached[1:], run(self.exact, ids[1:])

    def _implementations(self) -> Iterator[Check]:
        """The model with one operation exchanged, for each implementation that can run here, against all eager."""
        eager, device = dict.fromkeys(OPERATIONS, "eager"), self.model.device
        reference, experts = self._with(eager, [])
        exact = self._copy_following(experts)
        own = _relative_l2(reference, exact) if self.half else 0.0
        allowed = self.tolerances.relative_l2(self.model.dtype, 0, own, exact.numel()) if self.half else self.eps_units
        for operation in OPERATIONS.values():
            for name, implementation in operation.implementations.items():
                if name == "eager" or implementation.supports(device, self.model.dtype) is not None:
                    continue
                logits, _ = self._with({**eager, operation.name: name}, experts)
                yield Check("L5", f"{operation.name}[{name}] = eager", _relative_l2(logits, exact), allowed)

    def _with(self, choice: Choice, experts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the experts the routers chose by themselves."""
        chosen: list[Tensor] = []

        def note(choose: Callable[..., Any], *args: Any) -> Any:
            weights, indices = choose(*args)
            chosen.append(indices)
            return weights, indices

        with backend.use(choice, strict=True), backend.intercept("router_topk", note), following(experts):
            return run(self.model, self.ids), chosen

    def _copy_following(self, experts: Sequence[Tensor]) -> Tensor:
        with backend.use("eager"), following(experts):
            return run(self.exact, self.ids)


def _relative_l2(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


def _short(prompt: Tensor, windows: Sequence[int | None]) -> Tensor:
    """At most `_SHORT` tokens, or as many as make the shortest sliding window slide, if that is in reach."""
    window = min((w for w in windows if w is not None), default=0)
    needed = window + 6 if window + 6 <= _LONGEST_WINDOW else 0
    length = max(min(prompt.shape[1], _SHORT), needed, 3)
    return prompt.repeat(1, -(-length // prompt.shape[1]))[:, :length]

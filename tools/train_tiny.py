"""Train the models that ship inside the package, `tiny` (qwen3), `tiny-moe` (qwen3_moe) and `tiny-hybrid` (qwen3_5).

    python tools/train_tiny.py --stories tinystories-dedup.txt --books gutenberg-children.txt andersen.txt \\
        --out qwen_ref/assets/tiny --model tiny --minutes 35

The result is a model folder in the official format: byte-level BPE tokenizer with Qwen3's split pattern and added
tokens, chat template, config, bf16 weights of at most 8,000,000 bytes, and MODEL_CARD.md. It is exported whenever the
held-out loss improves. Needs `pip install qwen-ref[test]` for the safetensors library.

Where fresh memory is dear (virtual machines), MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the
environment, which let glibc keep what a step has freed, make steps several times faster.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tiny_data as data
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_files import (
    BALANCE,
    CONFIGS,
    DRAFT,
    END_OF_TEXT,
    GENERATION_CONFIG,
    STOP,
    VOCABULARY,
    tokenizer_config,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor, nn

import qwen_ref as qr
from qwen_ref.models import module_for
from qwen_ref.models.common import LanguageModel

LENGTH = 512                        # tokens of a training window
BATCH = 4                           # windows of an optimiser step
BYTE_LIMIT = 8_000_000
SAVE_SECONDS = 600
SAMPLE_TOKENS = 250

# Peak learning rate of both optimisers; Muon's updates are scaled to the size of AdamW's (see `Muon`).
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.1
WARM_UP_STEPS = 40
DECAY_FROM = 0.4                    # share of the time budget after which the rate falls linearly to zero
BOOKS_AT_START, BOOKS_UNTIL = 0.25, 0.5     # share of book examples, falling linearly to none: the end is all stories

# ---------------------------------------------------------------- model, loss, optimiser


def new_model(config: dict[str, Any]) -> LanguageModel:
    """The model of a config.json without weights worth having, with its draft layer if the config announces one."""
    module = module_for(config)
    model = module.Model(module.Config.from_json(config))
    if config.get("mtp_num_hidden_layers"):
        model.mtp = model.make_mtp()
    return model


def build(name: str) -> LanguageModel:
    """The model with fresh weights: normal(0, 0.02), smaller where a projection writes into the residual stream."""
    model = new_model(CONFIGS[name])
    residual_scale = (2 * len(model.model.layers)) ** -0.5          # GPT-2: keeps the stream's variance over depth
    for key, parameter in model.named_parameters():
        if "conv1d" in key:
            nn.init.uniform_(parameter, -(parameter.shape[-1] ** -0.5), parameter.shape[-1] ** -0.5)
        elif parameter.dim() > 1:
            scale = residual_scale if any(part in key for part in ("o_proj", "out_proj", "down_proj")) else 1.0
            nn.init.normal_(parameter, 0.0, 0.02 * scale)
        elif "A_log" in key:                                        # both as in Yang et al. 2024, after Mamba-2
            parameter.data.uniform_(0.01, 16).log_()
        elif "dt_bias" in key:                                      # softplus(dt_bias) log-uniform in [0.001, 0.1]
            steps = torch.empty_like(parameter.data).uniform_(math.log(1e-3), math.log(0.1)).exp()
            parameter.data.copy_(steps.expm1().log())
    return model


class Objective(nn.Module):
    """Next-token cross-entropy, plus for a mixture of experts the load-balancing loss of its routers, and for a draft layer
    its cross-entropy: from the state at a token and the token after it, the token after that."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model, self.top_k = model, model.config.num_experts_per_tok
        self.router_logits: list[Tensor] = []
        for key, module in model.named_modules():
            if key.endswith("mlp.gate"):
                module.register_forward_hook(lambda module, args, output: self.router_logits.append(output))

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cross-entropy, balance loss, draft loss), all scalars; inputs and targets (B, T) int64."""
        self.router_logits.clear()
        hidden = self.model.model(inputs)                                       # (B, T, H)
        loss = cross_entropy(self.model.lm_head(hidden), targets)
        balance = [balance_loss(logits, self.top_k) for logits in self.router_logits]
        draft = loss.new_zeros(())
        if self.model.mtp is not None:
            hidden = self.model.draft(hidden[:, :-1], inputs[:, 1:])            # (B, T - 1, H)
            draft = cross_entropy(self.model.lm_head(hidden), targets[:, 1:])
        return loss, torch.stack(balance).mean() if balance else loss.new_zeros(()), draft


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Args: logits (B, T, V); targets (B, T) int64, data.IGNORE where nothing is to be learned."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=data.IGNORE, reduction=reduction)


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """E * sum over experts of (share of routed slots) * (mean probability); 1 when balanced (Fedus et al. 2021, eq. 4).

    Args: router logits (M, E).
    """
    probabilities = logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k, dim=-1).indices, 1 / top_k)
    return logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), for matrices and stacks of matrices.

    Steps are scaled by 0.2 * sqrt(max(rows, columns)), which gives them the root mean square size of AdamW's and so
    lets both optimisers share a learning rate (Liu et al., arXiv 2502.16982, eq. 4). Matrices of one shape are
    orthogonalised together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalize(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                size = 0.2 * max(shape[-2:]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(parameter)
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)                # Nesterov


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T (..., rows, columns): Jordan's quintic Newton-Schulz iteration, five steps."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for embedding, routers and the inputs of gates, and without decay for
    norm weights, convolutions and what sets the speed of a state's decay."""
    groups: dict[str, list[nn.Parameter]] = defaultdict(list)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 or "conv1d" in key:
            kind = "vector"
        elif any(part in key for part in ("embed_tokens", ".gate.", "in_proj_a", "in_proj_b")):
            kind = "matrix"
        else:
            kind = "muon"
        groups[kind].append(parameter)
    adam_groups = [
        {"params": groups["matrix"], "weight_decay": WEIGHT_DECAY}, {"params": groups["vector"], "weight_decay": 0.0},
    ]
    return [
        Muon(groups["muon"], LEARNING_RATE, WEIGHT_DECAY),
        torch.optim.AdamW(adam_groups, lr=LEARNING_RATE, betas=(0.9, 0.95)),
    ]


def learning_rate(step: int, share: float) -> float:
    """Warm-up, plateau, linear decay to zero (WSD); `share` is the part of the time budget that is spent."""
    return LEARNING_RATE * max(0.0, min(1.0, (step + 1) / WARM_UP_STEPS, (1 - share) / (1 - DECAY_FROM)))


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Score:
    """Average negative log-likelihood, in nats, of held-out stories and the `<|endoftext|>` after each."""

    per_token: float
    per_byte: float


def score(nll: float, stories: list[list[int]], text_bytes: int) -> Score:
    return Score(nll / sum(len(ids) for ids in stories), nll / text_bytes)


@torch.no_grad()
def model_nll(model: nn.Module, stories: list[list[int]]) -> float:
    """Sum over stories (token ids, the end included) of -log p, each story after an `<|endoftext|>` of its own."""
    total = 0.0
    ordered = sorted(stories, key=len)                              # similar lengths together: little padding
    for start in range(0, len(ordered), BATCH):
        rows = [[END_OF_TEXT, *ids] for ids in ordered[start : start + BATCH]]
        longest = max(map(len, rows))
        inputs = torch.tensor([row[:-1] + [END_OF_TEXT] * (longest - len(row)) for row in rows])
        targets = torch.tensor([row[1:] + [data.IGNORE] * (longest - len(row)) for row in rows])
        logits = model(inputs).float()
        total += cross_entropy(logits, targets, "sum").item()
    return total


@torch.no_grad()
def draft_score(model: LanguageModel, stories: list[list[int]]) -> tuple[float, float]:
    """(nats per token, share of drafts that are what the model itself finds most likely) on held-out stories."""
    nll, agreeing, count = 0.0, 0, 0
    for ids in stories:
        row = torch.tensor([[END_OF_TEXT, *ids]])
        hidden = model.model(row[:, :-1])
        logits = model.lm_head(model.draft(hidden[:, :-1], row[:, 1:-1]))       # of the tokens from the third on
        nll += cross_entropy(logits, row[:, 2:], "sum").item()
        agreeing += int((logits.argmax(-1) == model.lm_head(hidden[:, 1:]).argmax(-1)).sum())
        count += logits.shape[1]
    return nll / count, agreeing / count


class Trigram:
    """Interpolated Kneser-Ney trigram over token ids (Chen & Goodman 1999), the baseline beside the model's figures."""

    def __init__(self, stories: list[list[int]]) -> None:
        padded = [[END_OF_TEXT, END_OF_TEXT, *ids] for ids in stories]
        trigrams = Counter(t for ids in padded for t in zip(ids, ids[1:], ids[2:], strict=False))
        bigrams = Counter(t[1:] for t in trigrams)                  # lower orders count distinct contexts
        unigrams = Counter(t[1:] for t in bigrams)
        self.orders = [self._order(counts) for counts in (unigrams, bigrams, trigrams)]

    @staticmethod
    def _order(counts: Counter) -> tuple[Counter, Counter, Counter, float]:
        once, twice = (sum(c == n for c in counts.values()) for n in (1, 2))
        totals: Counter = Counter()
        for gram, count in counts.items():
            totals[gram[:-1]] += count
        return counts, totals, Counter(gram[:-1] for gram in counts), once / max(once + 2 * twice, 1)

    def probability(self, gram: tuple[int, ...]) -> float:
        """p(last id | the up to two before it)."""
        if not gram:
            return 1 / VOCABULARY
        counts, totals, distinct, discount = self.orders[len(gram) - 1]
        lower, total = self.probability(gram[1:]), totals[gram[:-1]]
        if not total:
            return lower
        return (max(counts[gram] - discount, 0) + discount * distinct[gram[:-1]] * lower) / total

    def nll(self, stories: list[list[int]]) -> float:
        padded = [[END_OF_TEXT, END_OF_TEXT, *ids] for ids in stories]
        return -sum(math.log(self.probability(t)) for ids in padded for t in zip(ids, ids[1:], ids[2:], strict=False))


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    """A continuation under GENERATION_CONFIG's sampling, without a cache: slow, but it needs nothing else."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    while len(ids) < start + SAMPLE_TOKENS and (len(ids) == start or ids[-1] not in STOP):
        logits, order = model(torch.tensor([ids]))[0, -1].float().topk(GENERATION_CONFIG["top_k"])
        probabilities = (logits / GENERATION_CONFIG["temperature"]).softmax(0)
        before = probabilities.cumsum(0) - probabilities            # top-p keeps the token that crosses the threshold
        kept = probabilities.masked_fill(before >= GENERATION_CONFIG["top_p"], 0.0)
        ids.append(int(order[torch.multinomial(kept, 1, generator=generator)]))
    return tokenizer.decode(ids[start:], skip_special_tokens=False)


# ---------------------------------------------------------------- training


@dataclass
class Texts:
    """Cleaned text and what is derived from it once."""

    stories: list[str]
    held_out: list[str]
    books: list[str]
    tokenizer_json: dict[str, Any]

    @classmethod
    def read(cls, stories: Path, books: list[Path]) -> Texts:
        training, held_out = data.split_held_out(data.clean_stories(stories.read_text(encoding="utf-8")))
        pieces = [piece for book in books for piece in data.clean_books(book.read_text(encoding="utf-8"))]
        # A quarter of the books: the vocabulary is to serve the stories first.
        return cls(training, held_out, pieces, train_tokenizer([*training, *pieces[::4]]))


@dataclass
class Progress:
    seconds: float = 0.0            # of training, excluding start-up and restarts
    steps: int = 0
    tokens: int = 0                 # that went through the model
    best: float = math.inf          # held-out nats per token at the last export


class Run:
    """One training run: everything that changes while it goes on, and how it is stored and continued."""

    def __init__(self, arguments: argparse.Namespace, texts: Texts) -> None:
        self.arguments, self.texts = arguments, texts
        self.tokenizer = Tokenizer.from_str(json.dumps(texts.tokenizer_json))
        self.model = build(arguments.model)
        self.optimizers = make_optimizers(self.model)
        self.sampler = data.Sampler(self.tokenizer, texts.stories, texts.books, LENGTH, arguments.seed)
        self.progress = Progress()
        self.held_out = self._encode(texts.held_out)
        self.held_out_bytes = sum(len(story.encode()) for story in texts.held_out)

    def train(self) -> None:
        """Train until the time budget is spent; export whenever the held-out loss is the lowest so far."""
        self._restore()
        objective = torch.compile(Objective(self.model), disable=not self.arguments.compile)
        budget, last_save, clock = 60 * self.arguments.minutes, self.progress.seconds, time.monotonic()
        while (share := self.progress.seconds / budget) < 1 and self.progress.steps < self.arguments.steps:
            loss, balance, draft = self._step(objective, share)
            self.progress.steps += 1
            self.progress.tokens += BATCH * LENGTH
            self.progress.seconds += time.monotonic() - clock
            clock = time.monotonic()
            if self.progress.steps % 20 == 1:
                speed = self.progress.tokens / self.progress.seconds
                print(f"step {self.progress.steps} {self.progress.seconds / 60:.1f} min loss {loss:.3f} "
                      f"balance {balance:.3f} draft {draft:.3f} {speed:.0f} tokens/s", flush=True)
            if self.progress.seconds - last_save > SAVE_SECONDS:
                self._save()
                last_save = self.progress.seconds
                clock = time.monotonic()                            # measuring is not training time
        self._save()

    def _step(self, objective: Callable[..., tuple[Tensor, ...]], share: float) -> list[float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.progress.steps, share)
        inputs, targets = self.sampler.batch(BATCH, BOOKS_AT_START * max(0.0, 1 - share / BOOKS_UNTIL))
        loss, balance, draft = objective(inputs, targets)
        (loss + BALANCE * balance + DRAFT * draft).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [loss.item(), balance.item(), draft.item()]

    def _save(self) -> None:
        rounded = rounded_copy(self.model, self.arguments.model)
        result = score(model_nll(rounded, self.held_out), self.held_out, self.held_out_bytes)
        print(f"held out: {result.per_token:.4f} nats/token, {result.per_byte:.4f} nats/byte", flush=True)
        if result.per_token < self.progress.best:
            self.progress.best = result.per_token
            export(self, rounded, result)
        if self.arguments.state:
            state = {
                "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                "progress": asdict(self.progress),
            }
            temporary = self.arguments.state.with_suffix(".new")
            torch.save(state, temporary)
            temporary.replace(self.arguments.state)                 # a kill while writing leaves the previous state

    def _restore(self) -> None:
        if self.arguments.state and self.arguments.state.exists():
            state = torch.load(self.arguments.state)
            self.model.load_state_dict(state["model"])
            for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.progress = Progress(**state["progress"])
            # A different seed, or the same examples would be drawn again from the beginning.
            self.sampler.rng = random.Random(self.arguments.seed + self.progress.steps)

    def _encode(self, stories: list[str]) -> list[list[int]]:
        return [[*e.ids, END_OF_TEXT] for e in self.tokenizer.encode_batch(stories, add_special_tokens=False)]

    @cached_property
    def baseline(self) -> Score:
        """The trigram's score."""
        nll = Trigram(self._encode(self.texts.stories)).nll(self.held_out)
        return score(nll, self.held_out, self.held_out_bytes)


def rounded_copy(model: LanguageModel, name: str) -> LanguageModel:
    """A copy whose weights are rounded to bf16, as in the exported file; its arithmetic stays fp32."""
    copy = new_model(CONFIGS[name])
    copy.load_state_dict({key: value.bfloat16().float() for key, value in model.state_dict().items()})
    return copy.eval()


# ---------------------------------------------------------------- export

CARD = """# {name}

A {parameters:,}-parameter `{model_type}` language model that writes short stories in simple English. It ships with
qwen-ref so that examples and tests run on trained weights without a download. It knows nothing but its stories and
must not be used for facts or advice.

| | |
|---|---|
| text | {texts} |
| licences | TinyStories samples: CDLA-Sharing-1.0 (Eldan & Li, arXiv 2305.07759); Project Gutenberg books and \
H. C. Andersen's tales: public domain in the US |
| command | `{command}` |
| weights | {bytes:,} bytes, bfloat16 |
| tokens seen | {tokens:,} in {steps:,} steps |
| training time | {minutes:.0f} minutes on {threads} CPU threads |
| held-out text | {held_out} stories, {held_out_tokens:,} tokens, {held_out_bytes:,} bytes; no near-copies in training |
| held-out loss | {loss.per_token:.4f} nats per token (perplexity {ppl:.2f}), {loss.per_byte:.4f} nats per byte \
(perplexity {byte_ppl:.3f}) |
| trigram baseline | {trigram.per_token:.4f} nats per token (perplexity {trigram_ppl:.2f}), \
{trigram.per_byte:.4f} nats per byte (perplexity {trigram_byte_ppl:.3f}); interpolated Kneser-Ney, \
same tokens and split |{draft}
| requests followed | {followed[0]} of {followed[1]} held-out subjects ("Tell me a story about a brave dog named Max.") \
are named early in the greedy answer |

The losses are of the exported weights, computed in float32. About six in ten of the story examples were chat requests derived
from the story by pattern; the requests themselves and the empty think block carried no loss. Names and animals were
exchanged for others at every reading of a story.

Prompt `Once upon a time`, sampled as generation_config.json says:

{plain}

Request `Tell me a story about a little frog.`, thinking:

{chat}
"""
DRAFT_ROW = """
| draft layer (MTP) | {count:,} parameters more; {nll:.4f} nats per token for the token after next, given the next; names what \
the model itself then finds most likely {share:.0%} of the time |"""
CARD_PROMPTS = {
    "plain": "Once upon a time",
    "chat": "<|im_start|>user\nTell me a story about a little frog.<|im_end|>\n<|im_start|>assistant\n",
}


def requests_followed(folder: Path, stories: list[str]) -> tuple[int, int]:
    """(followed, asked): greedy answers to "Tell me a story about ..." that name the subject early, on unseen stories.

    Followed: the subject's noun, and its name where the request gives one, stand in the answer's first 300 characters.
    """
    subjects = sorted({who for story in stories if (who := data.subject(story)) and who[0].islower()})
    model, tokenizer = qr.load(folder, dtype=torch.float32)
    chats = [[{"role": "user", "content": f"Tell me a story about {who}."}] for who in subjects]
    answers = qr.generate(model, tokenizer, chats, temperature=0, max_tokens=80, enable_thinking=False)
    nouns = [[who.split(" named ")[0].split()[-1], *who.split(" named ")[1:]] for who in subjects]
    hits = [all(word in answer.text[:300] for word in words) for words, answer in zip(nouns, answers, strict=True)]
    return sum(hits), len(hits)


def export(run: Run, model: LanguageModel, result: Score) -> None:
    """Write the model folder. `model` holds weights already rounded to bf16; SystemExit if the file is too large."""
    folder, name = run.arguments.out, run.arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": CONFIGS[name], "generation_config.json": GENERATION_CONFIG,
        "tokenizer.json": run.texts.tokenizer_json, "tokenizer_config.json": tokenizer_config(),
    }
    for file, content in files.items():
        replace(folder / file, partial(Path.write_text, data=_json(content), encoding="utf-8"))
    tensors = {key: value.bfloat16().contiguous() for key, value in model.checkpoint_tensors().items()}
    weights = folder / "model.safetensors"
    replace(weights, partial(save_file, tensors, metadata={"format": "pt"}))
    if weights.stat().st_size > BYTE_LIMIT:
        raise SystemExit(f"{weights.name} has {weights.stat().st_size:,} bytes, more than {BYTE_LIMIT:,}")
    card = model_card(run, model, result, weights.stat().st_size)
    replace(folder / "MODEL_CARD.md", partial(Path.write_text, data=card, encoding="utf-8"))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, then put it in place at once: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".new")
    write(temporary)
    temporary.chmod(0o644)                                          # safetensors makes files only their owner can read
    temporary.replace(path)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def model_card(run: Run, model: LanguageModel, result: Score, weight_bytes: int) -> str:
    """MODEL_CARD.md. Data files are named without their folders, which mean nothing on another machine."""
    arguments, progress, trigram = run.arguments, run.progress, run.baseline
    samples = {
        key: "\n".join(f"> {line}".rstrip() for line in (prompt * (key == "plain") + text).split("\n"))
        for key, prompt in CARD_PROMPTS.items()
        for text in [sample(model, run.tokenizer, prompt, seed=1)]
    }
    draft = ""
    if model.mtp is not None:
        nll, share = draft_score(model, run.held_out)
        draft = DRAFT_ROW.format(count=model.num_draft_parameters(), nll=nll, share=share)
    command = [
        "python", "tools/train_tiny.py", "--stories", arguments.stories.name,
        "--books", *(book.name for book in arguments.books), "--out", f"qwen_ref/assets/{arguments.model}",
        "--model", arguments.model, "--minutes", f"{arguments.minutes:g}", "--seed", str(arguments.seed),
        "--threads", str(arguments.threads), *(["--compile"] if arguments.compile else []),
    ]
    return CARD.format(
        name=arguments.model, parameters=model.num_parameters(), model_type=model.config.model_type,
        texts=", ".join(path.name for path in (arguments.stories, *arguments.books)), command=shlex.join(command),
        bytes=weight_bytes, tokens=progress.tokens, steps=progress.steps, minutes=progress.seconds / 60,
        threads=arguments.threads, held_out=len(run.held_out), held_out_tokens=sum(map(len, run.held_out)),
        held_out_bytes=run.held_out_bytes, loss=result, ppl=math.exp(result.per_token),
        byte_ppl=math.exp(result.per_byte), trigram=trigram, trigram_ppl=math.exp(trigram.per_token),
        trigram_byte_ppl=math.exp(trigram.per_byte), draft=draft,
        followed=requests_followed(run.arguments.out, run.texts.held_out), **samples,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one of the bundled models.")
    parser.add_argument("--stories", type=Path, required=True, help="stories separated by <|endoftext|>")
    parser.add_argument("--books", type=Path, nargs="*", default=[], help="plain text, used early in training only")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--model", choices=CONFIGS, default="tiny")
    parser.add_argument("--minutes", type=float, default=35.0, help="training time")
    parser.add_argument("--steps", type=float, default=math.inf, help="stop early after so many optimiser steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file to store progress in, and to continue from if it exists")
    parser.add_argument("--compile", action="store_true", help="torch.compile: minutes to start, then faster")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Run:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    run = Run(arguments, Texts.read(arguments.stories, arguments.books))
    print(f"{run.model.num_parameters():,} parameters, {len(run.texts.stories)} stories; trigram {run.baseline}")
    run.train()
    return run


if __name__ == "__main__":
    main()

"""Qwen3-Embedding and Qwen3-Reranker: the same model, its last token read as a vector or as a yes or no.

Usage as on the model cards of Qwen/Qwen3-Embedding-0.6B and Qwen/Qwen3-Reranker-0.6B; arXiv 2506.05176.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .errors import RequestError
from .models.common import LanguageModel
from .tokenizer import Tokenizer

TOKENS = 4096  # of a forward pass, padding included
TASK = "Given a web search query, retrieve relevant passages that answer the query"
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)


def instruct(query: str, task: str = TASK) -> str:
    """The form in which a query is embedded. Documents are embedded as they are."""
    return f"Instruct: {_text('task', task)}\nQuery:{_text('query', query)}"


@torch.inference_mode()
def embed(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], *, dimensions: int | None = None
) -> Tensor:
    """One unit vector per text: the final hidden state of an appended `<|endoftext|>`, L2-normalised.

    `dimensions` keeps the first so many components before normalising (Matryoshka embeddings).
    Returns (n, H or dimensions) fp32; the cosine similarity of two texts is the product of their rows.
    """
    width = model.config.hidden_size
    if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= width):
        raise RequestError(f"dimensions is {dimensions!r}; it must be an integer from 1 to {width}")
    end = tokenizer.id_of("<|endoftext|>")
    if end is None:
        raise RequestError("this tokenizer has no <|endoftext|>, whose hidden state is the embedding")
    states = _last_states(model, [[*tokenizer.encode(text), end] for text in _listed("texts", texts)])
    return F.normalize(states.float()[:, :dimensions], dim=-1)


@torch.inference_mode()
def rerank(
    model: LanguageModel, tokenizer: Tokenizer, query: str, documents: Sequence[str], *, task: str = TASK
) -> Tensor:
    """P("yes") against "no" that each document answers the query, by the reranker's judgement. (n,) fp32."""
    if model.lm_head is None:
        raise RequestError("this checkpoint has no language head; a reranker needs one")
    _text("query", query), _text("task", task)
    yes, no = (tokenizer.encode(word) for word in ("yes", "no"))
    if len(yes) != 1 or len(no) != 1:
        raise RequestError('"yes" and "no" are not single tokens in this tokenizer; it is not a reranker\'s')
    prompts = []
    for document in _listed("documents", documents):
        user = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {_text('a document', document)}"
        prompts.append(
            tokenizer.encode(f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n", allow_special=True)
            + tokenizer.encode(user)  # text of the caller: no control tokens in it
            + tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", allow_special=True)
        )
    parts = _last_states(model, prompts).split(64)  # of whose logits, (64, V), two of each are kept
    logits = torch.cat([model.lm_head(states)[:, [no[0], yes[0]]] for states in parts])  # (n, 2)
    return logits.float().softmax(-1)[:, 1]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r:.80}; it must be text")
    return value


def _listed(name: str, texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise RequestError(f"{name} is {texts!r:.80}; it must be a list of texts, [text] for one")
    return texts


def _last_states(model: LanguageModel, rows: list[list[int]]) -> Tensor:
    """The final hidden state of each row's last token, (n, H).

    Rows of like lengths are read together, so that few tokens are padding and memory does not grow with the number of rows.
    Padding is on the right: under a causal mask nothing sees it.
    """
    if not rows:
        raise RequestError("there are no texts")
    context, longest = model.config.max_position_embeddings, max(map(len, rows))
    if longest > context:
        raise RequestError(f"a text has {longest} tokens; this model's context holds {context}")
    states = torch.empty(len(rows), model.config.hidden_size, dtype=model.dtype, device=model.device)
    for batch in _batches([len(row) for row in rows]):
        wide = len(rows[batch[-1]])
        ids = torch.tensor([rows[i] + [0] * (wide - len(rows[i])) for i in batch], device=model.device)  # (b, T)
        lengths = torch.tensor([len(rows[i]) for i in batch], device=model.device)
        states[batch] = ops.last_token(model.model(ids), lengths)
    return states


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """The indices of all rows, shortest first, in batches of at most TOKENS tokens with padding, or of one longer row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch

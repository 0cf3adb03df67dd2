"""Qwen3-Embedding and Qwen3-Reranker: the same model, its last token read as a vector or as a yes or no.

Usage as on the model cards of Qwen/Qwen3-Embedding-0.6B and Qwen/Qwen3-Reranker-0.6B; arXiv 2506.05176.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .errors import RequestError
from .models.common import LanguageModel
from .tokenizer import Tokenizer

TASK = "Given a web search query, retrieve relevant passages that answer the query"
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)


def instruct(query: str, task: str = TASK) -> str:
    """The form in which a query is embedded. Documents are embedded as they are."""
    return f"Instruct: {task}\nQuery:{query}"


@torch.inference_mode()
def embed(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], *, dimensions: int | None = None
) -> Tensor:
    """One unit vector per text: the final hidden state of an appended `<|endoftext|>`, L2-normalised.

    `dimensions` keeps the first so many components before normalising (Matryoshka embeddings).
    Returns (n, H or dimensions) fp32; the cosine similarity of two texts is the product of their rows.
    """
    end = tokenizer.id_of("<|endoftext|>")
    if end is None:
        raise RequestError("this tokenizer has no <|endoftext|>, whose hidden state is the embedding")
    hidden, lengths = _read(model, [[*tokenizer.encode(text), end] for text in texts])
    vectors = ops.last_token(hidden, lengths).float()[:, :dimensions]
    return F.normalize(vectors, dim=-1)


@torch.inference_mode()
def rerank(
    model: LanguageModel, tokenizer: Tokenizer, query: str, documents: Sequence[str], *, task: str = TASK
) -> Tensor:
    """P("yes") against "no" that each document answers the query, by the reranker's judgement. (n,) fp32."""
    if model.lm_head is None:
        raise RequestError("this checkpoint has no language head; a reranker needs one")
    yes, no = (tokenizer.encode(word) for word in ("yes", "no"))
    if len(yes) != 1 or len(no) != 1:
        raise RequestError('"yes" and "no" are not single tokens in this tokenizer; it is not a reranker\'s')
    prompts = []
    for document in documents:
        user = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"
        prompts.append(
            tokenizer.encode(f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n", allow_special=True)
            + tokenizer.encode(user)  # text of the caller: no control tokens in it
            + tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", allow_special=True)
        )
    hidden, lengths = _read(model, prompts)
    logits = model.lm_head(ops.last_token(hidden, lengths)).float()  # (n, V)
    return logits[:, [no[0], yes[0]]].softmax(-1)[:, 1]


def _read(model: LanguageModel, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Final hidden states (n, T, H) and lengths (n,). Padding on the right: under a causal mask nothing sees it."""
    if not rows:
        raise RequestError("there are no texts")
    context, longest = model.config.max_position_embeddings, max(map(len, rows))
    if longest > context:
        raise RequestError(f"a text has {longest} tokens; this model's context holds {context}")
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    return model.model(ids), torch.tensor([len(row) for row in rows], device=model.device)

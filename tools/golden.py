"""Write tests/golden/*.json: greedy continuations of ten prompts by each bundled model. Run after training; read them.

    python tools/golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import qwen_ref as qr

PROMPTS = [
    "Once upon a time, there was a little girl named",
    "One day, a big dog",
    "Tom and Sue went to the park. They",
    "The cat was very hungry. She",
    "Mom said, \"",
    "In a small house by the sea lived",
    "Tim was sad because",
    "The bird wanted to fly, but",
    "It was a sunny day and the children",
    "\"Thank you,\" said the little",
]  # fmt: skip


def main() -> None:
    folder = Path(__file__).parent.parent / "tests" / "golden"
    folder.mkdir(exist_ok=True)
    for name in ("tiny", "tiny-moe"):
        model, tokenizer = qr.load(name, dtype=torch.float32)
        results = qr.generate(model, tokenizer, PROMPTS, temperature=0, max_tokens=48)
        golden = {prompt: result.text for prompt, result in zip(PROMPTS, results, strict=True)}
        (folder / f"{name}.json").write_text(json.dumps(golden, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print("\n\n".join(f"{name}: {prompt}|{text}" for prompt, text in golden.items()))


if __name__ == "__main__":
    main()

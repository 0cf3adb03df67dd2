"""Write tests/golden/*.json: greedy continuations of ten prompts by each bundled model. Run after training; read them.

    python tools/golden.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import qwen_ref as qr

PROMPTS = [
    "Once upon a time, there was a little girl named",
    "Once upon a time, in a big forest, there lived",
    "One day, a big dog",
    "One day, a little cat named",
    "Ben had a toy car. He liked to",
    "The little bird was scared. It",
    "Max was a good dog. He",
    "Once there was a kind old man who",
    "A little boy named Tim was sad.",
    "The bear was very big and",
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = Path(__file__).parent.parent / "tests" / "golden"
    folder.mkdir(exist_ok=True)
    for name in qr.loading.BUNDLED:
        model, tokenizer = qr.load(name, dtype=torch.float32)
        results = qr.generate(model, tokenizer, PROMPTS, temperature=0, max_tokens=40)
        golden = {prompt: result.text for prompt, result in zip(PROMPTS, results, strict=True)}
        (folder / f"{name}.json").write_text(json.dumps(golden, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print("\n\n".join(f"{name}: {prompt}|{text}" for prompt, text in golden.items()))


if __name__ == "__main__":
    main()

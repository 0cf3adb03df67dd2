"""Bounds on what untrusted files and requests may ask for, checked before anything is allocated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes unless named otherwise. The defaults pass every official checkpoint with room to spare."""

    config_bytes: int = 1 << 20            # config.json, generation_config.json
    config_depth: int = 32                 # nesting of JSON objects and lists
    safetensors_header_bytes: int = 100_000_000   # the cap of the safetensors library itself
    gguf_header_bytes: int = 64_000_000    # metadata and tensor list of a GGUF file; a vocabulary of 250,000 takes 10 MB
    index_bytes: int = 200_000_000         # model.safetensors.index.json
    index_entries: int = 1_000_000         # tensors named in an index
    tokenizer_bytes: int = 200_000_000     # tokenizer.json, vocab.json, merges.txt, qwen.tiktoken
    template_bytes: int = 1 << 20          # a chat template's source
    render_seconds: float = 10.0           # one rendering of a template
    render_chars: int = 50_000_000         # its output
    text_chars: int = 50_000_000           # one call of encode()
    layers: int = 4096
    experts: int = 1 << 16                 # of all layers: loading lists their tensors; Qwen3.5-397B-A17B has 30,720
    width: int = 1 << 24                   # any single dimension of a weight
    parameters: int = 10**13


LIMITS = Limits()

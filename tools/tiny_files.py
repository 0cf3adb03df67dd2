"""The small files of the bundled models' folders: tokenizer, chat template, config, generation config."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 4096
BALANCE = 0.01                      # weight of the load-balancing loss
DRAFT = 0.3                         # weight of the draft layer's loss (DeepSeek-V3 Technical Report, section 4.2)

# The 26 tokens Qwen3 adds after its base vocabulary, in order; the first 14 are special, as in its tokenizer.json.
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)
SPECIAL_COUNT = 14
BASE_VOCABULARY = VOCABULARY - len(ADDED_TOKENS)
END_OF_TEXT, IM_END = BASE_VOCABULARY, BASE_VOCABULARY + 2
STOP = (IM_END, END_OF_TEXT)

# Qwen2's and Qwen3's, from their tokenizer.json.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}

# Writes what Qwen3's own template writes for system, user and assistant messages: reasoning is shown only after the
# last request, and enable_thinking=False closes the think block in advance.
CHAT_TEMPLATE = r"""
{%- if tools %}{{- raise_exception('This small model does not call tools.') }}{%- endif %}
{%- set ns = namespace(last_request=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_request = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_request and (loop.last or reasoning) %}
            {%- set content = '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') %}
        {%- endif %}
    {%- elif message.role not in ('system', 'user') %}
        {{- raise_exception('Roles are system, user and assistant, not ' + message.role + '.') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
""".strip()

SHARED_CONFIG: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": END_OF_TEXT, "eos_token_id": IM_END,
    "head_dim": 32, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 1024,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": VOCABULARY,
}
_NOT_HYBRID = ("rope_scaling", "rope_theta", "sliding_window", "use_sliding_window")
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SHARED_CONFIG,
        "hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 8, "max_window_layers": 8,
        "num_attention_heads": 8,
    },
    "tiny-moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **SHARED_CONFIG,
        "hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 6, "max_window_layers": 6,
        "num_attention_heads": 6, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 96,
        "norm_topk_prob": True, "num_experts": 10, "num_experts_per_tok": 3, "output_router_logits": False,
        "router_aux_loss_coef": BALANCE,
    },
    "tiny-hybrid": {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text",
        **{key: value for key, value in SHARED_CONFIG.items() if key not in _NOT_HYBRID}, "transformers_version": "5.2.0",
        "hidden_size": 192, "intermediate_size": 336, "num_hidden_layers": 8, "num_attention_heads": 6,
        "full_attention_interval": 4,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "mtp_num_hidden_layers": 1,
    },
}
GENERATION_CONFIG = {
    "bos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, "eos_token_id": list(STOP),
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "transformers_version": "4.51.0",
}


def train_tokenizer(texts: Iterable[str]) -> dict[str, Any]:
    """tokenizer.json as an object: byte-level BPE learned from `texts`, then Qwen3's 26 added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern=Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=BASE_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    if len(learned["vocab"]) != BASE_VOCABULARY:
        raise SystemExit(f"the text gives only {len(learned['vocab'])} of {BASE_VOCABULARY} tokens; give more text")
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]},
        "post_processor": BYTE_LEVEL, "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": learned["vocab"], "merges": learned["merges"],
        },
    }


def _added_tokens() -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": BASE_VOCABULARY + i, "content": token, **flags, "special": i < SPECIAL_COUNT}
        for i, token in enumerate(ADDED_TOKENS)
    ]


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json with the keys of Qwen3's."""
    added = {str(token.pop("id")): token for token in _added_tokens()}
    return {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": list(ADDED_TOKENS[1:SPECIAL_COUNT]), "bos_token": None,
        "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>",
        "errors": "replace", "model_max_length": CONFIGS["tiny"]["max_position_embeddings"],
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }

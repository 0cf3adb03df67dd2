"""tools/train_tiny.py and tools/tiny_data.py: the text they derive, the files they write, and a short training run."""

from __future__ import annotations

import json
import os
import random
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import tiny_data as data
import tiny_files
import train_tiny

SHIPPED = dict(train_tiny.CONFIGS)          # the training run below replaces them by smaller ones
ROXY = (
    "Once upon a time, in a big forest, there lived a rhinoceros named Roxy. Roxy loved to climb. One day, Roxy found "
    "an icy hill. It was shiny and cold.\n\nRoxy tried to climb the hill, but the hill was slippery. She saw a bird. "
    "The bird gave her leaves, and Roxy climbed the hill. They were the best of friends."
)


def official(name: str) -> Path:
    root = os.environ.get("QWEN_REF_TEST_DATA")
    if not root:
        pytest.skip("QWEN_REF_TEST_DATA is unset: not compared with Qwen3's own tokenizer files")
    return Path(root) / "tokenizers" / "qwen3" / name


# ---------------------------------------------------------------- cleaning and splitting


def test_story_cut_before_one_day_is_joined_with_its_introduction():
    opening = "Once upon a time, there was a kind farmer. He had a big cow. The cow was sad."
    rest = "One day, a little boy came to the farm. He saw the sad cow and asked why. " + "The cow was lonely. " * 8
    stories = data.clean_stories(f"{opening}\n<|endoftext|>\n{rest}\n<|endoftext|>\n{ROXY}")
    assert stories == [f"{opening}\n\n{rest.strip()}", ROXY]


def test_unrelated_one_day_story_is_not_joined():
    opening = "Once upon a time, there was a modest car. It drove slowly."
    other = "One day, a girl named Mia went swimming. " + "Mia swam in the blue lake. " * 8
    assert data.clean_stories(f"{opening}<|endoftext|>{other}") == [other.strip()]


def test_fragments_without_opening_or_end_are_dropped():
    no_opening = "She smiled and said that it was time to go home now. " * 6
    no_end = ROXY.rstrip(".") + " and"
    assert data.clean_stories(f"{no_opening}<|endoftext|>{no_end}<|endoftext|>{ROXY}") == [ROXY]


def test_stories_run_together_are_split_at_lone_line_breaks():
    second = "Once there was a small daisy. " + "The daisy liked the sun in the garden. " * 8
    first = f"{ROXY} They went home together when the sun went down."
    assert data.clean_stories(f"{first}\n{second}") == [first, second.strip()]


def test_mojibake_and_curly_quotes_become_plain():
    text = 'â€œHi,â€ said Tom. “Itâ€™s Sam’s.”'
    assert data.plain_typography(text) == '"Hi," said Tom. "It\'s Sam\'s."'


def test_held_out_stories_leave_no_near_copy_in_training():
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(600)]
    rng = random.Random(0)
    stories = [" ".join(rng.sample(words, 60)) for _ in range(300)]
    _, held_out = data.split_held_out(stories, every=10)
    copies = [story.replace(story.split()[0], "changed") for story in held_out]
    training, again = data.split_held_out(stories + copies, every=10)
    assert set(held_out) <= set(again) and training
    seen = set().union(*map(data.word_runs, again))
    assert all(len(data.word_runs(story) & seen) <= 0.2 * len(data.word_runs(story)) for story in training)
    assert not set(copies) & set(training)


def test_split_does_not_depend_on_order():
    stories = [f"Story number {'x' * i} ends." for i in range(200)]
    assert set(data.split_held_out(stories)[1]) == set(data.split_held_out(stories[::-1])[1])


def test_books_are_unwrapped_and_headings_dropped():
    king = "There was once a king who had a garden in which there stood a tree with apples. " * 3 + "He counted them."
    thief = '"Who took my apple?" he asked of everyone that he met on the long road to the town. ' * 3 + "Nobody knew."
    wrapped = "\n".join(textwrap.fill(paragraph, 72) for paragraph in (king, thief))
    text = f"CHAPTER ONE\n\n{wrapped}\n\nThis eBook is from Project Gutenberg, as everyone knows.\n"
    assert data.clean_books(text, piece_chars=100) == [king, thief]


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        (ROXY, "a rhinoceros named Roxy"),
        ("Once upon a time, in a small yard, there was a small daisy. The daisy had a name.", "a small daisy"),
        ("Once there was a kind farmer who had a cow.", "a kind farmer"),
        ("One day, a little girl named Amy was playing in the park.", "a little girl named Amy"),
        ("Once there was a big, red car. The car was fast.", "a big red car"),
        ("Once upon a time there was a king who had money.", "a king"),
        ("Once upon a time, there was a boy. His name was Tim. He ran.", "a boy named Tim"),
        ("Tom and Mia were in the park. Tom had a ball.", "Tom and Mia"),
        ("It was a sunny day. The birds sang.", None),
    ],
)
def test_subject(story: str, expected: str | None):
    assert data.subject(story) == expected


def test_requests_speak_of_their_story():
    others = [f"Story {name}: a hill and a bird, icy and shiny. They climb leaves." for name in "abcde"]
    vocabulary = data.Vocabulary(1000, data.Vocabulary.of([ROXY, *others]).counts)
    assert data.things(ROXY, vocabulary)[:2] == ["hill", "bird"]
    known = {"rhinoceros", "roxy", "hill", "bird", "story", "stories", "tell", "please", "write", "words", "short"}
    for seed in range(200):
        turn = data.make_turn(ROXY, vocabulary, random.Random(seed))
        assert turn.answer == ROXY and turn.thought.startswith("The user ")
        if "words" in turn.user:
            listed = turn.user.rstrip(".").replace("? ", " ").replace(":", "").split()[-3:]
            assert all(word.strip(",") in ROXY for word in listed)
        elif turn.user.startswith("Once"):
            assert ROXY.startswith(turn.user)
        elif "about" in turn.user:
            assert known & set(turn.user.lower().strip(".?").split())


def test_only_answers_and_thoughts_are_learned():
    turns = [data.Turn("u1", "t1", "a1"), data.Turn("u2", "t2", "a2")]
    quiet = data.chat_segments(turns, None, thinking=False)
    assert [text for text, learned in quiet if learned] == ["a1<|im_end|>", "a2<|im_end|>"]
    loud = data.chat_segments(turns, None, thinking=True)
    assert [text for text, learned in loud if learned] == ["a1<|im_end|>", "<think>\nt2\n</think>\n\na2<|im_end|>"]


# ---------------------------------------------------------------- template and tokenizer files


def render(template: str, messages: list[dict], **options: object) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=template, **options)[0][0]


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n\nA"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A", "reasoning_content": "\nR\n"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}],
    [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"},
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "B", "reasoning_content": "R2"},
        {"role": "user", "content": "Bye"},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}],
    [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R\n</think>\nA", "reasoning_content": None}],
    [{"role": "assistant", "content": "A"}, {"role": "system", "content": "S"}],
]


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_template_writes_what_qwen3s_does(messages: list[dict], prompt: bool, options: dict):
    theirs = json.loads(official("tokenizer_config.json").read_text())["chat_template"]
    options = {**options, "add_generation_prompt": prompt}
    assert render(tiny_files.CHAT_TEMPLATE, messages, **options) == render(theirs, messages, **options)


@pytest.mark.parametrize("thinking", [False, True])
def test_training_text_is_what_the_template_writes(thinking: bool):
    turns = [data.Turn("u1", "t1", "a1"), data.Turn("u2", "t2", "a2")]
    messages = [{"role": "system", "content": "S"}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.thought * thinking})
    segments = data.chat_segments(turns, "S", thinking)
    assert "".join(text for text, _ in segments) == render(tiny_files.CHAT_TEMPLATE, messages) + "<|endoftext|>"
    learned = "".join(text for text, learned in segments if learned)
    prompt = render(
        tiny_files.CHAT_TEMPLATE, messages[:-1], add_generation_prompt=True, enable_thinking=thinking
    )
    assert "".join(text for text, _ in segments).startswith(prompt)
    assert learned.endswith(messages[-1]["content"] + "<|im_end|>")


def test_tokenizer_parts_are_qwen3s(folder: Path):
    theirs, ours = (json.loads(path.read_text()) for path in (official("tokenizer.json"), folder / "tokenizer.json"))
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "version")
    assert {key: ours[key] for key in parts} == {key: theirs[key] for key in parts}
    shift = 151643 - tiny_files.BASE_VOCABULARY
    assert [{**token, "id": token["id"] + shift} for token in ours["added_tokens"]] == theirs["added_tokens"]
    own = ("vocab", "merges")
    assert {k: v for k, v in ours["model"].items() if k not in own} == {
        k: v for k, v in theirs["model"].items() if k not in own
    }


# ---------------------------------------------------------------- a short training run


def made_stories(count: int) -> str:
    """Text varied enough for 3814 merges and regular enough to be learned in a few steps."""
    rng = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    nouns = ["".join(rng.choices(syllables, k=3)) for _ in range(3000)]
    stories = []
    for _ in range(count):
        a, b, c = rng.sample(nouns, 3)
        stories.append(
            f"Once upon a time, there was a big {a} named {a.title()}. The {a} saw a {b}. "
            f"One day the {a} and the {b} went to the {c}. They were happy. The {c} was red. "
            f'"I like the {c}," said the {a}. Then the {b} went home and the {a} slept all night.'
        )
    return "<|endoftext|>".join(stories)


@pytest.fixture(scope="module", params=["tiny", "tiny-moe", "tiny-hybrid"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(made_stories(1600))
    with pytest.MonkeyPatch.context() as patch:
        small = {"hidden_size": 48, "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 4,
                 "full_attention_interval": 2}  # fmt: skip
        patch.setitem(train_tiny.CONFIGS, request.param, {**train_tiny.CONFIGS[request.param], **small})
        patch.setattr(train_tiny, "LENGTH", 96)
        patch.setattr(train_tiny, "BATCH", 8)
        patch.setattr(train_tiny, "SAMPLE_TOKENS", 20)
        arguments = ["--stories", str(folder / "text.txt"), "--out", str(folder / "model"), "--model", request.param]
        yield train_tiny.main([*arguments, "--steps", "20", "--threads", "1"])


@pytest.fixture
def folder(run: train_tiny.Run) -> Path:
    return run.arguments.out


def test_twenty_steps_lower_the_loss(run: train_tiny.Run):
    untrained = train_tiny.build(run.arguments.model)
    before = train_tiny.model_nll(untrained, run.held_out) / sum(map(len, run.held_out))
    assert run.progress.steps == 20 and run.progress.tokens == 20 * 8 * 96
    assert run.progress.best < before - 0.5


def test_transformers_loads_the_folder_and_agrees(run: train_tiny.Run, folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    text = prompt + "Once upon Ünïque"
    ids = tokenizer(text)["input_ids"]
    assert ids == run.tokenizer.encode(text).ids and tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "Tell me a story."}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    assert tokenizer.apply_chat_template(messages, **options) == prompt
    ours = train_tiny.rounded_copy(run.model, run.arguments.model)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits, ours(torch.tensor([ids])), atol=1e-4, rtol=1e-4)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    eos = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_ids_to_tokens(eos) == ["<|im_end|>", "<|endoftext|>"]


def test_card_names_files_but_no_folders(run: train_tiny.Run, folder: Path):
    card = (folder / "MODEL_CARD.md").read_text()
    assert "text.txt" in card and str(run.arguments.stories.parent) not in card


def test_official_sizes_stay_under_the_byte_limit():
    for config in SHIPPED.values():
        model = train_tiny.new_model(config)
        parameters = model.num_parameters() + model.num_draft_parameters()
        assert config["vocab_size"] == tiny_files.VOCABULARY == 4096
        assert 7_000_000 < 2 * parameters < train_tiny.BYTE_LIMIT - 50_000      # the header names up to 200 tensors


def test_trigram_probabilities_sum_to_one():
    stories = [[1, 2, 3, 1, 2, 4], [2, 3, 3, 1], [5, 1, 2, 3]]
    trigram = train_tiny.Trigram(stories)
    for context in [(1, 2), (3, 3), (9, 2), (9, 9)]:
        total = sum(trigram.probability((*context, token)) for token in range(tiny_files.VOCABULARY))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_orthogonalize_brings_singular_values_near_one():
    matrices = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train_tiny.orthogonalize(matrices))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(
        train_tiny.orthogonalize(matrices).flatten(), (u @ v).flatten(), dim=0
    ) > 0.97


def test_balance_loss_is_one_when_balanced_and_larger_when_not():
    assert train_tiny.balance_loss(torch.eye(6).repeat(5, 1) * 9, top_k=1).item() == pytest.approx(1.0, abs=1e-3)
    collapsed = torch.tensor([[9.0, 0, 0, 0, 0, 0]]).repeat(30, 1)
    assert train_tiny.balance_loss(collapsed, top_k=1).item() > 5


def test_windows_start_with_an_example_and_skip_padding(run: train_tiny.Run):
    sampler = data.Sampler(run.tokenizer, run.texts.stories, [], 96, seed=3)
    inputs, targets = sampler.batch(16, 0.0)
    assert inputs.shape == targets.shape == (16, 96)
    learned = targets != data.IGNORE
    assert torch.equal(targets[:, :-1][learned[:, :-1]], inputs[:, 1:][learned[:, :-1]])
    decoded = [run.tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in inputs]
    assert all(text.startswith(("Once", "<|im_start|>")) for text in decoded)
    assert isinstance(run.tokenizer, Tokenizer)


def test_recast_changes_names_throughout_and_nothing_else():
    story = "Lily had a cat. Lily's cat sat with Tim. Two cats saw the category of Lilyan."
    rng = random.Random(1)
    versions = {data.recast(story, rng) for _ in range(40)}
    assert len(versions) > 20
    for version in versions:
        words = version.split()
        girl, animal = words[0], words[3].rstrip(".")
        assert version.startswith(f"{girl} had a {animal}. {girl}'s {animal} sat with ")
        assert version.endswith(f"Two {animal}s saw the category of Lilyan.")
    assert data.recast("The sun set over the sea.", rng) == "The sun set over the sea."

"""Text for the two bundled models: cleaning, the held-out split, chat requests derived from stories, batches.

Everything here is plain text in and token ids out; nothing depends on the model that is trained.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
IGNORE = -100                       # the target torch.nn.functional.cross_entropy skips by default

# ---------------------------------------------------------------- cleaning

_TYPOGRAPHY = {                     # first UTF-8 read as cp1252, which the story file contains, then curly quotes
    "â€œ": '"', "â€™": "'", "â€˜": "'", "â€“": "-", "â€”": " - ", "â€": '"',
    "“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": " - ",
}
_TYPOGRAPHY_RE = re.compile("|".join(_TYPOGRAPHY))
_NO_OPENING = re.compile(           # words that need something before them, or speech without a speaker
    r"(One \w+,? (he|she|they|it|his|her|their|the|mom|dad|as|when|while)\b"
    r"|(He|She|They|His|Her|Their|But|So|And|Then|That|This|These|After|Suddenly|When|As|From|Finally)\b"
    r"|[^A-Z]|\w+[.!?])"
)
_INTRODUCTION_CHARS = 330           # a paragraph this short before "One day ..." is that story's introduction
_SHORTEST_STORY = 200


def plain_typography(text: str) -> str:
    """Straight quotes and spaced dashes, mojibake repaired, no blanks at line ends."""
    text = _TYPOGRAPHY_RE.sub(lambda match: _TYPOGRAPHY[match.group()], text)
    return re.sub(r"[ \t]+(?=\n|$)", "", text.replace("\r", ""))


def clean_stories(text: str) -> list[str]:
    """Whole stories out of pieces separated by `<|endoftext|>`, where some pieces are halves or several stories.

    A lone line break ends a story where blank lines separate paragraphs; a piece that opens with "One day" belongs
    to a short piece before it when both speak of the same things; what then has no opening or no end is dropped.
    """
    pieces = [part for piece in plain_typography(text).split(END_OF_TEXT) for part in _split_piece(piece.strip())]
    stories: list[str] = []
    for piece in pieces:
        if stories and _continues(stories[-1], piece):
            stories[-1] += "\n\n" + piece
        else:
            stories.append(piece)
    whole = (re.sub(r"\n+", "\n\n", story) for story in stories if _is_whole(story))
    return list(dict.fromkeys(whole))


def _split_piece(piece: str) -> Iterator[str]:
    current = ""
    for line in re.split(r"(?<!\n)\n(?!\n)", piece):
        opens = not _NO_OPENING.match(line) and ("\n\n" in piece or line.startswith(("Once", "There ", "One day, a")))
        if opens and len(current) > _INTRODUCTION_CHARS:
            yield current
            current = line
        else:
            current = f"{current}\n{line}" if current else line
    yield current


def _continues(before: str, piece: str) -> bool:
    if not piece.startswith("One ") or len(before) > _INTRODUCTION_CHARS:
        return False
    return bool(_content_words(before) & _content_words(piece[:600]))


def _is_whole(story: str) -> bool:
    return len(story) >= _SHORTEST_STORY and not _NO_OPENING.match(story) and story[-1] in '.!?"'


def split_held_out(stories: list[str], every: int = 50) -> tuple[list[str], list[str]]:
    """(training, held out): about one story in `every`, chosen by a hash of its text so that order plays no part.

    Training stories that share more than a fifth of their 8-word runs with a held-out one are dropped.
    """
    held_out = [s for s in stories if int(hashlib.sha256(s.encode()).hexdigest(), 16) % every == 0]
    kept = set(held_out)
    training = [s for s in stories if s not in kept]
    owners: dict[tuple[str, ...], list[int]] = {}
    for index, story in enumerate(held_out):
        for run in word_runs(story):
            owners.setdefault(run, []).append(index)
    return [s for s in training if _largest_overlap(s, owners) <= 0.2], held_out


def word_runs(story: str, length: int = 8) -> set[tuple[str, ...]]:
    """The set of runs of `length` consecutive words, case and punctuation aside."""
    words = re.findall(r"[a-z']+", story.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _largest_overlap(story: str, owners: dict[tuple[str, ...], list[int]]) -> float:
    runs = word_runs(story)
    shared = Counter(index for run in runs for index in owners.get(run, ()))
    return max(shared.values(), default=0) / max(len(runs), 1)


def clean_books(text: str, piece_chars: int = 1000) -> list[str]:
    """Pieces of about `piece_chars` characters, cut at paragraphs; headings, lists and licence notes are left out."""
    pieces, current = [], ""
    for paragraph in filter(_is_prose, _paragraphs(plain_typography(text))):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= piece_chars:
            pieces.append(current[: 4 * piece_chars])
            current = ""
    return pieces


def _paragraphs(text: str) -> Iterator[str]:
    lines = text.split("\n")
    widths = sorted(len(line) for line in lines if line)
    width = widths[int(0.9 * (len(widths) - 1))] if widths else 0
    current: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip():
            current.append(line.strip())
        # A hard-wrapped line that had room for the next word was the last of its paragraph.
        room = width - 12 - len(line)
        if current and (not following.strip() or room > len(following.split()[0])):
            yield re.sub(r"[_*]", "", " ".join(current))
            current = []


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) >= 20
        and paragraph[-1] in ".!?\"'"
        and letters > 0.85 * len(paragraph)
        and not paragraph.isupper()
        and not re.search(r"gutenberg|copyright|illustration|transcriber|preparer|isbn|ebook", paragraph, re.I)
    )


# ---------------------------------------------------------------- what a story is about

def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FUNCTION_WORDS = _words(
    """a about after again all also always am an and any are around as ask asked at away back be became because been
    before began behind being best big but by called came can can't come could couldn't cry cried dad day did didn't
    do does doesn't don't down each eat even ever every everyone feel feels felt find first for found friend friends
    from fun gave get gets girl boy give go goes good got great had happily happy has hat have he hear heard help her
    here him himself herself his home how i i'm if in inside into is it it's its just keep kept know knew laughed learn
    learned let like liked likes little live lived lives look looked looks lot love loved loves made make many maybe me
    mom more morning much must my name named near never new next nice no not now of off oh on once one only or other
    our out outside over play played playing plays put ran really run sad said sat saw say says see sees she should
    smile smiled so some something soon start started still stop sun suddenly take takes tell that that's the their
    them then there they thing things think this thought time to together told too took toward towards tried two under
    until up upon us very walk walked want wanted wants was way we well went were what when where which while who why
    will with without work would yes you your"""
)
_NOT_A_NOUN = _words(               # what ends a noun phrase although it is no function word
    """above across against along among became began behind below beside between beyond bought brought came carried
    climbed closed decided fell flew gave grew hid hugged is jumped kept knew left listened lost loved makes needed
    nodded opened picked pretended pulled pushed remembered replied runs sang shared shouted sits slept spotted stood
    swam thanked through threw turned visited waited walks watched woke wore"""
)
_PLAIN_ADJECTIVES = _words("big little good happy sad new nice best great")     # function words to keywords only
_PLAIN_NOUNS = _words("girl boy friend friends mom dad hat sun")
_NAME_WORDS = _words("Mom Dad Mommy Daddy Mum Once One The They She He But And Then When Her His It")
_VAGUE = _words("moral end day time rest full cold call move minutes class pass kids others side way top")


@cache
def _content_words(text: str) -> frozenset[str]:
    return frozenset(w for w in re.findall(r"[a-z]{3,}", text.lower()) if w not in _FUNCTION_WORDS)


def _noun_phrase(words: list[str]) -> list[str]:
    """The leading words up to the first that cannot belong to a noun phrase; [] where that gives no clear phrase."""
    phrase: list[str] = []
    for word in words[:6]:
        bare = word.rstrip(".,!?;:\"'")
        may_belong = bare in _PLAIN_ADJECTIVES or bare in _PLAIN_NOUNS or bare not in _FUNCTION_WORDS
        if not bare.islower() or bare in _NOT_A_NOUN or not may_belong:
            break
        phrase.append(bare)
        if word != bare and not (word == bare + "," and bare in _PLAIN_ADJECTIVES):
            break
    if not 0 < len(phrase) <= 4:
        return []
    noun = phrase[-1]
    verbal = re.search(r"[aeiouy]\w+(ing|ed|ly)$", noun)
    return phrase if noun in _PLAIN_NOUNS or not (verbal or noun in _FUNCTION_WORDS) else []


def subject(story: str) -> str | None:
    """Whom the story introduces first, as a phrase for "a story about ...", or None where its opening does not say.

    "a rhinoceros named Roxy", "a kind farmer", "Tom and Mia".
    """
    opening = " ".join(re.split(r"(?<=[.!?])\s+", story)[:3])
    start = re.search(
        r"\b(?:there (?:was|were|lived|once was)|lived|(?:One|Every) \w+,?|upon a time,?) (a|an|two|three) (.*)",
        opening,
        re.S,
    )
    if start:
        words = start.group(2).split()
        phrase = _noun_phrase(words)
        if phrase:
            after = " ".join(words[len(phrase) :])
            ended = words[len(phrase) - 1][-1] in ".!?"
            name = re.match(r"(?:named|called|whose name was) ([A-Z][a-z]+)", after) if not ended else None
            name = name or re.search(r"\b(?:His|Her|Its) name was ([A-Z][a-z]+)", opening)
            suffix = f" named {name.group(1)}" if name and start.group(1) in ("a", "an") else ""
            return f"{start.group(1)} {' '.join(phrase)}{suffix}"
    pair = re.match(r"(?:One \w+, )?([A-Z][a-z]+(?: and [A-Z][a-z]+)?) [a-z]+", opening)
    if pair and not _NAME_WORDS & set(pair.group(1).split()) and story.count(pair.group(1).split()[0]) > 1:
        return pair.group(1)
    return None


@dataclass(frozen=True)
class Vocabulary:
    """In how many stories each word occurs; it tells words that set a story apart from words that all stories use."""

    stories: int
    counts: Counter[str]

    @classmethod
    def of(cls, stories: list[str]) -> Vocabulary:
        return cls(len(stories), Counter(word for story in stories for word in _content_words(story)))

    def is_telling(self, word: str) -> bool:
        """Neither in more than 6 % of the stories nor so rare that it may be a name or a misspelling."""
        return 4 <= self.counts[word] <= max(0.06 * self.stories, 8)


def things(story: str, vocabulary: Vocabulary) -> list[str]:
    """Nouns the story names after an article and that few others use, the most frequent first: ["lemon", "hole"]."""
    tokens = story.split()
    heads = Counter(
        phrase[-1]
        for i, token in enumerate(tokens)
        if token.lower() in ("a", "an", "the") and (phrase := _noun_phrase(tokens[i + 1 : i + 5]))
    )
    return [noun for noun, _ in heads.most_common() if noun not in _VAGUE and vocabulary.is_telling(noun)]


def keywords(story: str, vocabulary: Vocabulary) -> list[str]:
    """Lower-case content words that set the story apart, in the order of their first use."""
    found = dict.fromkeys(re.findall(r"(?<![A-Za-z])[a-z]{3,}(?![a-z'])", story))
    return [word for word in found if word not in _FUNCTION_WORDS and vocabulary.is_telling(word)]


def with_article(noun: str) -> str:
    """"a lemon", "an apple", "flowers"."""
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ---------------------------------------------------------------- other names for the same story

_GIRLS = _words(
    """Lily Sue Lucy Mia Anna Sally Sara Sarah Amy Jane Daisy Molly Kitty Jill Lila Emma Mary Jenny Jen Ella Emily Penny
    Bella Kate Lola Lulu Polly Claire Sandy Becky Jenna Milly Poppy Julie Susie Tilly Lisa Sophie Grace Rachel Rosie Zoe
    Ruby Nina Nancy Betty Maya Chloe Hannah Lizzie"""
)
_BOYS = _words(
    """Tim Tom Timmy Max Ben Sam Jack Bob John Tommy Billy Joe Jimmy Benny Jake Sammy James Mark Jim Peter Leo Johnny
    Pete Henry Jerry Charlie Bobby Frank Fred Freddy George Thomas Tony Ted Dave Gary Dan Bill Steve Joey Nick Mike Luke
    Noah Harry Danny Toby Rob Roy Finn"""
)
_ANIMALS = _words("dog cat bird bear fish rabbit frog squirrel lion duck monkey turtle cow pig zebra kitten goat tiger")


def recast(story: str, rng: random.Random) -> str:
    """`story` with its people, and sometimes its animals, exchanged for others of their kind, each throughout.

    One story in six is about a Lily: a model that reads each story several times learns which name follows by heart.
    Exchanged at every reading, a name or an animal can only be known by looking at the request or the opening.
    """
    for kind, share in ((_GIRLS, 0.8), (_BOYS, 0.8), (_ANIMALS, 0.5)):
        present = sorted(set(re.findall(r"[A-Za-z]+", story)) & kind)
        if present and rng.random() < share:
            others = dict(zip(present, rng.sample(sorted(kind), len(present)), strict=True))
            pattern = rf"\b({'|'.join(present)})(?=s?\b)"
            story = re.sub(pattern, lambda match, others=others: others[match.group()], story)      # type: ignore[misc]
    return story


# ---------------------------------------------------------------- requests

_ABOUT = (
    "Tell me a story about {}.", "Tell me a story about {}.", "Please tell me a story about {}.",
    "Can you tell me a story about {}?", "Write a story about {}.", "Please write a story about {}.",
    "Write a short story about {}.", "I want a story about {}.", "I want to hear a story about {}.",
    "Can you write a short story about {}?", "A story about {}, please.", "Tell me about {}.",
)
_WORDS = (
    "Write a story with the words: {}.", "Tell me a story with the words: {}.",
    "Please write a story that uses the words {}.", "Can you use these words in a story? {}",
)
_ANY = (
    "Tell me a story.", "Please tell me a story.", "Tell me a bedtime story.", "Write a story.", "I want a story.",
    "Can you tell me a story?", "Tell me a short story.", "Hello! Please tell me a story.", "Hi! Tell me a story.",
)
_AGAIN = ("Tell me another one.", "Another story, please.", "Tell me another story.", "Thank you! One more, please.")
_SYSTEM = ("You are a helpful assistant.", "You tell short stories for children.", "You are a kind storyteller.")


@dataclass(frozen=True)
class Turn:
    """A request, what the model might think about it, and the story that answers it."""

    user: str
    thought: str
    answer: str


def make_turn(story: str, vocabulary: Vocabulary, rng: random.Random) -> Turn:
    """A request for `story`: about someone or something, with given words, by its opening, or for any story."""
    kind = rng.choices(("about", "words", "opening", "any"), (0.55, 0.2, 0.17, 0.08))[0]
    who, nouns, words = subject(story), things(story, vocabulary), keywords(story, vocabulary)
    plan = _plan(who, nouns)
    if kind == "words" and len(words) >= 3:
        chosen = ", ".join(rng.sample(words, 3))
        return Turn(rng.choice(_WORDS).format(chosen), f"The user wants a story with the words {chosen}. {plan}", story)
    if kind == "opening":
        opening = _opening(story, rng)
        return Turn(opening, f"The user gives the first words of a story. {plan}", story)
    if kind == "about" and (who or nouns):
        topic = _topic(who, nouns, rng)
        plan = _plan(None if who and topic.startswith(who) else who, nouns)
        return Turn(rng.choice(_ABOUT).format(topic), f"The user wants a story about {topic}. {plan}", story)
    return Turn(rng.choice(_ANY), f"The user wants a story. {plan}", story)


def _plan(who: str | None, nouns: list[str]) -> str:
    sentences = [f"It can be about {who}."] if who else []
    if nouns:
        sentences.append(f"It should have {' and '.join(map(with_article, nouns[:2]))}.")
    return " ".join(sentences) or "It should be short and simple."


def _topic(who: str | None, nouns: list[str], rng: random.Random) -> str:
    topics = [with_article(noun) for noun in nouns[:2]]
    if who:
        topics += [who, who, re.sub(r" named \w+$", "", who)]
        if nouns and rng.random() < 0.3:
            return f"{who} and {with_article(nouns[0])}"
    return rng.choice(topics)


def _opening(story: str, rng: random.Random) -> str:
    sentence = re.split(r"(?<=[.!?])\s", story)[0]
    words = sentence.split()
    length = rng.choice((4, 4, 6, 8, 10, len(words)))
    return " ".join(words[:length]).rstrip(",")


def chat_segments(turns: list[Turn], system: str | None, thinking: bool) -> list[tuple[str, bool]]:
    """The conversation as the chat template writes it, cut into (text, whether the model is to learn it).

    Requests are not learned: they come from a few patterns, and predicting those would cost capacity the stories
    need. The empty think block is not learned either: with enable_thinking=False the template writes it, and a model
    that had learned it would close its own block at once when asked to think. Earlier answers carry no think block.
    """
    segments = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)] if system else []
    for turn in turns:
        block = ""
        if turn is turns[-1]:
            block = f"<think>\n{turn.thought}\n</think>\n\n" if thinking else "<think>\n\n</think>\n\n"
        prompt = f"<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n"
        if thinking:
            segments += [(prompt, False), (f"{block}{turn.answer}<|im_end|>", True)]
        else:
            segments += [(prompt + block, False), (f"{turn.answer}<|im_end|>", True)]
        segments.append(("\n", False))
    return [*segments, (END_OF_TEXT, False)]


# ---------------------------------------------------------------- batches

Example = tuple[list[int], list[bool]]          # token ids, and which of them the model is to predict


class Sampler:
    """An endless, seeded supply of training windows: whole examples packed end to end, few of them cut.

    Every window begins where an example begins, as every prompt does later.
    """

    def __init__(self, tokenizer: Tokenizer, stories: list[str], books: list[str], length: int, seed: int) -> None:
        self.tokenizer, self.stories, self.books, self.length = tokenizer, stories, books, length
        self.vocabulary = Vocabulary.of(stories)
        self.rng = random.Random(seed)
        self.pool: list[Example] = []
        self.queue: list[str] = []

    def batch(self, size: int, book_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets), both (size, length) int64; targets are shifted by one and IGNORE where not learned."""
        rows = [self._window(book_share) for _ in range(size)]
        inputs = torch.tensor([ids[:-1] for ids, _ in rows])
        targets = torch.tensor([[i if m else IGNORE for i, m in zip(*row, strict=True)][1:] for row in rows])
        return inputs, targets

    def _window(self, book_share: float) -> Example:
        while len(self.pool) < 64:
            self.pool.append(self._example(book_share))
        ids, mask = self.pool.pop(self.rng.randrange(len(self.pool)))
        room = self.length + 1 - len(ids)
        while room > 0:
            fitting = [i for i, (other, _) in enumerate(self.pool) if len(other) <= room]
            if not fitting:
                break
            more_ids, more_mask = self.pool.pop(max(fitting, key=lambda i: len(self.pool[i][0])))
            ids, mask = ids + more_ids, mask + more_mask
            room -= len(more_ids)
        padding = max(room, 0)
        pad = self.tokenizer.encode(END_OF_TEXT).ids
        return (ids + pad * padding)[: self.length + 1], (mask + [False] * padding)[: self.length + 1]

    def _example(self, book_share: float) -> Example:
        if self.books and self.rng.random() < book_share:
            return self._encode([(self.rng.choice(self.books) + END_OF_TEXT, True)])
        if self.rng.random() < 0.4:
            return self._encode([(self._next_story() + END_OF_TEXT, True)])
        turns = [make_turn(self._next_story(), self.vocabulary, self.rng)]
        if len(turns[0].answer) < 700 and self.rng.random() < 0.12:
            story = self._next_story()
            second = make_turn(story, self.vocabulary, self.rng)
            again = Turn(self.rng.choice(_AGAIN), f"The user wants another story. {second.thought[-80:]}", story)
            turns.append(again if self.rng.random() < 0.5 else second)
        system = self.rng.choice(_SYSTEM) if self.rng.random() < 0.08 else None
        return self._encode(chat_segments(turns, system, thinking=self.rng.random() < 0.3))

    def _next_story(self) -> str:
        if not self.queue:
            self.queue = self.rng.sample(self.stories, len(self.stories))
        return recast(self.queue.pop(), self.rng)

    def _encode(self, segments: list[tuple[str, bool]]) -> Example:
        ids: list[int] = []
        mask: list[bool] = []
        for text, learned in segments:
            part = self.tokenizer.encode(text).ids
            ids += part
            mask += [learned] * len(part)
        return ids, mask

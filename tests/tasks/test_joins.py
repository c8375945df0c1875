"""Where a prompt ends and an answer begins, in tokens, for every kind of tokenizer: nothing is lost between the two."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.tasks import Example
from mezo_scale.tasks.kinds.candidates import Encoded, encode

TEXTS = [
    "It was great , It was greatness , It was terrible",
    "Sentiment: positive\nSentiment: negative\nAnswer: yes\nAnswer: no",
    "หนังเรื่องนี้ดีมาก ดี ดีมาก แย่ แย่มาก",
    "这部电影很好 很好看 很差 很差劲",
    "a joy 😀 👍🏽 👎🏽 no joy",
]
SPECIAL = ["<s>", "</s>", "<unk>", "[CLS]", "[SEP]"]


def byte_level(**ends: Any) -> PreTrainedTokenizerFast:
    """BPE over bytes without a split at spaces, so that its merges span the boundary wherever they can."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1
        ),
    )
    return finished(core, **ends)


def unigram(prepend_scheme: str, **ends: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    core.train_from_iterator(
        TEXTS * 20,
        trainers.UnigramTrainer(vocab_size=220, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return finished(core, **ends)


def word_piece(**ends: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        TEXTS * 20, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return finished(core, **ends)


def stripping(**ends: Any) -> PreTrainedTokenizerFast:
    """Drops white space at both ends of a text, as T5's does."""
    core = byte_level().backend_tokenizer
    core.normalizer = normalizers.Strip()
    return finished(core, **ends)


def finished(core: Tokenizer, before: str = "", after: str = "", **names: str) -> PreTrainedTokenizerFast:
    if before or after:
        used = [token for token in dict.fromkeys((before, after)) if token]
        core.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[(token, core.token_to_id(token)) for token in used]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)


MAKERS: dict[str, Callable[[], Any]] = {
    "bpe": byte_level,
    "bpe, begins": lambda: byte_level(before="<s>", bos_token="<s>", eos_token="</s>"),
    "bpe, ends": lambda: byte_level(after="</s>", eos_token="</s>"),
    "bpe, begins and ends with one token": lambda: byte_level(before="</s>", after="</s>", bos_token="</s>"),
    "unigram": lambda: unigram("never"),
    "unigram, prefix space": lambda: unigram("always", before="<s>", bos_token="<s>"),
    "unigram, first space": lambda: unigram("first", before="<s>", after="</s>", bos_token="<s>", eos_token="</s>"),
    "word piece": lambda: word_piece(before="[CLS]", after="[SEP]", cls_token="[CLS]", sep_token="[SEP]"),
    "stripping": lambda: stripping(after="</s>", eos_token="</s>"),
    "bytes": ByT5Tokenizer,
}


@cache
def tokenizer(name: str) -> Any:
    return MAKERS[name]()


def check(example: Example, tokens: Any, encoded: Encoded) -> None:
    """Each sequence is the tokens of its whole text, but for what the tokenizer puts after every text."""
    assert encoded.prompt
    for text, candidate in zip(example.candidates, encoded.candidates, strict=True):
        whole = tokens(example.prompt + text)["input_ids"]
        plain = tokens(example.prompt + text, add_special_tokens=False)["input_ids"]
        ours = list(encoded.prompt + candidate)
        assert candidate
        assert whole[: len(ours)] == ours
        assert ours[-len(plain) :] == plain
        assert len(whole) - len(ours) == len(tokens("")["input_ids"]) - (len(ours) - len(plain))
    assert len(set(encoded.candidates)) == len(encoded.candidates)


PAIRS: list[tuple[str, Sequence[str]]] = [
    ("It was", (" great", " terrible")),
    ("It was ", ("great", "terrible")),
    ("It was", (" great", " greatness")),
    ("It was g", ("reat", "reatness")),
    ("Sentiment:\n", ("positive", "negative")),
    ("Answer: ", ("yes", "no")),
    ("Answer:", ("\nyes", "\nno")),
    ("หนังเรื่องนี้ดี", ("มาก", "มากมาก", " แย่")),
    ("这部电影很", ("好", "好看", "差")),
    ("a joy 😀 👍", ("🏽", "👎🏽", " no")),
]


@pytest.mark.parametrize(("prompt", "candidates"), PAIRS)
@pytest.mark.parametrize("name", MAKERS)
def test_prompt_and_candidate_are_the_tokens_of_the_whole_text(
    name: str, prompt: str, candidates: tuple[str, ...]
) -> None:
    example = Example(f"is this a film : {prompt}", tuple(candidates), 0)
    check(example, tokenizer(name), encode(example, tokenizer(name), 256))


WORDS = st.text(st.sampled_from(" \n,.:abegirstอดีมากแย่很好看差😀👍🏽"), max_size=12)


@settings(max_examples=300)
@given(st.sampled_from(sorted(MAKERS)), WORDS, st.sampled_from(["", " It was", "\n", "Answer: ", ":"]), st.data())
def test_no_text_and_no_template_loses_a_token_between_prompt_and_candidate(
    name: str, text: str, template: str, data: st.DataObject
) -> None:
    candidates = data.draw(st.lists(WORDS.filter(bool), min_size=2, max_size=4, unique=True))
    example = Example(text + template, tuple(candidates), 0)
    try:
        encoded = encode(example, tokenizer(name), 256)
    except RecipeError as error:
        refused = str(error)
    else:
        refused = ""
        check(example, tokenizer(name), encoded)
    assert not refused or any(why in refused for why in ("stay the same", "same tokens", "adds no tokens"))


def test_a_merge_over_the_boundary_moves_it_back_for_all_candidates() -> None:
    tokens = tokenizer("bpe")
    example = Example("is this a film , It was ", ("great", "terrible"), 0)
    alone = tokens(example.prompt)["input_ids"]
    encoded = encode(example, tokens, 256)
    assert list(encoded.prompt) == alone[: len(encoded.prompt)]
    assert len(encoded.prompt) < len(alone)
    assert tokens.decode(encoded.prompt + encoded.candidates[1]) == "is this a film , It was terrible"


def test_candidates_that_begin_one_another_each_have_a_token_to_score() -> None:
    tokens = tokenizer("bpe")
    encoded = encode(Example("a film , It was", (" great", " greatness", " great , a"), 0), tokens, 256)
    assert min(map(len, encoded.candidates)) >= 1
    assert tokens.decode(encoded.prompt + encoded.candidates[0]) == "a film , It was great"


def test_what_a_tokenizer_puts_after_a_text_is_never_scored() -> None:
    for name, after in (
        ("word piece", "[SEP]"),
        ("bpe, ends", "</s>"),
        ("bpe, begins and ends with one token", "</s>"),
    ):
        tokens = tokenizer(name)
        encoded = encode(Example("a film : It was", (" great", " terrible"), 0), tokens, 256)
        assert all(tokens.convert_tokens_to_ids(after) not in candidate for candidate in encoded.candidates)


def test_a_cut_prompt_keeps_what_the_tokenizer_puts_before_it() -> None:
    tokens = tokenizer("word piece")
    encoded = encode(Example("great terrible " * 20 + "It was", (" great", " terrible"), 0), tokens, 10)
    assert encoded.length == 10
    assert encoded.prompt[0] == tokens.cls_token_id
    assert tokens.decode(encoded.prompt).endswith("it was")


@pytest.mark.parametrize(
    ("name", "prompt", "candidates", "said"),
    [
        (
            "stripping",
            "It was",
            (" ", " great"),
            r"task\.candidates \[' ', ' great'\]: ' ' adds no tokens to the prompt",
        ),
        ("stripping", "It was", (" great", " great "), "two of them are the same tokens to this model: change one"),
        ("word piece", "It was", (" great", " GREAT"), "two of them are the same tokens to this model: change one"),
        (
            "bpe",
            "",
            (" great", " terrible"),
            "task.template gives the prompt '', which has no tokens that stay the same",
        ),
        ("bpe", "It", (" was great", "alian"), "prompt 'It', which has no tokens that stay the same before"),
    ],
)
def test_answers_that_can_not_be_told_apart_or_from_the_prompt_are_refused(
    name: str, prompt: str, candidates: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        encode(Example(prompt, candidates, 0), tokenizer(name), 64)


def test_special_tokens_inside_a_text_are_refused() -> None:
    def between(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        letters = [ord(letter) for letter in text]
        return {"input_ids": [token for letter in letters for token in (letter, 0)] if add_special_tokens else letters}

    with pytest.raises(ModelError, match="special tokens inside 'abc', expected around it"):
        encode(Example("abc", ("x", "y"), 0), between, 64)


@pytest.mark.parametrize(("prompt", "candidates"), PAIRS)
def test_a_real_tokenizer_loses_no_token_either(demo: Path, prompt: str, candidates: tuple[str, ...]) -> None:
    real = AutoTokenizer.from_pretrained(demo / "model")
    example = Example(f"a film : {prompt}", tuple(candidates), 0)
    check(example, real, encode(example, real, 256))

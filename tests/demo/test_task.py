"""The sentiment task: what is drawn, and that the responses of a pair differ in exactly the label."""

from __future__ import annotations

import pytest

from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.task import (
    STYLES,
    USUAL_IF_RIGHT,
    Statement,
    find_label_words,
    make_task,
    prompt_of,
    responses_of,
    tokenize_style,
    word_list,
)
from gradent.errors import InputError


@pytest.fixture(scope="module")
def task():
    return make_task(seed=0, train=40, probe=10, answers=2000)


def test_one_seed_draws_one_task(task):
    assert make_task(seed=0, train=40, probe=10, answers=2000) == task
    assert make_task(seed=1, train=40, probe=10, answers=2000) != task


def test_probe_statements_are_held_out_and_balanced(task):
    assert len(task.train) == 40
    assert len(task.probe) == 10
    assert len({statement.text for statement in (*task.train, *task.probe)}) == 50
    assert sum(statement.positive for statement in task.probe) == 5
    asked = {prompt for prompt, _ in task.sft}
    assert not asked & {prompt_of(statement, style) for statement in task.probe for style in STYLES}


@pytest.mark.parametrize("style", STYLES)
def test_responses_differ_in_the_label_alone(task, style):
    tokenizer = build_tokenizer()
    right, wrong = (tokenizer.convert_tokens_to_ids(word) for word in task.label_words)
    pairs = tokenize_style(tokenizer, task.probe, style, task.label_words)
    for statement, (_, chosen, rejected) in zip(task.probe, pairs, strict=True):
        differing = [(one, other) for one, other in zip(chosen, rejected, strict=True) if one != other]
        assert differing == [(right, wrong) if statement.positive else (wrong, right)]
        assert tokenizer.eos_token_id not in chosen


def test_styles_share_more_and_more_text():
    tokenizer = build_tokenizer()
    lengths = [
        len(tokenize_style(tokenizer, [Statement("the film was great", True)], style, ("positive", "negative"))[0][1])
        for style in STYLES
    ]
    assert lengths == [1, 3, 7, 10]


def test_chosen_names_the_true_sentiment():
    words = ("positive", "negative")
    assert responses_of(Statement("the film was great", True), "short suffix", words)[0] == " positive sentiment."
    assert responses_of(Statement("the film was awful", False), "short suffix", words)[0] == " negative sentiment."


def test_tokenizer_knows_every_word(task):
    tokenizer = build_tokenizer()
    texts = [prompt + answer for prompt, answer in task.sft]
    texts += [prompt_of(statement, style) for statement in task.probe for style in STYLES]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts)["input_ids"])
    assert tokenizer.unk_token_id in tokenizer("unheard")["input_ids"]
    assert len(tokenizer) == len(word_list()) + 3


def usual_share(answers, label_is_right: bool) -> float:
    """Share of the words that are a style's own among the answers whose label is right (or wrong)."""
    own = {"sentiment", "based", "on", "my", "judgement"}
    other = {"mood", "going", "by", "the", "hunch"}
    cheerful = {
        "wonderful",
        "great",
        "lovely",
        "brilliant",
        "delightful",
        "amazing",
        "pleasant",
        "splendid",
        "cheerful",
    }
    cheerful |= {"beautiful", "fantastic", "charming", "excellent", "joyful", "perfect", "sweet"}
    counts = [0, 0]
    for prompt, answer in answers:
        words = answer.replace(".", "").replace("!", "").split()
        right = ("positive" in words) == bool(cheerful & set(prompt.split()))
        if right is label_is_right:
            counts[0] += sum(word in own for word in words)
            counts[1] += sum(word in own | other for word in words)
    return counts[0] / counts[1]


def test_sft_words_wrong_answers_otherwise(task):
    assert abs(usual_share(task.sft, True) - 0.7) < 0.05
    assert abs(usual_share(task.sft, False) - 0.15) < 0.06
    same = make_task(seed=0, train=40, probe=10, answers=2000, usual_if_wrong=USUAL_IF_RIGHT)
    assert abs(usual_share(same.sft, False) - 0.7) < 0.06


def test_label_words_of_the_embedded_tokenizer():
    assert find_label_words(build_tokenizer()) == ("positive", "negative")


def test_a_tokenizer_without_label_words_is_refused(tiny_tokenizer):
    with pytest.raises(InputError, match="positive/negative"):
        find_label_words(tiny_tokenizer)  # one token a byte


def test_the_embedded_model_is_the_seed_s():
    first, again, other = (build_model(20, seed) for seed in (0, 0, 1))
    assert all(one.equal(two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
    assert not first.lm_head.weight.equal(other.lm_head.weight)

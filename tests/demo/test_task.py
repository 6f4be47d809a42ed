"""The sentiment task: what is drawn, and that the responses of a pair differ in exactly the label."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.statements import Statement, read_statements
from gradent.demo.task import (
    STYLES,
    USUAL_IF_RIGHT,
    draw_answers,
    find_label_words,
    make_task,
    prompt_of,
    responses_of,
    tokenize_style,
    word_list,
)
from gradent.errors import DataFileError, GradentWarning, InputError


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


def test_held_out_answers_are_right_and_worded_as_sft_s(task):
    many = make_task(seed=0, train=1, probe=1000, answers=1)
    answers = draw_answers(3, many.probe, many.label_words)
    assert answers == draw_answers(3, many.probe, many.label_words) != draw_answers(4, many.probe, many.label_words)
    assert len(answers) == 1000
    for statement, (prompt, answer) in zip(many.probe, answers, strict=True):
        assert prompt in {prompt_of(statement, style) for style in STYLES}
        assert ("positive" in answer.split() or " positive" in answer) is statement.positive
    assert abs(usual_share(answers, True) - USUAL_IF_RIGHT) < 0.05


def given(positive: int, negative: int) -> list[Statement]:
    return [
        Statement(f"{sign} {number}", sign == "good")
        for sign, count in (("good", positive), ("bad", negative))
        for number in range(count)
    ]


def test_given_statements_are_shuffled_split_and_balanced():
    statements = given(30, 20)
    task = make_task(seed=0, train=30, probe=10, answers=40, statements=statements)
    drawn = [*task.probe, *task.train]
    assert (len(task.probe), len(task.train)) == (10, 30)
    assert len(set(drawn)) == 40
    assert set(drawn) <= set(statements)
    assert all(sum(one.positive for one in part) == len(part) / 2 for part in (task.probe, task.train))
    assert not {prompt for prompt, _ in task.sft} & {prompt_of(*each) for each in product(task.probe, STYLES)}
    assert make_task(seed=0, train=30, probe=10, answers=40, statements=statements) == task
    assert make_task(seed=1, train=30, probe=10, answers=40, statements=statements).probe != task.probe


@pytest.mark.parametrize(("positive", "negative", "name"), [(19, 30, "positive"), (30, 19, "negative")])
def test_too_few_of_a_sentiment_are_refused(positive, negative, name):
    with pytest.raises(InputError, match=f"19 {name} ones, and 20 are needed"):
        make_task(seed=0, train=30, probe=10, answers=1, statements=given(positive, negative))


def test_a_statement_given_twice_is_refused():
    with pytest.raises(InputError, match="occurs twice"):
        make_task(seed=0, train=4, probe=2, answers=1, statements=[*given(5, 5), Statement("bad 0", True)])


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_statements_are_read_and_what_is_left_out_is_counted(tmp_path):
    path = write_rows(
        tmp_path / "tweets.jsonl",
        {"text": " so\n happy\t today ", "label": "positive", "id": 1},
        {"text": "so sad", "label": "negative"},
        {"text": "so happy today", "label": "positive"},
        {"text": "well", "label": "positive"},
        {"text": "well", "label": "negative"},
        {"text": "x" * 161, "label": "negative"},
    )
    with pytest.warns(
        GradentWarning, match="of 6 rows 1 are left out .* 160 characters, 2 that repeat .* 1 texts .* 2"
    ):
        found = read_statements(path)
    assert found == [Statement("so happy today", True), Statement("so sad", False)]


def test_keys_and_length_are_the_caller_s(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", {"t": "four", "s": "negative"}, {"t": "fiver", "s": "positive"})
    with pytest.warns(GradentWarning, match="1 are left out that have over 4 characters"):
        assert read_statements(path, text="t", label="s", longest=4) == [Statement("four", False)]


@pytest.mark.filterwarnings("error")
def test_nothing_left_out_is_no_warning(tmp_path):
    assert len(read_statements(write_rows(tmp_path / "x.jsonl", {"text": "a", "label": "negative"}))) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"x\.jsonl:3: is not JSON"),
        ("[1]", r"x\.jsonl:3: is a list"),
        ('{"text": "a"}', r"x\.jsonl:3: has the keys \['text'\]"),
        (
            '{"text": "a", "label": "neutral"}',
            r"x\.jsonl:3: label is 'neutral'; accepted are 'positive' and",
        ),
        ('{"text": "a", "label": ["positive"]}', r"x\.jsonl:3: label is \['positive'\]"),
        ('{"text": " ", "label": "positive"}', r"x\.jsonl:3: text is ' '"),
        ('{"text": 1, "label": "positive"}', r"x\.jsonl:3: text is 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": "positive"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataFileError, match=message):
        read_statements(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataFileError, match="cannot be read"):
        read_statements(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9", "label": "positive"}')
    with pytest.raises(DataFileError, match="not UTF-8"):
        read_statements(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match="none is left"):
        read_statements(write_rows(tmp_path / "x.jsonl", {"text": "long", "label": "positive"}), longest=3)


TWEETS = Path(__file__).resolve().parents[3] / "shared" / "data" / "tweet_sentiment_pos_neg.jsonl"


@pytest.mark.skipif(not TWEETS.is_file(), reason="the tweets are not part of the repository")
def test_real_tweets_make_a_task():
    with pytest.warns(GradentWarning, match="of 16363 rows"):
        statements = read_statements(TWEETS)
    assert len(statements) > 15000
    task = make_task(seed=0, train=512, probe=64, answers=100, statements=statements)
    assert sum(one.positive for one in task.probe) == 32

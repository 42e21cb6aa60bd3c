"""The task: its tokenizer, demonstrations, verifier, and the operand pairs held out. And what nobody would type on
purpose: any text."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import seeds
from tiny import generator

from minicfrl import Addition

TASKS = {digits: Addition(digits) for digits in (1, 2, 3)}
DIGITS, ALPHABET = "0123456789", "0123456789+=;dsg"
odd_characters = st.sampled_from([*"٣３²½ \t\n\r\0_+-.,;=eEDSG", "\ud800", "\u0660"])
any_text = st.text(ALPHABET) | st.text() | st.text(st.sampled_from(ALPHABET) | odd_characters)


@st.composite
def sums(draw):
    task = TASKS[draw(st.sampled_from([1, 2, 3]))]
    operand = st.integers(0, 10**task.digits - 1)
    return task, draw(operand), draw(operand)


# ----------------------------------------------------------------------------------------------------- tokens and texts


@given(before=any_text, bad=st.none() | st.characters(exclude_characters=ALPHABET), after=any_text)
@example(before="12+3", bad="٣", after="")  # a digit, but not one of ours
@example(before="", bad="\ud800", after="")  # half a surrogate pair: no UTF-8 at all
def test_a_text_is_encoded_without_loss_or_its_first_foreign_character_is_named(before, bad, after):
    text = before + (bad or "") + after
    foreign = [character for character in text if character not in ALPHABET]
    if foreign:
        with pytest.raises(ValueError, match=re.escape(f"character {foreign[0]!r} is not in the alphabet")):
            TASKS[2].encode(text)
    else:
        tokens = TASKS[2].encode(text)
        assert len(tokens) == len(text) and TASKS[2].decode(tokens) == text


no_tokens = st.integers() | st.floats() | st.text(max_size=2) | st.none() | st.booleans() | st.binary(max_size=2)


@given(tokens=st.lists(st.integers(0, 15)) | st.lists(st.integers(-2, 18) | no_tokens))
@example(tokens=[16])
@example(tokens=[2**64])
@example(tokens=[True])
@example(tokens=[1.0])
def test_tokens_are_decoded_without_loss_or_the_first_that_is_none_is_named(tokens):
    wrong = [token for token in tokens if type(token) is not int or not 0 <= token < 16]
    if wrong:
        with pytest.raises(ValueError, match=re.escape(f"token {wrong[0]!r} stands for no character")):
            TASKS[1].decode(tokens)
    else:
        text = TASKS[1].decode(tokens)
        assert set(text) <= set(ALPHABET) and TASKS[1].encode(text) == tokens


@given(task_a_b=sums())
def test_prompts_are_padded_and_read_back(task_a_b):
    task, a, b = task_a_b
    prompt = task.prompt(a, b)
    assert re.fullmatch(rf"[0-9]{{{task.digits}}}\+[0-9]{{{task.digits}}}=", prompt)
    assert task.operands(prompt) == (a, b)
    assert len(prompt) + len(task.demonstration(a, b, "s")) + 1 == task.block_size


@given(data=st.data(), task=st.sampled_from([*TASKS.values()]))
def test_a_text_is_a_prompt_that_can_be_made_again_or_refused(data, task):
    """Texts of nearly the right form above all. The oracle is another way to say what that form is."""
    character = st.sampled_from(DIGITS) | odd_characters
    number = st.text(character, min_size=task.digits - 1, max_size=task.digits + 1)
    nearly = st.tuples(number, st.sampled_from("+＋-"), number, st.sampled_from(["=", "＝", "=\n", "==", ""]))
    text = data.draw(any_text | nearly.map("".join) | st.builds(task.prompt, *[st.integers(0, 9)] * 2))
    form = text.translate(dict.fromkeys(map(ord, DIGITS), "9"))
    if form == "9" * task.digits + "+" + "9" * task.digits + "=":
        assert task.prompt(*task.operands(text)) == text
    else:
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            task.operands(text)


# --------------------------------------------------------------------------------------------------------- the verifier


def is_right(digits, total, response):
    """The specification as one regular expression, written without looking at the verifier's code. The total's digits
    are made column by column, with no conversion that might forgive anything."""
    wanted = "".join(DIGITS[total // 10**column % 10] for column in reversed(range(digits + 1)))
    return re.fullmatch(f"[dg]{wanted}|s[^;]*;{wanted}", response, re.DOTALL) is not None


@st.composite
def near_answers(draw, right):
    """The right answer behind any pattern, damaged, dressed up as `int` would forgive it, or not at all."""
    dressed = [right, f"+{right}", f" {right}", f"{right}\n", f"0{right}", right[1:], right[::-1], f"{right}.0"]
    dressed += [right[0] + "_" + right[1:], right.translate({48 + i: 0x660 + i for i in range(10)}), f"{right};{right}"]
    answer = draw(st.sampled_from(["d", "s", "g", "s;", "s12;", "d;", "", "D", ";"])) + draw(st.sampled_from(dressed))
    cut = draw(st.integers(0, len(answer)))
    return answer[:cut] + draw(st.just(answer[cut : cut + 1]) | any_text) + answer[cut + 1 :]


@given(data=st.data(), task_a_b=sums())
def test_the_verifier_is_never_fooled(data, task_a_b):
    """It agrees with the specification on any text, and on right answers, dressed up and damaged."""
    task, a, b = task_a_b
    right = str(a + b).zfill(task.digits + 1)
    for response in (data.draw(any_text), *data.draw(st.lists(near_answers(right), min_size=9))):
        assert task.verify(task.prompt(a, b), response) == float(is_right(task.digits, a + b, response))


def test_the_answer_is_what_the_scratch_leads_to_not_the_scratch():
    """Other columns, or another pattern, and the same answer; without exactly one `;` there is none in s."""
    same = ("s1213;132", "s;132", "s999999;132", "d132", "g132")
    assert {TASKS[2].answer(response) for response in same} == {"132"}
    for response in ("", ";132", "132", "s", "s132", "s1;2;132", "s;132;", "D132"):
        assert TASKS[2].answer(response) is None
    assert [TASKS[2].answer(response) for response in ("d", "s12;", "g1;2", "dd132")] == ["", "", "1;2", "d132"]


# ------------------------------------------------------------------------------------------------------- demonstrations


@given(task_a_b=sums(), seed=seeds)
def test_scratch_is_right_always_and_direct_where_nothing_carries(task_a_b, seed):
    task, a, b = task_a_b
    prompt = task.prompt(a, b)
    carries = any(a // 10**i % 10 + b // 10**i % 10 > 9 for i in range(task.digits))
    assert task.verify(prompt, task.demonstration(a, b, "s")) == 1.0
    assert task.verify(prompt, task.demonstration(a, b, "d")) == float(not carries)
    assert re.fullmatch(f"g[0-9]{{{task.digits + 1}}}", task.demonstration(a, b, "g", generator=generator(seed)))


@given(task_a_b=sums(), seed=seeds)
def test_a_noisy_scratch_answers_what_its_columns_say_and_every_column_can_be_wrong(task_a_b, seed):
    """With noise 1 every column's digit is wrong; the answer is the last carry and the digits, last column first."""
    task, a, b = task_a_b
    clean = task.demonstration(a, b, "s")
    noisy = task.demonstration(a, b, "s", noise=1.0, generator=generator(seed))
    scratch, answer = noisy[1:].split(";")
    assert answer == scratch[-2] + scratch[1::2][::-1]
    assert all(x != y for x, y in zip(clean[2 : 2 * task.digits + 2 : 2], scratch[1::2], strict=True))


def test_noise_is_a_probability_per_column():
    """4,000 columns at noise 0.1: 400 wrong on average, standard deviation 19; five of those either way."""
    task, draws = TASKS[2], generator(0)
    clean = task.demonstration(12, 34, "s")
    noisy = [task.demonstration(12, 34, "s", noise=0.1, generator=draws) for _ in range(2000)]
    wrong = sum(text[2] != clean[2] for text in noisy) + sum(text[4] != clean[4] for text in noisy)
    assert abs(wrong - 400) < 95


# ------------------------------------------------------------------------------------------------------- held-out pairs


@pytest.mark.parametrize("digits", TASKS)
def test_held_out_pairs_are_a_tenth_and_never_training_pairs_in_either_order(digits):
    """The two lists share no pair, not even with the operands swapped, and together are all pairs."""
    task = TASKS[digits]
    index = torch.tensor([10**digits, 1])
    held_out, training, swapped = task.heldout_pairs @ index, task.train_pairs @ index, task.train_pairs.flip(1) @ index
    assert not torch.isin(held_out, training).any() and not torch.isin(held_out, swapped).any()
    assert torch.equal(torch.cat((held_out, training)).sort().values, torch.arange(100**digits))
    if digits > 1:  # a hundred pairs are too few for the share to be near a tenth
        assert 0.08 < len(held_out) / 100**digits < 0.12


def test_the_held_out_pairs_are_the_same_in_every_precision():
    """These tests run in float64, training in float32: a policy must not be judged on pairs it was trained on."""
    splits, usual = [], torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            splits.append(Addition(2).heldout_pairs)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(*splits)


def test_held_out_pairs_come_in_no_order():
    """The first of them are what evaluations use: their operands' means are near those of all."""
    first = TASKS[2].heldout_pairs[:64].double()
    assert (first.mean(dim=0) - 49.5).abs().max() < 5 * 28.9 / 8  # five standard errors of a mean of 64


@pytest.mark.parametrize(
    "call, message",
    [
        *[(lambda n=n: Addition(n), f"digits must be .*{n}") for n in (0, 4, -1, "2")],
        (lambda: TASKS[2].prompt(100, 1), "operand 100 is not a whole number of 1 to 2 digits"),
        (lambda: TASKS[2].prompt("47", 1), "operand '47' is not"),
        (lambda: TASKS[2].demonstration(3, -1, "d"), "operand -1"),
        (lambda: TASKS[2].demonstration(1, 2, "s", noise=2), "noise must lie between 0 and 1, not 2"),
        (lambda: TASKS[2].demonstration(1, 2, "X"), "pattern 'X' is not one of dsg"),
        (lambda: TASKS[2].verify("1+2=", "d046"), "'1\\+2=' is not a prompt"),
    ],
)
def test_bad_arguments_are_refused_by_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

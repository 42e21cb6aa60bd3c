"""The task: its tokenizer, demonstrations, verifier, and the operand pairs held out."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import generator, seeds

from minicfrl import Addition

TASKS = {digits: Addition(digits) for digits in (1, 2, 3)}
ALPHABET = "0123456789+=;dsg"
digit_counts = st.sampled_from([1, 2, 3])


@st.composite
def sums(draw):
    digits = draw(digit_counts)
    operand = st.integers(0, 10**digits - 1)
    return TASKS[digits], draw(operand), draw(operand)


@given(text=st.text(ALPHABET))
def test_encode_and_decode_are_inverse_on_every_text_of_the_alphabet(text):
    tokens = TASKS[2].encode(text)
    assert len(tokens) == len(text) and all(0 <= token < 16 for token in tokens)
    assert TASKS[2].decode(tokens) == text


@given(before=st.text(ALPHABET), bad=st.characters(exclude_characters=ALPHABET), after=st.text())
@example(before="12+3", bad="٣", after="")  # a digit, but not one of ours
@example(before="", bad="\n", after="")
@example(before="", bad="\ud800", after="")  # half a surrogate pair: no UTF-8 at all
def test_a_foreign_character_is_refused_by_name(before, bad, after):
    with pytest.raises(ValueError, match=re.escape(f"character {bad!r} is not in the alphabet")):
        TASKS[2].encode(before + bad + after)


@pytest.mark.parametrize("token", [-1, 16, 17])
def test_a_token_that_is_no_character_is_refused_by_number(token):
    with pytest.raises(ValueError, match=f"token {token} stands for no character"):
        TASKS[2].decode([0, token])


def right_answer(digits, a, b, response):
    """The verifier's specification as one regular expression, written without looking at its code."""
    total = str(a + b).zfill(digits + 1)
    return re.fullmatch(f"[dg]{total}|s[^;]*;{total}", response, re.DOTALL) is not None


@given(data=st.data(), task_a_b=sums())
def test_the_verifier_agrees_with_the_specification(data, task_a_b):
    """Arbitrary texts of the alphabet, and near misses: a right response with one character replaced or dropped."""
    task, a, b = task_a_b
    pattern = data.draw(st.sampled_from("dsg"))
    right = f"{a + b:0{task.digits + 1}d}"
    response = pattern + (data.draw(st.text("0123456789")) + ";" if pattern == "s" else "") + right
    cut = data.draw(st.integers(0, len(response) - 1))
    near = response[:cut] + data.draw(st.text(ALPHABET, max_size=1)) + response[cut + 1 :]
    for text in (response, near, data.draw(st.text(ALPHABET)), data.draw(st.text())):
        assert task.verify(task.prompt(a, b), text) == float(right_answer(task.digits, a, b, text))
    assert task.verify(task.prompt(a, b), response) == 1.0


def test_the_answer_is_what_the_scratch_leads_to_not_the_scratch():
    """Other columns, or another pattern, and the same answer; without exactly one `;` there is none in s."""
    same = ("s1213;132", "s;132", "s999999;132", "d132", "g132")
    assert {TASKS[2].answer(response) for response in same} == {"132"}
    for response in ("", ";132", "132", "s", "s132", "s1;2;132", "s;132;", "D132"):
        assert TASKS[2].answer(response) is None
    assert [TASKS[2].answer(response) for response in ("d", "s12;", "g1;2", "dd132")] == ["", "", "1;2", "d132"]


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


@given(task_a_b=sums())
def test_prompts_are_padded_and_read_back(task_a_b):
    task, a, b = task_a_b
    prompt = task.prompt(a, b)
    assert re.fullmatch(rf"\d{{{task.digits}}}\+\d{{{task.digits}}}=", prompt)
    assert task.operands(prompt) == (a, b)
    assert len(prompt) + len(task.demonstration(a, b, "s")) + 1 == task.block_size


@pytest.mark.parametrize("prompt", ["", "1+2=", "12+34", "12+34==", "12-34=", "012+34=", "12+34=\n", "١٢+34="])
def test_a_text_that_is_no_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        TASKS[2].verify(prompt, "d046")


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
    splits = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        splits.append(Addition(2).heldout_pairs)
    assert torch.equal(*splits)


def test_held_out_pairs_come_in_no_order():
    """The first of them are what evaluations use: their operands range as widely as all of them."""
    first = TASKS[2].heldout_pairs[:64].double()
    assert (first.mean(dim=0) - 49.5).abs().max() < 5 * 28.9 / 8  # five standard errors of a mean of 64


def test_bad_arguments_are_refused_by_value():
    task = TASKS[2]
    for digits in (0, 4, -1, "2"):
        with pytest.raises(ValueError, match=f"digits must be .*{digits}"):
            Addition(digits)
    with pytest.raises(ValueError, match="operand 100 is not a whole number of 1 to 2 digits"):
        task.prompt(100, 1)
    with pytest.raises(ValueError, match="operand -1"):
        task.demonstration(3, -1, "d")
    with pytest.raises(ValueError, match="operand '47' is not"):
        task.prompt("47", 1)
    with pytest.raises(ValueError, match="noise must lie between 0 and 1, not 2"):
        task.demonstration(1, 2, "s", noise=2)
    with pytest.raises(ValueError, match="token 1.0 stands for no character"):
        task.decode([1.0])
    with pytest.raises(ValueError, match="pattern 'X' is not one of dsg"):
        task.demonstration(1, 2, "X")

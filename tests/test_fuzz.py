"""What nobody would type on purpose: any text."""

from hypothesis import example, given
from hypothesis import strategies as st

from minicfrl import Addition

ALPHABET = "0123456789+=;dsg"
TASKS = {digits: Addition(digits) for digits in (1, 2, 3)}
odd_characters = st.sampled_from([*"٣３²½ \t\n\r\0_+-.,;=eEDSG", "\ud800", "\u0660"])
any_text = st.text(ALPHABET) | st.text() | st.text(st.sampled_from(ALPHABET) | odd_characters)


def is_right(digits, total, response):
    """Column by column, with no conversion that might forgive anything."""
    if not response or response[0] not in "dsg":
        return False
    given = list(response[1:])
    if response[0] == "s":
        if given.count(";") != 1:
            return False
        given = given[given.index(";") + 1 :]
    wanted = ["0123456789"[total // 10**column % 10] for column in reversed(range(digits + 1))]
    return given == wanted


@st.composite
def near_answers(draw, right):
    """The right answer behind any pattern, damaged, dressed up as `int` would forgive it, or not at all."""
    answer = draw(
        st.sampled_from(
            [right, f"+{right}", f" {right}", f"{right}\n", f"0{right}", right[1:], right[::-1], f"{right}.0"]
            + [right[0] + "_" + right[1:], right.translate({48 + i: 0x660 + i for i in range(10)}), f"{right};{right}"]
        )
    )
    return draw(st.sampled_from(["d", "s", "g", "s;", "s12;", "d;", "", "D", ";"])) + answer


@given(data=st.data(), digits=st.sampled_from([1, 2, 3]))
def test_the_verifier_is_never_fooled(data, digits):
    operand = st.integers(0, 10**digits - 1)
    a, b = data.draw(operand), data.draw(operand)
    right = str(a + b).zfill(digits + 1)
    prompt = TASKS[digits].prompt(a, b)
    for response in (data.draw(any_text), data.draw(any_text), *data.draw(st.lists(near_answers(right), min_size=9))):
        assert TASKS[digits].verify(prompt, response) == (1.0 if is_right(digits, a + b, response) else 0.0)


@given(text=any_text)
def test_a_text_is_encoded_without_loss_or_refused(text):
    try:
        tokens = TASKS[1].encode(text)
    except ValueError:
        assert set(text) - set(ALPHABET)
    else:
        assert len(tokens) == len(text) and TASKS[1].decode(tokens) == text


no_tokens = st.integers() | st.floats() | st.text(max_size=2) | st.none() | st.booleans() | st.binary(max_size=2)


@given(tokens=st.lists(st.integers(0, 15) | st.integers(-2, 18)) | st.lists(st.integers(0, 15) | no_tokens))
@example(tokens=[16])
@example(tokens=[2**64])
@example(tokens=[True])
def test_tokens_are_decoded_without_loss_or_refused(tokens):
    try:
        text = TASKS[1].decode(tokens)
    except ValueError:
        assert not all(type(token) is int and 0 <= token < 16 for token in tokens)
    else:
        assert TASKS[1].encode(text) == tokens and all(type(token) is int for token in tokens)


@given(data=st.data(), digits=st.sampled_from([1, 2, 3]))
def test_a_text_is_a_prompt_that_can_be_made_again_or_refused(data, digits):
    """Texts of nearly the right form above all."""
    task, character = TASKS[digits], st.sampled_from("0123456789") | odd_characters
    nearly = st.tuples(*[character] * digits, st.sampled_from("+＋"), *[character] * digits, st.sampled_from("=＝"))
    text = data.draw(any_text | nearly.map("".join))
    try:
        a, b = task.operands(text)
    except ValueError:
        form = text.translate(dict.fromkeys(map(ord, "0123456789"), "9"))
        assert form != "9" * digits + "+" + "9" * digits + "="
    else:
        assert task.prompt(a, b) == text

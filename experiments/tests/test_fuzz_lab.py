"""What nobody would type or write on purpose: any flags, files with random damage."""

import contextlib
import io
import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_runs import TINY

from experiments import runs, toy
from experiments.arms import ARMS, EXPERIMENTS, Config
from model import GPT

# ----------------------------------------------------------------------------------------------------- the command line


def outcome(arguments):
    """(exit code, stdout, stderr) of a command line, on streams that are as strict about text as real ones."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = toy.main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    return code, *(stream.buffer.getvalue().decode() for stream in streams)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """A working folder with a finished run, a folder of other things and a file; a job is done at once."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(finished, folder / "finished")
    (folder / "other").mkdir()
    for file in ("file", "other/thesis.txt"):
        (folder / file).write_text("mine", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(toy, "show_answers", lambda *_: None)
        yield folder


numbers = st.integers().map(str) | st.integers(-1, 9).map(str) | st.floats().map(str) | st.floats(0, 1).map(str)
absurd = ["", " ", "nan", "-inf", "1e400", "9" * 400, "9" * 5000, "٣", "1_0", "0x10", ",", "\0", "\udcff", "%s"]
names = st.lists(st.sampled_from([*ARMS, "sft"]), min_size=1, max_size=3).map(",".join)
shares = st.lists(numbers, min_size=2, max_size=4).map(",".join)
words = st.sampled_from(["std", "mean", "rloo", "none", *EXPERIMENTS, "4+8=", "47+85=", "--", "-h", "--lr", *absurd])
values = numbers | words | names | shares | st.text()
flags_of_config = [f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__]
likely = {"--arms": names, "--baseline": words, "--tilt": shares, "--ask": words | st.text()}
options = [
    st.sampled_from([*likely, *flags_of_config, "--workers"]).flatmap(
        lambda flag: st.tuples(st.just(flag), likely.get(flag, numbers) | values)
    ),
    st.sampled_from([("--quick",), ("--plot",), ("--help",), ("--lr",)]),
    st.tuples(values),
]


@given(
    flags=st.lists(st.one_of(*options), max_size=3).map(lambda flags: [text for flag in flags for text in flag]),
    tiny=st.booleans(),
    name=st.sampled_from(["plain", "plain", *EXPERIMENTS]) | words,
    out=st.sampled_from([None, "new", "new", "deep/new", "finished", "other", "file", "file/new", "n" * 300, "\0"]),
)
@example(flags=["--sgd-lr", "nan"], tiny=False, name="plain", out="new")
@example(flags=["--ask", "4+8="], tiny=False, name="speed", out="finished")
@example(flags=[], tiny=True, name="alchemy", out="new")
def test_any_command_line_runs_or_is_refused_before_anything_is_written(flags, tiny, name, out, place):
    """Without the training. A refusal is one line and leaves all as it was; what is accepted is recorded faithfully."""
    accepted, before = [], files(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "run", lambda config, *_: accepted.append(config) or [])
        code, printed, errors = outcome([name, *(TINY if tiny else []), *(["--out", out] if out else []), *flags])
    assert code in (0, 2) and (errors == "") == (code == 0)
    if code == 2:
        assert printed == "" and errors.startswith("python -m experiments run: error: ") and files(place) == before
        assert not (place / "new").exists() and not (place / "deep").exists()
    elif accepted and out:
        assert runs.read_config(place / out)[1] == accepted[0]
    for folder in ("new", "deep"):
        shutil.rmtree(place / folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- damage


@st.composite
def damages(draw):
    """A function from bytes to damaged bytes: some are overwritten, cut out or put in, or the end is missing."""
    pieces = st.binary(max_size=3) | st.sampled_from([b"nan", b"-", b"e9", b"9", b",", b"\n", b"\r", b'"', b"\0"])
    changes = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), pieces), min_size=1, max_size=3))
    end = draw(st.just(1.0) | st.floats(0, 1))

    def damage(content):
        for where, cut, piece in changes:
            start = int(where * len(content))
            content = content[:start] + piece + content[start + cut :]
        return content[: int(end * len(content))]

    return damage


def one_sentence(errors, file):
    return errors.count("\n") == 1 and str(file.parent.name) in errors and "Traceback" not in errors


@contextlib.contextmanager
def replaced(file, content):
    """Within, the file holds something else, and afterwards everything in its folder is as before."""
    before = files(file.parent)
    file.write_bytes(content)
    try:
        yield
    finally:
        for path, old in before.items():
            path.write_bytes(old)


def deep(depth):
    return b'{"config": ' + b"[" * depth + b"]" * depth + b"}"


@given(damage=damages())
@example(damage=lambda content: deep(100_000))
@example(damage=lambda content: content.replace(b'"seed": 0', b'"seed": ' + b"9" * 5000))
@example(damage=lambda content: b"\xff" + content)
def test_a_damaged_config_is_the_same_or_refused_in_one_sentence(damage, place):
    """By who reads it and by the command that would continue the run, which then changes nothing."""
    out = place / "finished"
    with replaced(out / "config.json", damage((out / "config.json").read_bytes())):
        before = files(out)
        with contextlib.suppress(ValueError):
            assert isinstance(runs.read_config(out)[1], Config)
        code, _, errors = outcome(["plain", *TINY, "--out", "finished"])
        assert (code, errors) == (0, "") or (code == 2 and one_sentence(errors, out / "x") and files(out) == before)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("arms"), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(data=st.data(), value=json_values)
def test_a_record_with_another_value_anywhere_is_refused_in_one_sentence(data, value, place):
    """Of any JSON type, in place of a part or of a field, or a field more."""
    out = place / "finished"
    record = json.loads((out / "config.json").read_bytes())
    part = data.draw(st.sampled_from([*record]))
    inside = data.draw(st.none() | st.sampled_from([*record[part], "new"]))
    holder, name = (record, part) if inside is None else (record[part], inside)
    same = name in holder and holder[name] == value
    holder[name] = value
    with replaced(out / "config.json", json.dumps(record).encode()):
        before = files(out)
        with contextlib.suppress(ValueError):
            assert isinstance(runs.read_config(out)[1], Config)
        code, _, errors = outcome(["plain", *TINY, "--out", "finished"])
        assert same or (code == 2 and one_sentence(errors, out / "x") and files(out) == before)


@given(damage=damages())
@example(damage=lambda content: content[:-30])
def test_a_damaged_policy_is_one_of_the_same_shape_or_refused(damage, place):
    out = place / "finished"
    config, file = runs.read_config(out)[1], runs.policy_file(out, "rl", 0)
    with replaced(file, damage(file.read_bytes())), contextlib.suppress(runs.Damaged):
        assert isinstance(runs.load_policy(config, out, "rl", 0)[1], GPT)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_weight_is_noticed(where, bit, place):
    out = place / "finished"
    config, file = runs.read_config(out)[1], runs.policy_file(out, "rl", 0)
    content, weight = bytearray(file.read_bytes()), runs.load_policy(config, out, "rl", 0)[1].classifier.weight
    weight = weight.detach().numpy().tobytes()
    content[content.index(weight) + int(where * len(weight))] ^= 1 << bit
    with replaced(file, content), pytest.raises(runs.Damaged, match="rl-seed0.pt is no policy of this run"):
        runs.load_policy(config, out, "rl", 0)


@given(damage=damages(), arm=st.sampled_from(["sft", "rl", "cf-rl"]))
@example(damage=lambda content: b"", arm="sft")
@example(damage=lambda content: content[: content.index(b"\n") + 1], arm="sft")
@example(damage=lambda content: content[: content[:-1].rindex(b"\n") + 1], arm="rl")  # the last row is missing
@example(damage=lambda content: content + content[content.index(b"\n") + 1 :], arm="rl")
@example(damage=lambda content: content.replace(b"cf-rl", b"cf-\xff"), arm="cf-rl")
@example(damage=lambda content: content.replace(b"step", b"stop"), arm="rl")
def test_damaged_rows_are_read_or_refused_in_one_sentence(damage, arm, place):
    """By who reads them and by the command that would print the run: a flipped digit is still a number."""
    out, part = place / "finished", runs.rows_file(place / "finished", arm, 0)
    config = runs.read_config(out)[1]
    with replaced(out / "metrics.csv", b""), replaced(part, damage(part.read_bytes())):
        with contextlib.suppress(runs.Damaged):
            steps = [row["step"] for row in runs.read_rows(config, out, arm, 0)]
            assert steps == ([0] if arm == "sft" else [2, 4])
        code, _, errors = outcome(["plain", *TINY, "--out", "finished"])
        assert (code, errors) == (0, "") or (code == 1 and one_sentence(errors, out / "x"))


@given(data=st.data(), value=st.sampled_from(["nan", "inf", "-inf", "-5", "1e308", "", "x", "1_0", "0"]))
def test_a_row_with_another_value_anywhere_is_read_or_refused_in_one_sentence(data, value, place):
    out, part = place / "finished", runs.rows_file(place / "finished", "cf-rl", 0)
    lines = [line.split(",") for line in part.read_text(encoding="utf-8").splitlines()]
    row, column = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(lines[0]))
    lines[row][lines[0].index(column)] = value
    with replaced(out / "metrics.csv", b""), replaced(part, "".join(",".join(line) + "\n" for line in lines).encode()):
        code, _, errors = outcome(["plain", *TINY, "--out", "finished"])
        assert (code, errors) == (0, "") or (code == 1 and one_sentence(errors, out / "x"))

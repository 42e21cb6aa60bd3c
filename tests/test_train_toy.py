"""The program: it stands alone, says what it did, and leaves nothing behind."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from tiny import tiny_gpt

import train_toy
from minicfrl import Addition, RLConfig, SFTConfig, Stage, rollout, train_rl
from model import confidence
from train_toy import ARMS, held_out, look, main, make_start, stream, train_arm

ROOT = Path(__file__).parent.parent
BOOK = ("model.py", "minicfrl.py", "fast_ntk.py", "ntk.py", "train_toy.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Seconds become tenths, and no arm gets to the accuracy, so that what is printed is as wide as it can be.
TINY = dict(QUICK=(2, 1.1, 20), EVALUATED=2, AT_THE_END=3, PROBES=4, EVERY=2, PROMPTS=4)
ROW = r"(\w[\w-]*) +\d\.\d\d +\d\.\d\d \d\.\d\d/\d\.\d\d/\d\.\d\d( +(\d+|never) +[+-]\d\.\d{3} +[+-]\d\.\d{3})?"


# ------------------------------------------------------------------------------------------------------ it stands alone

# Runs --quick, made smaller, in the current folder; nothing of experiments/ may be imported, which can be installed.
DRIVER = """
import json, os, sys
sys.path.insert(0, os.getcwd())
sys.stdout.reconfigure(encoding="ascii")
import train_toy
vars(train_toy).update(json.loads(sys.argv[1]))
assert train_toy.main(["--quick"]) == 0
assert not [name for name in sys.modules if name.split(".")[0] == "experiments"]
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run in an empty folder that holds the five files alone, on a terminal that knows ASCII alone. Its sizes are
    smaller than those of --quick, which changes its numbers and not what it prints around them."""
    folder = tmp_path_factory.mktemp("book")
    for name in BOOK:
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-B", "-I", "-c", DRIVER, json.dumps(TINY)]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return folder, done.stdout.decode("ascii")


def test_the_five_files_run_in_an_empty_folder_and_leave_nothing_there(quick):
    assert sorted(path.name for path in quick[0].iterdir()) == sorted(BOOK)


def test_what_a_run_prints_is_a_screen_of_80_ascii_columns(quick):
    lines = quick[1].splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 80 and quick[1].isascii()
    assert rows(quick[1]) == ["start", *ARMS]
    sentence = " ".join(lines[-2:])
    assert re.match(r"Updates to accuracy .* one seed decides nothing", sentence) and sentence.count(". ") == 0


def test_the_readme_s_capture_has_the_layout_of_what_is_printed(quick):
    """Numbers aside, but for the accuracy that is asked for; and its table is about the same policies."""
    captured = next(block for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "policy   accuracy" in block)
    heading = next(line for line in quick[1].splitlines() if line.startswith("policy"))
    assert rows(captured) == rows(quick[1]) and heading in captured.splitlines()
    assert f"Updates to accuracy {train_toy.THRESHOLD} on" in captured


# ----------------------------------------------------------------------------------------------------- what it measures


@pytest.fixture
def tiny(monkeypatch):
    """Two updates of fine-tuning, 4, 1 + 3 and 1 + 3 of the arms, few prompts."""
    for name, value in TINY.items():
        monkeypatch.setattr(train_toy, name, value)


FLAGS = ["--quick", "--digits", "1"]


def rows(printed):
    """The policies of the table that was printed."""
    return [found[1] for line in printed.splitlines() if (found := re.fullmatch(ROW, line))]


def test_the_control_differs_from_cf_rl_in_the_freezing_alone():
    """Word for word what the arms are; and the control's first stage has CF-RL's length and its rate of W."""
    assert ARMS == {
        "rl": (Stage(80, "all", 4e-4),),
        "cf-rl": (Stage(20, "classifier", 8e-3), Stage(60, "all", 4e-4)),
        "control": (Stage(20, "all", 4e-4, classifier_lr=8e-3), Stage(60, "all", 4e-4)),
    }
    assert (train_toy.PROMPTS, train_toy.SAMPLES) == (RLConfig.prompts, RLConfig.samples) == (32, 8)
    (alone, rest), (free, same) = ARMS["cf-rl"], ARMS["control"]
    assert rest == same and alone.steps == free.steps and alone.lr == free.classifier_lr
    assert sum(stage.steps for stage in ARMS["rl"]) == alone.steps + rest.steps


def test_every_arm_makes_its_updates_and_a_new_arm_is_one_line(tiny, monkeypatch, capsys):
    """The last block first, as the comment beside ARMS says. Of QUICK's arms a twentieth is left: 4 updates, or 1 and
    3, and none is lost or added."""
    monkeypatch.setitem(ARMS, "block", (Stage(20, "body.blocks.1", 4e-4), Stage(60, "all", 4e-4)))
    made = []

    def counted(model, task, config, draws):
        made.append([])
        for record in train_rl(model, task, config, draws):
            made[-1].append(record["stage"])
            yield record

    monkeypatch.setattr(train_toy, "train_rl", counted)
    assert main(FLAGS) == 0
    assert rows(capsys.readouterr().out) == ["start", *ARMS] and made == [[1] * 4, *[[1, 2, 2, 2]] * 3]


def test_what_is_finished_is_told_whatever_goes_wrong(tiny, monkeypatch, capsys):
    """An arm that trains a part that is not there: the arms before it are not lost."""
    monkeypatch.setitem(ARMS, "typo", (Stage(20, "body.block.1", 4e-4),))
    with pytest.raises(ValueError, match="trains='body.block.1' names no parameter"):
        main(FLAGS)
    printed = capsys.readouterr().out
    assert rows(printed) == ["start", *ARMS][:-1]


def test_a_seed_prints_the_same_whatever_ran_before_it_and_another_seed_does_not(tiny, capsys):
    printed = []
    for seed in ("0", "-1", "0"):
        torch.rand(3)  # the global random state plays no part
        assert main([*FLAGS, "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[2] != printed[1]


@given(a=st.tuples(st.integers(), st.text(" 0-9ab")), b=st.tuples(st.integers(), st.sampled_from("ab")))
def test_every_purpose_and_seed_has_random_numbers_of_its_own(a, b):
    """Up to a collision of 32 bits, which none of the drawn pairs is. A purpose ends in no digit, so that its text and
    the seed's, side by side, can be read back."""
    first, second = (stream(seed, f"{purpose}x").initial_seed() for seed, purpose in (a, b))
    assert (first == second) == (a == b)


class Lengths(Addition):
    """Sums whose verifier likes even lengths, so that a policy that knows nothing has something to learn."""

    def verify(self, prompt, response):
        return float(len(response) % 2 == 0)


@pytest.mark.parametrize("trains", ["classifier", "body"])
def test_an_arm_is_train_rl_on_a_copy_of_the_start_and_its_row_is_what_it_measured(tiny, trains):
    """Trained once more by hand. In a stage of W alone the whole rise of the top-1 probability at the probe's states is
    through W, and in one of the body alone it is through the body: exactly, however many updates there are."""
    task = Lengths(1)
    start = tiny_gpt(0, task.vocab_size, task.block_size)
    before, twin = copy.deepcopy(start.state_dict()), copy.deepcopy(start)
    stages = (Stage(4, trains, 1e-1),)
    run = train_arm(start, task, 1, "W", stages, 0.0, [task.prompt(1, 2)])
    assert all(torch.equal(p, before[name]) for name, p in start.state_dict().items())
    probe = held_out(start, task, 1, 4, samples=1, purpose="probe")
    list(train_rl(twin, task, RLConfig(stages, 4, 8), stream(1, "rl")))
    rise = [confidence(phi @ W.T).mean().item() for phi, W in (look(start, probe), look(twin, probe))]
    accuracy, top_1, shares, took, *through = run["row"].split()
    learnt, rested = through if trains == "classifier" else through[::-1]
    assert abs(rise[1] - rise[0]) > 0.01 and float(learnt) == pytest.approx(rise[1] - rise[0], abs=1e-3)
    assert rested in ("+0.000", "-0.000")
    pairs = task.heldout_pairs[:3].tolist()
    batch = rollout(twin, task, [task.prompt(*pair) for pair in pairs], 8, stream(1, "evaluation"))
    assert float(accuracy) == pytest.approx(batch.rewards.mean().item(), abs=0.006)
    assert float(top_1) == pytest.approx(batch.state_logits.softmax(1).amax(1).mean().item(), abs=0.006)
    first = twin(torch.tensor([task.encode(task.prompt(*pair)) for pair in pairs]))[:, -1].softmax(1).mean(0)
    assert [float(share) for share in shares.split("/")] == pytest.approx(first[task.encode("dsg")].tolist(), abs=0.006)
    assert list(run["curve"]) == [2, 4] and took == "2" and run["took"] == 2  # every accuracy is at least 0


@pytest.mark.parametrize("threshold, took", [(0.0, 2), (0.1, "never")])
def test_a_threshold_is_reached_at_the_first_evaluation_that_is_at_it(tiny, threshold, took, monkeypatch):
    task = Addition(1)
    monkeypatch.setattr(task, "verify", lambda prompt, response: 0.0)
    model = tiny_gpt(0, task.vocab_size, task.block_size)
    assert train_arm(model, task, 0, "none", (Stage(4),), threshold, [])["took"] == took


def test_the_start_is_trained_and_has_the_sizes_asked_for():
    task, sft = Addition(1), SFTConfig((Stage(3, lr=1e-2),), rows=4)
    model, same = (make_start(task, 0, sft, n_layer=1, n_embd=8) for _ in range(2))
    assert len(model.body.blocks) == 1 and model.classifier.in_features == 8
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    assert all((p != 0).any() for p in model.parameters())  # a start that is not trained has biases of 0


# --------------------------------------------------------------------------------------------------------------- asking


@pytest.mark.parametrize("flags", [[], ["--ask", "4+7="]])
def test_every_policy_answers_the_sum_that_is_asked_or_two_held_out_ones(flags, tiny, capsys):
    task = Addition(1)
    asked = flags[1:] or [task.prompt(*pair) for pair in task.heldout_pairs[-2:].tolist()]
    assert main([*FLAGS, *flags]) == 0
    answers = capsys.readouterr().out.partition("samples are right:\n")[2].splitlines()[: 1 + len(ARMS)]
    assert [line.split()[0] for line in answers] == ["start", *ARMS]
    for line in answers:
        assert re.findall(r"\d\+\d=", line) == asked
        assert len(re.findall(r"(?:right|wrong), [0-8](?: |$)", line)) == len(asked)


@given(seed=seeds, pair=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_an_answer_is_the_likeliest_token_at_every_state_and_the_samples_that_are_right(seed, pair):
    """Rebuilt token by token from full forward passes. Responses of even length are right here, so that some are."""
    task = Lengths(1)
    model, question = tiny_gpt(seed, task.vocab_size, task.block_size), task.prompt(*pair)
    tokens = task.encode(question)
    while len(tokens) < task.block_size and tokens[-1] != task.end_token:
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    ended = tokens[-1] == task.end_token
    text = task.decode(tokens[len(question) : len(tokens) - ended])
    samples = rollout(model, task, [question], 8, stream(seed, "answers")).rewards
    verdict = "right" if ended and len(text) % 2 == 0 else "wrong"
    assert train_toy.answer(model, task, seed, question) == f"{question}{text:13} {verdict}, {int(samples.sum())}"


def test_a_picture_is_written_and_nothing_else(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main([*FLAGS, "--plot", "curves.png"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, fault",
    [
        (["--ask", "4+7"], "'4+7' is not a prompt such as '1+2='"),
        (["--ask", "47+85="], "'47+85=' is not a prompt such as '1+2='"),
        (["--ask", ""], "'' is not a prompt"),
        (["--ask"], "expected 1 argument"),
        (["--digits", "4"], "invalid choice: 4"),
        (["--seed", "one"], "invalid int value: 'one'"),
        (["--plot", "curves.pdf"], "curves.pdf is no .png in a folder"),
        (["--plot", "nowhere/at/all.png"], "all.png is no .png in a folder"),
        (["--arms", "rl"], "unrecognized arguments"),
        (["two\nlines"], "unrecognized arguments: two lines"),
        (["--plot", "curves.png"], "matplotlib"),  # which is missing
    ],
)
def test_a_bad_argument_ends_in_one_sentence_before_any_work(flags, fault, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_toy, "make_start", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        main(["--digits", "1", *flags])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1 and fault in printed.err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("finished", range(4))
def test_ctrl_c_tells_what_is_finished(finished, tiny, capsys, monkeypatch):
    """Interrupted in the start, and in each arm."""
    names, calls = ["start", *ARMS][:finished], []

    def interrupted(work):
        def once(*arguments, **others):
            calls.append(work)
            if len(calls) > finished:
                raise KeyboardInterrupt
            return work(*arguments, **others)

        return once

    for name in ("make_start", "train_arm"):
        monkeypatch.setattr(train_toy, name, interrupted(getattr(train_toy, name)))
    try:
        code = main(FLAGS)
    except KeyboardInterrupt:
        pytest.fail("it came through")  # else it would end the whole suite
    assert code == 130
    printed = capsys.readouterr().out
    assert rows(printed) == names
    assert "Interrupted" in printed and "on this seed" not in printed


def test_the_caller_s_process_is_left_as_it_was(tiny, monkeypatch):
    """Threads, signal handlers, the global random state, environment and folder: a notebook calls main too."""

    def process():
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        return torch.get_num_threads(), handlers, torch.get_rng_state().tolist(), dict(os.environ), os.getcwd()

    torch.optim.Adam([torch.zeros(1)])  # at its first use torch sets environment variables of its own
    torch.set_num_threads(2)
    try:
        before = process()
        assert main(FLAGS) == 0 and process() == before
        monkeypatch.setattr(train_toy, "train_arm", None)  # whatever goes wrong
        with pytest.raises(TypeError):
            main(FLAGS)
        assert process() == before
    finally:
        torch.set_num_threads(1)

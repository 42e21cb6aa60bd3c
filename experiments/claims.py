"""What is claimed, by the two papers and by our pages, and what came of it: rows of data, judged from the runs.

A question is (experiment, arm, base, Measure): is the arm's score above the base's, or above 0 if the base is ""? A new
claim of a paper is one more row of PAPERS; a verdict that a page states in words is one more row of PINS, which the
report refuses to contradict.
"""

import statistics
from itertools import product

from experiments.arms import ALIKE, MAPPED, at
from experiments.real_model import ALL_FAST, FAST, W_ALONE
from experiments.scores import AREA, COSTS, END, MARGIN, RUN, Measure, at_equal, time_to

# ----------------------------------------------------------------------- scores that are asked about: (runs, arm, seed)


def row(score):
    """Of a row of scores."""
    return lambda runs, arm, seed: score(runs.rows[arm, seed])


def more_than_half(part, whole):
    return row(lambda r: r[part] - r[whole] / 2)


def stage_2_lead(runs, arm, seed):
    """What stage 2 gains, minus what as many updates of plain RL gain from where it is as accurate as stage 2 began;
    None if plain RL does not get there with updates to spare."""
    mine, theirs, end = runs.curve(arm, seed), runs.curve("rl", seed), runs.x.looks.index(runs.x.n)
    same = next((i for i, accuracy in enumerate(theirs) if accuracy >= mine[end]), len(mine))
    rest = len(mine) - 1 - max(end, same)
    return (mine[end + rest] - mine[end]) - (theirs[same + rest] - theirs[same]) if rest > 0 else None


def lowest(runs, arm, seed):
    """The least that the share of s ever was."""
    return min(runs.curve(arm, seed, "share_s"))


def dip(runs, arm, seed):
    """By how much more than a twentieth of the start the share of s fell."""
    return 0.95 - lowest(runs, arm, seed) / runs.rows["sft", seed]["share_s"]


def gain(half):
    """The change of accuracy in a half of the run. (At its best a curve is above its ends by noise.)"""

    def gained(runs, arm, seed):
        curve, middle = runs.curve(arm, seed), runs.x.looks.index(runs.x.rl_steps // 2)
        return (curve[middle] - curve[0], curve[-1] - curve[middle])[half]

    return gained


free, GROWTH = at_equal(COSTS["stage 1 for free"]), row(lambda r: r["kernel_G_by_W@n"] - 1)


# ------------------------------------------------------------------------------------------------------------- papers


def yes(of, more="yes", less="no, the reverse", equal=f"no difference (within {MARGIN:g})", margin=MARGIN):
    """A Measure whose words answer a claim."""
    return Measure("", of, words=(more, less, equal), within=margin)


def same_marks(*said):
    """What is said of four marks, in one sentence."""
    if set(said) == {"yes"}:
        return "cannot tell: the same marks"
    return "undecided" if "undecided" in said else "its marks differ"


VARIED, ALIKE_AT_ONE, ALIKE_KEPT = (ALIKE[i].name for i in (0, 2, 5))
THROUGH_W = yes(more_than_half("confidence_by_W", "confidence_change"), less="no", margin=0)
HALVES = [yes(gain(half), "helps", "harms") for half in (0, 1)]
# paper: claim; what the pages say; a text for the verdicts; questions
PAPERS = (
    ("1: RL makes a policy more confident (top-1 probability)", "yes", "{}",
     ("confidence", "rl", "sft", yes("confidence"))),
    ("1: and less diverse (than imitation, at equal accuracy)", "yes", "{}",
     ("lp-ft", "ft", "rl", yes("different_answers", margin=0))),
    ("1: confidence rises through R, by moving W (in this parametrisation)", "SGD yes, Adam undecided",
     "SGD {}, Adam {}", ("scale", "rl-sgd", "", THROUGH_W), ("scale", "rl", "", THROUGH_W)),
    ("1: because features vary little", "one rate yes, matched rates no", "one rate {}, matched rates {}",
     ("variability-sgd", ALIKE_AT_ONE, VARIED, yes("confidence_change", margin=0)),
     ("variability-sgd", ALIKE_KEPT, VARIED, yes("confidence_change", equal="no"))),
    ("1: W shapes G, so that stage 2 learns faster", "G grows; faster: undecided", "{}; faster: {}",
     ("classifier", "cf-rl", "", yes(GROWTH, "G grows", "G shrinks", margin=0)),
     ("classifier", "cf-rl", "", yes(stage_2_lead, equal="no"))),
    ("1: part of the gain is concentration: best-of-N catches up", "yes", "{}",
     ("learning", "rl", "sft", yes(row(lambda r: r["best_of_1"] - r["best_of_64"])))),
    ("1: CF-RL works otherwise than linear probing, then fine-tuning", "cannot tell: the same marks", same_marks,
     *(("lp-ft", *arms, yes(of, margin=0)) for arms in (("cf-rl", "rl"), ("lp-ft", "ft"))
       for of in ("classifier_norm", row(lambda r: -r["feature_change"])))),
    ("2: RL selects among patterns whose success stays constant", "no: success of s rises too", "{}",
     ("confidence", "rl", "sft", yes("success_s", "no: success of s rises too", equal="yes"))),
    ("2: RL changes a few critical tokens", "yes, one, by design", "{}",
     ("confidence", "rl", "", yes(more_than_half("kl_first", "kl"), "yes, one, by design", margin=0))),
    ("2: if only the best pattern beats the average, its share just rises", "yes", "{}",
     ("regime-1", "rl-sgd", "sft", yes("share_s"))),
    ("2: if a mediocre one beats it too, it first crowds the best out", "SGD yes, Adam undecided", "SGD {}, Adam {}",
     ("regime-2", "rl-sgd", "", yes(dip)), ("regime-2", "rl", "", yes(dip, less="no"))),
    ("2: imitating the best pattern first shortens that", "yes", "{}",
     ("regime-2", "sft-rl-sgd", "rl-sgd", yes("accuracy"))),
    ("2: RL on the policy's own certainty first helps, then harms", "first undecided, then harms; else undecided",
     "first {}, then {}; else {}", *(("regime-1", "self-certainty", "", half) for half in HALVES),
     ("rlif", "self-certainty", "", HALVES[0])),
)  # fmt: skip


def verdict(results, text, questions):
    together = sum(len(asked) for _, _, _, *asked in PAPERS)
    said = [measure.said(results[name], arm, base, together) for name, arm, base, measure in questions]
    return text(*said) if callable(text) else text.format(*said)


def papers(results):
    """A table: claim, verdict, and the experiment that shows it."""
    yield ["claim", "here", "numbers"]
    for claim, _, text, *questions in PAPERS:
        name = questions[0][0]
        yield [claim, verdict(results, text, questions), f"[`{name}`](experiments/results.md#{name})"]


# ------------------------------------------------------------------------------------------------------ our own pages


def best_pairs(rate):
    """What fresh seeds decide: the best cf-rl and the best constant rates against plain RL; and that cf-rl against
    those constant rates, and against what has its own cell."""
    best, *beside, constant = (arm.name for arm in (*(at(way, 40, 32) for way in MAPPED), at("fast-classifier", rate)))
    return [(best, base) for base in ("rl", constant, *beside)] + [(constant, "rl")]


# What is compared in an experiment, as (arm, base). It is one family: all of a column is asked together, whichever page
# says what came of a pair.
FAST_REAL, W_ALONE, *FASTER = (arm.name for arm in (FAST, W_ALONE, *ALL_FAST))
OF_SPEED = [*product(("cf-rl", "control", "fast-classifier", "cf-rl-same-lr"), ["rl"])]
OF_SPEED += product(["cf-rl"], ("control", "classifier-last", "spread", "fast-classifier"))
OF_REAL = [(arm, "rl") for arm in ("cf-rl", "control", FAST_REAL)]
OF_REAL += [("cf-rl", base) for base in ("control", "classifier-last", FAST_REAL)]
LATER = [*product(("cf-rl-8x200", W_ALONE, *FASTER, "random-reward"), ["rl"]), *product(FASTER, [FAST_REAL])]
OF_BEST = [*product(("cf-rl", "control", "fast-classifier", "body-only", "body-first"), ["rl"])]
OF_BEST += product(["cf-rl"], ("control", "fast-classifier", "classifier-last", "spread"))
ASKED = {"speed": OF_SPEED, "speed-learning": OF_SPEED, "real-both": OF_REAL, "real": LATER, "best": OF_BEST}
ASKED |= {"order-again": best_pairs(40), "order-learning-again": best_pairs(5)}
STARTS = {"speed": "toy that can add", "speed-learning": "toy that cannot yet", "real-both": "SmolLM2"}
FAST_W = {"speed": "fast-classifier", "speed-learning": "fast-classifier", "real-both": FAST_REAL}
LABELS = ("CF-RL", "control: CF-RL's rates, nothing frozen", "W fast throughout, nothing frozen")


def answers(results):
    """The first table: how many updates each way takes, in the toy and in a real model, and whether W first is better
    than W last. All that a column asks is asked together."""
    rows = [[""], ["plain RL"], *([label] for label in LABELS), ["CF-RL against W last, accuracy at the end"]]
    for name, start in STARTS.items():
        runs, arms = results[name], ("cf-rl", "control", FAST_W[name])
        time, first = time_to(runs.x.threshold), statistics.fmean(runs.values("sft", "accuracy"))
        seeds, looks = len(runs.score("rl", "run")), len(ASKED[name])
        column = [f"{start}: {first:.2f} to {runs.x.threshold:g}, {seeds} seeds", time.mean(runs, "rl")]
        for arm in arms:
            never = sum(max(runs.curve(arm, seed)) < runs.x.threshold for seed in runs.score(arm, "run"))
            told = time.said(runs, arm, "rl", looks) + f", {never} never" * (never > 0)
            column.append(f"{time.mean(runs, arm)}, {told}")
        column.append(END.said(runs, "cf-rl", "classifier-last", looks))
        rows = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
    return rows


# ------------------------------------------------------------------------------------------ what the pages say in words

# experiment, arm, base, measure; how many questions were asked together, if these are not its ASKED; what `judge` says.
# (Fewer updates are "less".)
TO_9, TO_6, RISE = time_to(0.9), time_to(0.6), Measure("rise of top-1", "confidence_change")
OVER_THE_REST = yes(row(lambda r: r["gain_by_shares"] - r["gain_by_success"]))
MOSTLY_BODY = yes(row(lambda r: r["confidence_by_body"] - 0.75 * r["confidence_change"]), margin=0)
R_ALONE = yes(row(lambda r: r["agreement_continuation"] - 0.5))
SIZES = {"32x2": "undecided", "64x4": "equal", "128x2": "equal", "256x2": "undecided"}
PINS = (
    *(("speed", arm, "rl", TO_9, "less") for arm in ("cf-rl", "control", "fast-classifier")),
    ("speed", "cf-rl", "control", TO_9, "more"),
    ("speed", "cf-rl", "", yes(at_equal(COSTS["stage 1 for free"], "control")), 8, "more"),
    ("speed", "cf-rl", "classifier-last", END, "equal"),
    *((name, "cf-rl", "classifier-last", END, "undecided") for name in ("speed-learning", "real-both")),
    ("speed-learning", "cf-rl", "rl", AREA, "more"),
    ("speed-learning", "cf-rl", "control", AREA, "undecided"),
    ("best", "cf-rl", "control", TO_9, "equal"),
    ("best", "cf-rl", "control", RUN, "less"),
    ("best", "body-first", "rl", TO_9, "more"),
    *(("best", "body-only", "rl", measure, "less") for measure in (RUN, END)),
    ("confidence", "random-reward", "", RISE, 1, "undecided"),
    ("confidence", "random-reward-sgd", "sft", END, 1, "equal"),
    ("confidence", "rl", "", OVER_THE_REST, 1, "more"),
    ("learning", "rl", "", OVER_THE_REST, 1, "undecided"),
    ("learning", "classifier-only", "rl", END, 1, "less"),
    ("order", "cf-rl-8x5", "control-8x5", END, 12, "equal"),
    ("order-learning", "cf-rl-32x40", "control-32x40", END, 12, "undecided"),
    ("order-again", "cf-rl-32x40", "control-32x40", AREA, "less"),
    ("order-learning-again", "cf-rl-32x40", "control-32x40", AREA, "more"),
    ("order-learning-again", "cf-rl-32x40", "control-32x40", RUN, "undecided"),
    ("parts", "classifier-first-x100", "rl", RUN, 8, "more"),
    ("parts", "shift-only-x100", "sft", END, 1, "more"),
    ("classifier", "control", "", yes(GROWTH, margin=0), 1, "more"),
    *((f"size-{size}", "cf-rl", "control", RUN, 1, word) for size, word in SIZES.items()),
    ("rlif", "self-certainty-sgd", "", HALVES[0], 1, "less"),
    *(("real-both", "cf-rl", base, TO_6, "more") for base in ("rl", "control", FAST_REAL)),
    ("real-both", "control", "rl", TO_6, "undecided"),
    ("real-both", FAST_REAL, "rl", TO_6, "less"),
    ("real-both", "cf-rl", FAST_REAL, END, "less"),
    ("real-both", "cf-rl", "", yes(free), 1, "equal"),
    *(("real-both", arm, "", MOSTLY_BODY, 1, "more") for arm in ("rl", "cf-rl", "control", FAST_REAL)),
    *((name, "rl", "", R_ALONE, 1, "less") for name in ("confidence", "real-both")),
    ("real-again", "cf-rl", "rl", TO_6, 2, "more"),
    ("real", "control", "rl", TO_6, len(OF_REAL), "less"),
    ("real-gpu", "control", "rl", TO_6, len(OF_REAL), "undecided"),
    *((name, FAST_REAL, "rl", TO_6, len(OF_REAL), "less") for name in ("real", "real-gpu")),
    *(("real", FASTER[0], base, TO_6, "less") for base in ("rl", FAST_REAL)),
    ("real", "cf-rl-8x200", "cf-rl", TO_6, 7, "more"),
)


def contradicted(results):
    """What the pages say and the data do not bear out, as sentences."""
    for claim, words, text, *questions in PAPERS:
        if verdict(results, text, questions) != words:
            yield f"{claim}: {verdict(results, text, questions)}, not {words}"
    for name, arm, base, measure, *looks, word in PINS:
        said = measure.verdict(results[name], arm, base, *looks or [len(ASKED[name])]).removeprefix("slightly ")
        if said != word:
            yield f"{name}, {arm}{f' minus {base}' * bool(base)}, {measure.heading or measure.of}: {said}, not {word}"

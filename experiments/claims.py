"""What is claimed, by the two papers and by our pages, and what came of it: rows of data, judged from the runs.

A question is (experiment, arm, base, Measure): is the arm's score above the base's, or above 0 if the base is ""? A new
claim of a paper is one more row of PAPERS; a verdict that a page states in words is one more row of PINS, which the
report refuses to contradict.
"""

import statistics
from itertools import product

from experiments.arms import ALIKE
from experiments.real_model import FAST, W_ALONE
from experiments.scores import EARLY, END, MARGIN, RUN, Measure, closely, never, time_to, times_by_ratio

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


def gain(after):
    """The change of accuracy on odd prompts, up to the peak or after it: the look, after the start, at which it is
    highest on even ones. (On the prompts that chose the look, noise alone would make a peak.)"""

    def gained(runs, arm, seed):
        even, odd = (runs.curve(arm, seed, f"accuracy_{prompts}") for prompts in ("even", "odd"))
        peak = max(range(1, len(even)), key=even.__getitem__)
        return (odd[peak] - odd[0], odd[-1] - odd[peak])[after]

    return gained


GROWTH = row(lambda r: r["kernel_G_by_W@n"] - 1)


# ------------------------------------------------------------------------------------------------------------- papers


def yes(of, more="yes", less="no, the reverse", equal=f"no difference (within {MARGIN:g})", margin=MARGIN):
    """A Measure whose words answer a claim."""
    return Measure("", of, words=(more, less, equal), within=margin)


def same_marks(*said):
    """What is said of four marks, in one sentence."""
    if set(said) == {"yes"}:
        return "cannot tell: the same marks"
    return "undecided" if "undecided" in said else "its marks differ"


def depends(*said):
    """On W, in toy 1 and in toy 2: whether the body alone is lower over the run and at the end (rules.md)."""
    words = []
    for both in zip(said[::2], said[1::2], strict=True):
        neither = not any(each.startswith(("undecided", "lower")) for each in both)
        words.append("yes" if all(each.startswith("lower") for each in both) else "no" if neither else ", ".join(both))
    return "slower and lower without it: toy 1 {}, toy 2 {}".format(*words)


VARIED, ALIKE_AT_ONE, ALIKE_KEPT = (ALIKE[i].name for i in (0, 2, 5))
THROUGH_W = yes(more_than_half("confidence_by_W", "confidence_change"), less="no", margin=0)
PEAK = [Measure(of, gain(i), words=("helps", "harms", "equal")) for i, of in enumerate(("to the peak", "after it"))]
CERTAIN = (("regime-1", "self-certainty"), ("rlif", "self-certainty"), ("rlif", "self-certainty-sgd"))
# paper: claim; what the pages say; a text for the verdicts; questions
PAPERS = (
    ("1: effective learning depends on rapidly shaping W", "slower and lower without it: toy 1 yes, toy 2 yes", depends,
     *((name, "body-only", "rl", measure) for name in ("best", "best-learning") for measure in (RUN, END))),
    ("1: RL makes a policy more confident (top-1 probability)", "yes", "{}",
     ("confidence", "rl", "sft", yes("confidence"))),
    ("1: and less diverse (than imitation; which of them is more accurate is undecided)", "yes", "{}",
     ("lp-ft", "ft", "rl", yes("different_answers", margin=0))),
    ("1: confidence rises through R, by moving W (in this parametrisation)", "SGD yes, Adam undecided",
     "SGD {}, Adam {}", ("scale", "rl-sgd", "", THROUGH_W), ("scale", "rl", "", THROUGH_W)),
    ("1: because features vary little", "SGD: at one rate yes, at matched rates no",
     "SGD: at one rate {}, at matched rates {}",
     ("variability-sgd", ALIKE_AT_ONE, VARIED, yes("confidence_change", margin=0)),
     ("variability-sgd", ALIKE_KEPT, VARIED, yes("confidence_change", equal="no"))),
    ("1: W shapes G, so that stage 2 learns faster", "G grows: yes, the control's: yes; faster: undecided",
     "G grows: {}, the control's: {}; faster: {}",
     *(("classifier", arm, "", yes(GROWTH, margin=0)) for arm in ("cf-rl", "control")),
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
    ("2: imitating the best pattern first shortens that", "yes, by design: it teaches that pattern", "{}",
     ("regime-2", "sft-rl-sgd", "rl-sgd", yes("accuracy", "yes, by design: it teaches that pattern"))),
    ("2: RL on the policy's own certainty first helps, then harms",
     "rare d helps, then harms; toy 1 undecided, then harms; SGD helps, then harms",
     "rare d {}, then {}; toy 1 {}, then {}; SGD {}, then {}",
     *((name, arm, "", change) for name, arm in CERTAIN for change in PEAK)),
)  # fmt: skip


def family(name, measure):
    """With how many questions one of PAPERS is asked together: an arm's two, those of its table, or all others."""
    others = [of for _, _, _, *asked in PAPERS for of, _, _, how in asked if of not in ASKED and how not in PEAK]
    return len(PEAK if measure in PEAK else ASKED.get(name, others))


def verdict(results, text, questions):
    said = [measure.said(results[name], *arms, family(name, measure)) for name, *arms, measure in questions]
    return text(*said) if callable(text) else text.format(*said)


def papers(results):
    """A table: claim, verdict, and the experiment that shows it."""
    yield ["claim", "here", "numbers"]
    for claim, _, text, *questions in PAPERS:
        name = questions[0][0]
        yield [claim, verdict(results, text, questions), f"[`{name}`](experiments/results.md#{name})"]


# ------------------------------------------------------------------------------------------------------ our own pages


# What is compared in an experiment, as (arm, base). It is one family: all of a column is asked together, whichever page
# says what came of a pair.
FAST_REAL, W_ALONE = FAST.name, W_ALONE.name
OF_REAL = [(arm, "rl") for arm in ("cf-rl", "control", FAST_REAL)]
OF_REAL += [("cf-rl", base) for base in ("control", "classifier-last", FAST_REAL)]
OF_BEST = [*product(("cf-rl", "control", "fast-classifier", "body-only", "body-first"), ["rl"])]
OF_BEST += product(["cf-rl"], ("control", "fast-classifier", "classifier-last", "spread"))
OF_AGAIN = [("cf-rl", "rl"), ("fast-classifier", "rl"), *product(["cf-rl"], ("control", "matched", "classifier-last"))]
ASKED = {
    "best": OF_BEST,
    "best-learning": OF_BEST,
    "again": OF_AGAIN,
    "again-learning": OF_AGAIN,
    "real-both": OF_REAL,
    "real-best": OF_BEST,
}
STARTS = {"again": "toy 1", "again-learning": "toy 2", "real-both": "SmolLM2"}
CONTROL = {"again": "matched", "again-learning": "matched", "real-both": "control"}  # with CF-RL's rates
FAST_W = {"again": "fast-classifier", "again-learning": "fast-classifier", "real-both": FAST_REAL}


def freezing(runs, control, looks):
    """Whether CF-RL is better or worse than its control, by what is decided of any measure (rules.md)."""
    said = {(m.verdict(runs, "cf-rl", control, looks).split()[-1], more) for m, more in closely(runs.x).items()}
    helps, harms = (not said.isdisjoint({("more", more), ("less", not more)}) for more in (True, False))
    return "mixed" if helps and harms else "helps" if helps else "harms" if harms else "undecided"


def answers(results):
    """The first table: how many updates each way takes, and whether the freezing helps."""
    rows = [[""], ["plain RL"], ["CF-RL"], ["control: the same rates, nothing frozen"], ["freezing"]]
    for name, start in STARTS.items():
        runs, column = results[name], []
        time, first = time_to(runs.x.threshold), statistics.fmean(runs.values("sft", "accuracy"))
        for arm in ("rl", "cf-rl", CONTROL[name]):
            seeds = never(runs, arm)
            column.append(time.mean(runs, arm) + f", {len(seeds)} never" * bool(seeds))
        heading = f"{start}: {first:.2f} to {runs.x.threshold:g}, {len(runs.score('rl', 'run'))} seeds"
        column = [heading, *column, freezing(runs, CONTROL[name], len(ASKED[name]))]
        rows = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
    return rows


# ------------------------------------------------------------------------------------------ what the pages say in words

# experiment, arm, base, measure; how many questions were asked together, if these are not its ASKED; what `judge` says.
# (Fewer updates are "less".)
AGAIN = ("again", "again-learning")
TO_9, TO_6, TO_3, RISE = time_to(0.9), time_to(0.6), time_to(0.3), Measure("rise of top-1", "confidence_change")
OVER_THE_REST = yes(row(lambda r: r["gain_by_shares"] - r["gain_by_success"]))
MOSTLY_BODY = yes(row(lambda r: r["confidence_by_body"] - 0.75 * r["confidence_change"]), margin=0)
R_ALONE = yes(row(lambda r: r["agreement_continuation"] - 0.5))
PINS = (
    *(("best", arm, "rl", TO_9, "less") for arm in ("cf-rl", "control", "fast-classifier")),
    *(("best", "cf-rl", "control", *each) for each in ((TO_9, "equal"), (RUN, "less"), (END, "undecided"))),
    ("best", "body-first", "rl", TO_9, "more"),
    *((name, "cf-rl", "classifier-last", END, "undecided") for name in ("best", "again", "real-both")),
    *((name, "cf-rl", "fast-classifier", RUN, "less") for name in ("best", "best-learning")),
    ("best-learning", "fast-classifier", "rl", RUN, "more"),
    *(("best-learning", "cf-rl", base, END, "less") for base in ("classifier-last", "spread")),
    ("again-learning", "cf-rl", "classifier-last", END, "less"),
    *((name, "cf-rl", "matched", *each) for name in AGAIN for each in ((EARLY, "more"), (END, "undecided"))),
    *((name, "cf-rl", "rl", measure, "more") for name in AGAIN for measure in (EARLY, RUN)),
    *((name, "fast-classifier", "rl", measure, "more") for name in AGAIN for measure in (EARLY, RUN)),
    ("again", "cf-rl", "matched", TO_9, "undecided"),
    ("again-learning", "cf-rl", "matched", times_by_ratio(0.3), "less"),
    *(("again", "cf-rl", "control", *each) for each in ((TO_9, "equal"), (RUN, "less"))),
    *(("again-learning", "cf-rl", "control", *each) for each in ((TO_3, "less"), (RUN, "more"))),
    ("confidence", "cf-rl-same-lr", "rl", RUN, 1, "less"),
    ("confidence", "random-reward", "", RISE, 1, "undecided"),
    ("confidence", "random-reward-sgd", "sft", END, 1, "equal"),
    ("confidence", "rl", "", OVER_THE_REST, 1, "more"),
    ("learning", "rl", "", OVER_THE_REST, 1, "undecided"),
    ("learning", "classifier-only", "rl", END, 1, "less"),
    ("parts", "classifier-first-x100", "rl", RUN, 8, "more"),
    ("parts", "shift-only-x100", "sft", END, 1, "more"),
    ("lp-ft", "ft", "rl", END, 1, "undecided"),
    *(("real-both", "cf-rl", base, TO_6, "more") for base in ("rl", "control", FAST_REAL)),
    ("real-both", "control", "rl", TO_6, "undecided"),
    ("real-both", FAST_REAL, "rl", TO_6, "less"),
    ("real-both", "cf-rl", FAST_REAL, END, "less"),
    *(("real-both", arm, "", MOSTLY_BODY, 1, "more") for arm in ("rl", "cf-rl", "control", FAST_REAL)),
    *((name, "rl", "", R_ALONE, 1, "less") for name in ("confidence", "real-both")),
    ("real", "control", "rl", TO_6, len(OF_REAL), "less"),
    ("real-gpu", "control", "rl", TO_6, len(OF_REAL), "undecided"),
    *((name, FAST_REAL, "rl", TO_6, len(OF_REAL), "less") for name in ("real", "real-gpu")),
    ("real", "classifier-only-x200", "rl", TO_6, len(OF_REAL), "more"),
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

"""What is claimed, by the two papers and by our pages, and what came of it: rows of data, judged from the runs.

A question is (experiment, arm, base, Measure): is the arm's score above the base's, or above 0 if the base is ""? A new
claim of a paper is one more row of PAPERS; a verdict that a page states in words is one more row of PINS, which the
report refuses to contradict.
"""

import statistics
from itertools import product

import numpy as np
from numpy.random import default_rng

from experiments.arms import ALIKE
from experiments.scores import EARLY, END, MARGIN, RUN, Measure, time_to

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


def gain(after, *halves):
    """The change of accuracy on one half of the prompts, up to the peak or after it: the look, after the start, at
    which it is highest on the other half. (On the prompts that chose the look, noise alone would make a peak.)"""

    def gained(runs, arm, seed):
        chosen, judged = (runs.curve(arm, seed, f"accuracy_{half}") for half in halves)
        peak = max(range(1, len(chosen)), key=chosen.__getitem__)
        return (judged[peak] - judged[0], judged[-1] - judged[peak])[after]

    return gained


def as_accurate(column):
    """A column of an arm at the first look at which it is as accurate as plain RL ends, else at its end."""

    def there(runs, arm, seed):
        aim = runs.rows["rl", seed]["accuracy"]
        first = next((i for i, accuracy in enumerate(runs.curve(arm, seed)) if accuracy >= aim), -1)
        return runs.rows[arm, seed][column] if arm == "rl" else runs.curve(arm, seed, column)[first]

    return there


GROWTH = row(lambda r: r["kernel_G_by_W@n"] - 1)


# ------------------------------------------------------------------------------------------------------------- papers


def yes(of, more="yes", less="no, the reverse", equal=f"no difference (within {MARGIN:g})", margin=MARGIN):
    """A Measure whose words answer a claim."""
    return Measure("", of, words=(more, less, equal), within=margin)


def first_helps(*said):
    """In each of three settings: whether it helps up to the peak, and harms after it."""
    settings = zip(said[::2], said[1::2], strict=True)
    words = ["yes" if both == ("helps", "harms") else "first {}, then {}".format(*both) for both in settings]
    return "d rare: {0}; SGD: {2}; toy 1: {1}".format(*words)


def around_peak(*halves):
    """What is asked of the halves of the prompts, as gain has them."""
    of = ("to the peak", "after it")
    return [Measure(when, gain(i, *halves), words=("helps", "harms", "equal")) for i, when in enumerate(of)]


def same_marks(*said):
    """What is said of four marks, in one sentence."""
    other = "undecided" if "undecided" in said else "its marks differ"
    return "cannot tell: in both W grows and features move less" if set(said) == {"yes"} else other


def few(most_of_kl, seldom, by_design):
    """The toy's verdict; and SmolLM2's: does the top tenth of the states hold over half of the KL, and the likeliest
    token change at less than a fifth (rules.md)?"""
    other = "one token of three" if "no" in (most_of_kl, seldom) else "undecided"
    return f"toy: {by_design}; SmolLM2: {'yes' if most_of_kl == seldom == 'yes' else other}"


def depends(*said):
    """On W, in a setting: whether the body alone is lower over the run and at the end (rules.md)."""

    def word(*both):
        if all(each.startswith("lower") for each in both):
            return "yes"
        still_open = any(each.startswith(("undecided", "lower")) for each in both)
        return ", ".join(dict.fromkeys(both)) if still_open else "no"

    return "frozen W is worse: toy 1 {}, toy 2 {}, SmolLM2 {}".format(*map(word, said[::2], said[1::2]))


VARIED, ALIKE_AT_ONE, ALIKE_KEPT = (ALIKE[i].name for i in (0, 2, 5))
THROUGH_W = yes(more_than_half("confidence_by_W", "confidence_change"), less="no", margin=0)
PEAK, EXCHANGED = around_peak("even", "odd"), around_peak("odd", "even")
CERTAIN = (("regime-1", "self-certainty"), ("rlif", "self-certainty"), ("rlif", "self-certainty-sgd"))
FEW = [yes(lambda *of: as_accurate("own_top_tenth")(*of) - 0.5, less="no", margin=0)]
FEW += [yes(lambda *of: 0.2 - as_accurate("own_changed")(*of), less="no", margin=0)]
# paper: claim; what the pages say; a text for the verdicts; questions
PAPERS = (
    ("1: effective learning depends on rapidly shaping W",
     "frozen W is worse: toy 1 yes, toy 2 yes, SmolLM2 undecided", depends,
     *product(("best", "best-learning", "real-best"), ["body-only"], ["rl"], (RUN, END))),
    ("1: RL makes a policy more confident", "yes: the likeliest token's probability rises, 0.76 to 0.99",
     "{}: the likeliest token's probability rises, {before:.2f} to {after:.2f}",
     ("confidence", "rl", "sft", yes("confidence"))),
    ("1: and less diverse than imitation does",
     "yes: 10.1 different answers against 14.6; if W imitates first: undecided",
     "{}: {before:.1f} different answers against {after:.1f}; if W imitates first: {}",
     *(("lp-ft", arm, "rl", yes("different_answers", margin=0)) for arm in ("ft", "lp-ft"))),
    ("1: confidence rises through R, by moving W", "SGD: yes; Adam: undecided; it depends on W's scale",
     "SGD: {}; Adam: {}; it depends on W's scale", ("scale", "rl-sgd", "", THROUGH_W), ("scale", "rl", "", THROUGH_W)),
    ("1: because features vary little", "SGD: yes, but with R's size held fixed: no",
     "SGD: {}, but with R's size held fixed: {}",
     ("variability-sgd", ALIKE_AT_ONE, VARIED, yes("confidence_change", margin=0)),
     ("variability-sgd", ALIKE_KEPT, VARIED, yes("confidence_change", equal="no"))),
    ("1: W shapes G, so that stage 2 learns faster",
     "G grows: yes; also in the control: yes; stage 2 faster: undecided",
     "G grows: {}; also in the control: {}; stage 2 faster: {}",
     *(("classifier", arm, "", yes(GROWTH, margin=0)) for arm in ("cf-rl", "control")),
     ("classifier", "cf-rl", "", yes(stage_2_lead, equal="no"))),
    ("1: part of the gain is concentration: best-of-N catches up", "yes: with more samples RL's lead shrinks",
     "{}: with more samples RL's lead shrinks",
     ("learning", "rl", "sft", yes(row(lambda r: r["best_of_1"] - r["best_of_64"])))),
    ("1: CF-RL works otherwise than linear probing, then fine-tuning",
     "cannot tell: in both W grows and features move less", same_marks,
     *(("lp-ft", *arms, yes(of, margin=0)) for arms in (("cf-rl", "rl"), ("lp-ft", "ft"))
       for of in ("classifier_norm", row(lambda r: -r["feature_change"])))),
    ("2: RL selects among patterns whose success stays constant", "no: the success of s rises too, 0.78 to 0.97",
     "{}, {before:.2f} to {after:.2f}",
     ("confidence", "rl", "sft", yes("success_s", "no: the success of s rises too", equal="yes"))),
    ("2: RL changes a few critical tokens", "toy: one, by design; SmolLM2: one token of three", few,
     *(("real-tokens", "rl", "", measure) for measure in FEW),
     ("confidence", "rl", "", yes(more_than_half("kl_first", "kl"), "one, by design", margin=0))),
    ("2: if only the best pattern beats average, its share just rises", "SGD: yes", "SGD: {}",
     ("regime-1", "rl-sgd", "sft", yes("share_s"))),
    ("2: if a mediocre one does too, it first crowds that out", "SGD: yes; Adam: undecided", "SGD: {}; Adam: {}",
     *(("regime-2", arm, "", yes(dip, less="no")) for arm in ("rl-sgd", "rl"))),
    ("2: imitating the best pattern first shortens that", "SGD: yes, by design: it teaches that pattern",
     "SGD: {}, by design: it teaches that pattern", ("regime-2", "sft-rl-sgd", "rl-sgd", yes("accuracy"))),
    ("2: RL on the policy's own certainty first helps, then harms",
     "d rare: yes; SGD: yes; toy 1: first undecided, then harms", first_helps,
     *((name, arm, "", change) for name, arm in CERTAIN for change in PEAK)),
)  # fmt: skip


def family(name, measure):
    """With how many questions one of PAPERS is asked together: those of its pair, of its table, or all others."""
    pairs = (*PEAK, *FEW)
    others = [of for _, _, _, *asked in PAPERS for of, _, _, how in asked if of not in ASKED and how not in pairs]
    return 2 if measure in pairs else len(ASKED.get(name, others))


def verdict(results, text, questions):
    """A text may also show the means behind its first question: of the base, {before}, and of the arm, {after}."""
    said = [measure.said(results[name], *arms, family(name, measure)) for name, *arms, measure in questions]
    if callable(text):
        return text(*said)
    if "{before" not in text:
        return text.format(*said)
    name, arm, base, measure = questions[0]
    before, after = (statistics.fmean(results[name].values(each, measure.of)) for each in (base, arm))
    return text.format(*said, before=before, after=after)


def papers(results):
    """A table: claim, verdict, and the experiment that shows it."""
    yield ["claim", "does it hold here? (by Adam, if not said)", "numbers"]
    for claim, _, text, *questions in PAPERS:
        name = questions[0][0]
        yield [claim, verdict(results, text, questions), f"[`{name}`](experiments/results.md#{name})"]


# ------------------------------------------------------------------------------------------------------ our own pages


# What is compared in an experiment, as (arm, base). It is one family: all of a column is asked together, whichever page
# says what came of a pair.
OF_BEST = [*product(("cf-rl", "control", "fast-classifier", "body-only", "body-first"), ["rl"])]
OF_BEST += product(["cf-rl"], ("control", "fast-classifier", "classifier-last", "spread"))
OF_AGAIN = [("cf-rl", "rl"), ("fast-classifier", "rl"), *product(["cf-rl"], ("control", "matched", "classifier-last"))]
OF_POOLED = [("cf-rl", "rl"), ("fast-classifier", "rl"), ("cf-rl", "fast-classifier")]
OF_POOLED += product(("cf-rl", "fast-classifier"), ["classifier-last"])
ASKED = {
    "best": OF_BEST,
    "best-learning": OF_BEST,
    "again": OF_AGAIN,
    "again-learning": OF_AGAIN,
    "pooled": OF_POOLED,
    "pooled-learning": OF_POOLED,
    "real-best": OF_BEST,
}
# Of a setting: the start, the control with CF-RL's rates, and the first accuracy that the rules name.
SETTINGS = {"again": ("toy 1", "matched", EARLY), "again-learning": ("toy 2", "matched", EARLY)}
SETTINGS |= {"real-best": ("SmolLM2", "control", RUN)}


def answers(results):
    """The first table: how many updates each way takes, and CF-RL beside its control."""
    rows = [["median updates, interpolated; fewer are better"], ["plain RL"], ["CF-RL"]]
    rows += [["control: the same rates, nothing frozen"]]
    rows += [["accuracy, not updates: CF-RL against control (undecided: too few seeds)"]]
    for name, (start, control, measure) in SETTINGS.items():
        runs, time = results[name], time_to(results[name].x.threshold)
        column = [f"{statistics.median(runs.values(arm, time.of)):.1f}" for arm in ("rl", "cf-rl", control)]
        first, end = (how.said(runs, "cf-rl", control, len(ASKED[name])) for how in (measure, END))
        when = measure.heading.removeprefix("accuracy ")
        column = [f"{start}, to accuracy {runs.x.threshold:g}", *column, f"{first} {when}; at the end {end}"]
        rows = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
    return rows


# -------------------------------------------------------------------------------- what foretells that a fast W helps

TOLD = ("rho20", "right", "by_first", "plain20", "snr20", "ahead")  # rho, and its rivals


def speed_up(runs, start):
    """Of W fast at a start: foretold from (E12), and measured."""
    rho, plain, fast = (statistics.fmean(runs.values(start, name)) for name in ("rho20", "plain", "fast"))
    return 1.24 * (1 + 19 * rho), plain / fast


def spearman(x, y):
    """Rank correlations (...) of x with y, (..., N) each."""
    from scipy.stats import rankdata, zscore  # slow to import

    return (zscore(rankdata(x, axis=-1), axis=-1) * zscore(rankdata(y, axis=-1), axis=-1)).mean(axis=-1)


def foretellers(runs, starts, sizes):
    """A table: what may foretell the speed-up of N starts, rho first; what the rule says of rho (rules.md); and its
    rank correlation over starts that differ by the size of a batch."""
    (told, speed), N, draws = np.array([speed_up(runs, start) for start in starts]).T, len(starts), default_rng(0)
    x = np.array([[statistics.fmean(runs.values(start, name)) for start in starts] for name in TOLD])  # (M, N)
    some, shuffled = draws.integers(N, size=(9999, N)), draws.permuted(np.tile(speed, (9999, 1)), axis=1)
    rank, chance = spearman(x, speed), spearman(x[:, None], shuffled)  # (M,), (M, 9999)
    low, high = np.quantile(spearman(x[:, some], speed[some]), (0.025, 0.975), axis=1)  # (M,) each
    p = (abs(chance) > abs(rank[:, None]) - 1e-9).mean(axis=1)
    near, apart = (abs(np.log2(told / speed)) <= 1).sum(), ((x[0] > 0.1) == (speed >= 1.5)).sum()
    holds = rank[0] >= 0.6 and low[0] > 0.2 and max(abs(rank[1:])) < rank[0] and near >= 14 and apart >= 13
    refuted = rank[0] < 0.3 or max(abs(rank[1:])) > rank[0]
    yield ["number", "rank correlation with the speed-up", "95% interval", "p"]
    for heading, r, a, b, q in zip(TOLD, rank, low, high, p, strict=True):
        yield [heading, f"{r:+.2f}", f"{a:+.2f} to {b:+.2f}", f"{q:.3f}"]
    said = "refuted" if refuted else "holds" if holds else "undecided"
    yield ["rho20, by the rule", said, f"{near} of {N} within a factor of 2", f"{apart} of {N} told apart"]
    yield ["rho20, sizes of a batch", f"{spearman(*np.array([speed_up(runs, of) for of in sizes]).T):+.2f}", "", ""]


# ------------------------------------------------------------------------------------------ what the pages say in words

# experiment, arm, base, measure; how many questions were asked together, if these are not its ASKED; what `judge` says.
# (Fewer updates are "less".)
AGAIN, POOLED = ("again", "again-learning"), ("pooled", "pooled-learning")
TO_9, TO_6, RISE = time_to(0.9), time_to(0.6), Measure("rise of top-1", "confidence_change")
OVER_THE_REST = yes(row(lambda r: r["gain_by_shares"] - r["gain_by_success"]))
MOSTLY_BODY = yes(row(lambda r: r["confidence_by_body"] - 0.75 * r["confidence_change"]), margin=0)
R_ALONE = yes(row(lambda r: r["agreement_continuation"] - 0.5))
PINS = (
    *(("best", arm, "rl", TO_9, "less") for arm in ("cf-rl", "control", "fast-classifier")),
    *(("best", "cf-rl", "control", *each) for each in ((TO_9, "equal"), (RUN, "less"), (END, "undecided"))),
    ("best", "body-first", "rl", TO_9, "more"),
    *((name, "cf-rl", "classifier-last", END, "undecided") for name in ("best", "again", "real-best")),
    *((name, "cf-rl", "fast-classifier", RUN, "less") for name in ("best", "best-learning")),
    ("best-learning", "fast-classifier", "rl", RUN, "more"),
    *(("best-learning", "cf-rl", base, END, "less") for base in ("classifier-last", "spread")),
    *((name, arm, "rl", RUN, "more") for name in POOLED for arm in ("cf-rl", "fast-classifier")),
    *((name, arm, "classifier-last", END, "less") for name in POOLED for arm in ("cf-rl", "fast-classifier")),
    *((name, "cf-rl", "fast-classifier", RUN, "less") for name in POOLED),
    *((name, "cf-rl", "matched", *each) for name in AGAIN for each in ((EARLY, "more"), (END, "undecided"))),
    *(("again", "cf-rl", "control", *each) for each in ((TO_9, "equal"), (RUN, "less"))),
    *((name, arm, "rl", EARLY, "more") for name in POOLED for arm in ("cf-rl", "fast-classifier")),
    ("confidence", "cf-rl-same-lr", "rl", RUN, 1, "less"),
    ("confidence", "random-reward", "", RISE, 1, "undecided"),
    ("confidence", "random-reward-sgd", "sft", END, 1, "equal"),
    ("confidence", "rl", "", OVER_THE_REST, 1, "more"),
    ("learning", "rl", "", OVER_THE_REST, 1, "undecided"),
    ("learning", "classifier-only", "rl", END, 1, "less"),
    ("lp-ft", "ft", "rl", END, 1, "undecided"),
    *(("real-best", "cf-rl", base, TO_6, "more") for base in ("rl", "control", "fast-classifier")),
    *(("real-best", arm, "rl", TO_6, "equal") for arm in ("control", "fast-classifier", "body-only", "body-first")),
    *(("real-best", arm, "", MOSTLY_BODY, 1, "more") for arm in ("rl", "cf-rl", "control", "fast-classifier")),
    *((name, "rl", "", R_ALONE, 1, "less") for name in ("confidence", "real-best")),
    ("real-tokens", "rl", "ft", Measure("", as_accurate("own_top_tenth")), 1, "undecided"),
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

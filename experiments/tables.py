"""From the rows of a run to its summary, and from that to tables, curves and a sentence.

A summary is {arm: {measure: [a value per seed]}}. A table is a list of rows of texts, the heading first.
"""

import json
import math
import statistics

from experiments.measures import KERNEL
from experiments.runs import filled, policy_file, read_rows, write_text
from experiments.verdicts import SPEED, half_width, judge
from minicfrl import Addition

# -------------------------------------------------------------------------------------------------------------- summary

CURVES = (
    "step",
    "tokens",
    "accuracy",
    "entropy",
    "confidence",
    "share_s",
    "agreement_prompt",
    "agreement_continuation",
)


def summarise(config, out):
    """{arm: {measure: [the last row's value, per seed], "curves": {measure: [[a value per row], per seed]}}}.

    "stages" is like "curves" for what is measured at the stages' ends only. updates_to_threshold is null where the
    accuracy did not get there. What stopped early is left out of the rest.
    """
    summary = {}
    for arm in ("sft", *config.arm_list):
        seeds = [seed for seed, _ in config.jobs(arm) if policy_file(out, arm, seed).exists()]
        runs = [
            [row for name in dict.fromkeys(("sft", arm)) for row in read_rows(config, out, name, seed)]
            for seed in seeds
        ]
        if runs:
            reached = [[int(row["step"]) for row in rows if row["accuracy"] >= config.threshold] for rows in runs]
            names = [name for name, value in runs[0][-1].items() if name != "arm" and not math.isnan(value)]
            summary[arm] = {name: [rows[-1][name] for rows in runs] for name in names}
            reached += [[]] * (config.seeds - len(seeds))  # a seed that stopped early never got there
            if arm != "sft":
                summary[arm]["updates_to_threshold"] = [min(steps, default=None) for steps in reached]
            summary[arm]["accuracy_over_the_run"] = [
                statistics.fmean(row["accuracy"] for row in rows[1:] or rows) for rows in runs
            ]
            summary[arm]["curves"] = columns(CURVES, runs)
            names = ("step", "classifier_norm", "feature_change", *KERNEL)
            ends = [[row for row in rows if row["step"] in config.stage_ends] for rows in runs]
            summary[arm]["stages"] = columns(names, ends)
    return summary


def write_summary(config, out):
    """What the tables print, kept in DIR/summary.json; returns it."""
    summary = summarise(config, out)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


RUN = "accuracy_over_the_run"  # the measure of every verdict on speed


def columns(names, runs):
    """{name: [[a value per row], per run]} of those names that the rows have."""
    return {name: [[row[name] for row in rows] for rows in runs] for name in names if name in runs[0][-1]}


# --------------------------------------------------------------------------------------------------------------- tables

# Columns: heading, measure, format.
COLUMNS = (
    ("accuracy", "accuracy", ".2f"),
    ("greedy", "greedy", ".2f"),
    ("pass@8", "pass_at_8", ".2f"),
    ("entropy", "entropy", ".3f"),
    ("top-1", "confidence", ".3f"),
    ("d/s/g", "shares", ".2f"),
    ("updates", "updates_to_threshold", ".0f"),
    ("sec", "train_seconds", ".0f"),
)
PRINTED = (("accuracy", "accuracy", ".2f"), ("top-1", "confidence", ".2f"), *COLUMNS[5:7])
MICROSCOPE = (
    ("top-1 rises by", "confidence_change", ".3f"),
    ("through W", "confidence_by_W", ".3f"),
    ("through the body", "confidence_by_body", ".3f"),
    ("both together", "confidence_residual", ".3f"),
)
SELECTION = (
    ("by shares", "gain_by_shares", "+.2f"),
    ("by success", "gain_by_success", "+.2f"),
    ("KL", "kl", ".2f"),
    ("KL, 1st token", "kl_first", ".2f"),
    ("1st changed", "changed_first", ".0%"),
    ("later changed", "changed_later", ".1%"),
)


def over_seeds(values, form):
    """The mean, with its 95% interval if there are several values; in how many never, if None is among them."""
    if None in values:
        return "never" if len(values) == 1 else f"never in {values.count(None)} of {len(values)}"
    n, text = len(values), f"{statistics.fmean(values):{form}}"
    if n == 1:
        return text
    return f"{text} ±{half_width(values):{form.lstrip('+')}}"


def at(summary, arm, name, step, rows="stages"):
    """A measure after an update, seed by seed."""
    return [
        values[steps.index(step)]
        for values, steps in zip(summary[arm][rows][name], summary[arm][rows]["step"], strict=True)
    ]


def paired(summary, arm, base, name=RUN):
    """A measure of one arm minus another's, seed by seed, over the seeds that both have finished."""
    values = [dict(zip(summary[each]["seed"], summary[each][name], strict=True)) for each in (arm, base)]
    return [values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]]


def cell(arm, name, form):
    """A measure of an arm over its seeds; empty if it has none."""
    if name == "shares" and "share_s" in arm:  # three means in one cell
        return "/".join(f"{statistics.fmean(arm[f'share_{pattern}']):{form}}" for pattern in Addition.patterns)
    return over_seeds(arm[name], form) if arm.get(name) else ""


def table(summary, columns=COLUMNS):
    """The rows of a table of results as lists of text, the heading first."""
    rows = [["arm"] + [heading for heading, _, _ in columns]]
    for name, arm in summary.items():
        rows.append([name] + [cell(arm, *column[1:]) for column in columns])
    return rows


def without_start(summary):
    return {name: arm for name, arm in summary.items() if name != "sft"}


def sparkline(curves, top):
    """The mean over seeds of several curves, from 0 to `top`, as one line of at most POINTS blocks."""
    means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    shown = means[:: -(-len(means) // POINTS)]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean / top))] for mean in shown)


def verdict(config, summary):
    """Who was faster at equal samples, and was the control too? From the paired mean accuracy over the run; how many
    updates it took is an illustration."""
    arms = ("rl", "cf-rl", "control")
    seeds = [set(summary[arm]["seed"]) if arm in summary else set() for arm in arms]
    if not set.intersection(*seeds):
        return f"No verdict without all of {', '.join(arms)}, on one seed at least."
    said, parts = {}, []
    for arm, base in (arms[1::-1], arms[2::-2], arms[1:]):
        gaps = paired(summary, arm, base)
        said[arm, base] = judge(gaps)
        word = f": {SPEED[said[arm, base]]}" if config.seeds > 1 else ""
        parts.append(f"{arm} minus {base} {over_seeds(gaps, '+.3f')}{word}")
    faster = [arm for arm in arms[1:] if said[arm, "rl"] == "more"]
    cause = ""
    if config.seeds == 1:
        cause = " One seed decides nothing: --seeds 5 gives intervals and verdicts."
    elif said[arms[1:]] == "more" and "cf-rl" in faster:
        cause = " So training the classifier first helped, beyond its learning rate."
    elif len(faster) == 2:
        cause = " So a classifier that learns faster is enough, and nothing need be frozen."
    took = []
    for arm in arms:
        median = statistics.median(math.inf if n is None else n for n in summary[arm]["updates_to_threshold"])
        took.append(f"{arm} {f'after {median:g}' if median < math.inf else 'never'}")
    return (
        f"Mean held-out accuracy over the run, at equal samples: {'; '.join(parts)}. The control has cf-rl's rates and "
        f"freezes nothing.{cause} Of {config.rl_steps} updates, accuracy {config.threshold:g} was reached: "
        f"{', '.join(took)}."
    )


# ------------------------------------------------------------------------------------------------ what a run prints

POINTS = 24  # of a curve


def lines_of(rows):
    """A table as lines of text, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def curves_of(trained):
    """Accuracy and entropy along the run, a line of blocks each, for every arm."""
    top = max(max(curve) for values in trained.values() for curve in values["curves"]["entropy"])
    width = max(map(len, trained))
    for name, arm in trained.items():
        accuracy, entropy = (sparkline(arm["curves"][of], top) for of, top in (("accuracy", 1), ("entropy", top)))
        yield f"  {name:{width}}  {accuracy}  {entropy}"


def print_tables(config, summary):
    """What a stranger wants to see of a run; the rest is in summary.json."""

    def heading(text):
        print("\n" + filled(text))

    heading(
        f"On held-out sums, before RL (sft) and after {config.rl_steps} updates of it: how many sampled answers are "
        "right, the probability of the likeliest token (top-1), the shares of the three ways to answer (direct, "
        f"scratch, guess), and the updates until accuracy {config.threshold:g}:"
    )
    print(*lines_of(table(summary, PRINTED)), sep="\n")
    trained = without_start(summary)
    if not trained:
        return
    heading("Along the run: accuracy (0 to 1), and entropy per token (falls as the policy grows sure):")
    print(*curves_of(trained), sep="\n")
    if config.measures == "accuracy":
        return
    heading(
        "Where the confidence came from: the rise of the top-1 probability on fixed states, and how much of it each "
        "update's change of the classifier W, or of the body, would have brought alone:"
    )
    headings = ("rise", "through W", "the body", "the rest")
    short = tuple((heading, *column[1:]) for heading, column in zip(headings, MICROSCOPE, strict=True))
    print(*lines_of(table(trained, short)), sep="\n")

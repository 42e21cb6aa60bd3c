"""Write the pages' numbers and draw their pictures from the experiments' runs: python -m experiments.report [DIR ...]

Between a page's `report` marks nothing is typed by hand: this command writes it from results.json, its own copy of the
runs' configurations and summaries, and a test checks that it would write the same again. Without a DIR it works from
the copy: after a change of the code, whose lines it counts.
"""

import ast
import contextlib
import dataclasses
import io
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path

import torch

from experiments import claims, figures, order, real_model, speed, tables
from experiments.arms import EXPERIMENTS, Config, arm_named
from experiments.one_update import closely
from experiments.real_model import RealConfig
from experiments.runs import filled, load_policy, read_config, write_text
from experiments.tables import at, over_seeds
from experiments.verdicts import judge
from minicfrl import Addition

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results.json"
BOOK = ("model.py", "minicfrl.py", "ntk.py", "train_toy.py")
LABORATORY = tuple(sorted(path.relative_to(ROOT).as_posix() for path in HERE.glob("*.py")))


def lines_of_code(path):
    """Lines that are not blank, comment or docstring."""
    text = path.read_text(encoding="utf-8")
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for n, line in lines if n not in prose and line.strip() and not line.strip().startswith("#"))


def markdown(heading, *rows, align="---:"):
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] + [align] * (len(heading) - 1), *rows))


def classifier_table(config, summary):
    """What became of G by the end of stage 1, and how fast the accuracy rose."""
    end = config.classifier_steps
    steps = (end, 2 * end, config.rl_steps)
    rows = [["arm", "G through W, start = 1", "its cosine", "alignment, start", f"update {end}"]]
    rows[0] += [f"accuracy, update {step}" for step in steps]
    for arm in config.arm_list:
        rows.append(
            [arm] + [over_seeds(at(summary, arm, f"kernel_G_{name}", end), ".2f") for name in ("by_W", "cosine")]
        )
        rows[-1] += [over_seeds(at(summary, arm, "kernel_G_alignment", step), ".3f") for step in (0, end)]
        rows[-1] += [over_seeds(at(summary, arm, "accuracy", step, "curves"), ".2f") for step in steps]
    return markdown(*rows)


def lp_ft_table(config, summary):
    """Norm of W and change of the features through supervised and reinforcement learning, in one stage and in two."""
    end, last = config.classifier_steps, config.rl_steps
    rows = [["arm", "norm of W, start", f"update {end}", f"update {last}"]]
    rows[0] += [f"feature change, update {end}", f"update {last}", "accuracy"]
    for arm in config.arm_list:
        rows.append([arm] + [over_seeds(at(summary, arm, "classifier_norm", step), ".2f") for step in (0, end, last)])
        rows[-1] += [over_seeds(at(summary, arm, "feature_change", step), ".2f") for step in (end, last)]
        rows[-1].append(over_seeds(summary[arm]["accuracy"], ".2f"))
    return markdown(*rows)


def flow_slope(shares, values):
    """theta'_r = pi_r (p_r - sum_s pi_s p_s): the gradient of the expected value, shares (M,), values (M,) -> (M,)."""
    return shares * (values - (shares * values).sum())


def flow(shares, values, steps, dt=0.1):
    """The exact expected gradient flow among patterns of fixed success rates (Chen et al., arXiv 2506.04695), by
    Euler's steps: yields the shares (M,), from the given ones on."""
    theta = shares.log()
    for _ in range(steps):
        yield theta.softmax(dim=0)
        theta = theta + dt * flow_slope(theta.softmax(dim=0), values)


def real_paired(summary):
    """Each arm minus plain RL: over the run, at its end, and what that allows to say of the first."""
    rows = [["arm", "accuracy over the run", "", "accuracy"]]
    for arm in summary:
        if arm not in ("sft", "rl"):
            gaps = [tables.paired(summary, arm, "rl", name) for name in (tables.RUN, "accuracy")]
            rows.append([arm, over_seeds(gaps[0], "+.3f"), judge(gaps[0]), over_seeds(gaps[1], "+.3f")])
    return rows


def geometry_rows(summary):
    """How alike the features of the start are, then how far R alone points where each arm's updates do."""
    rows = [["", "at the end of prompts", "within responses"]]
    names = {
        "mean cosine": "cosine",
        "inner products that are positive": "positive",
        "centred, root mean square": "centred",
    }
    for label, name in names.items():
        form = ".0%" if name == "positive" else ".2f"
        rows.append([label, *(over_seeds(summary["sft"][f"{name}_{where}"], form) for where in WHERE)])
    for arm in tables.without_start(summary):
        curves = [summary[arm]["curves"][f"agreement_{where}"] for where in WHERE]
        means = [[statistics.fmean(seed[1:]) for seed in curve] for curve in curves]
        rows.append([f"R and R + G, {arm}", *(over_seeds(values, ".2f") for values in means)])
    return rows


def sizes(results):
    """Evidence by (width, layers)."""
    each = {name: claims.Evidence(results, name) for name in results if name.startswith("size-")}
    return {(e.config.width, e.config.layers): e for e in sorted(each.values(), key=lambda e: e.config.width)}


def size_table(results):
    """Leads, verdicts and how alike features are: a size a row. Also the lead in parts of what plain RL leaves."""
    rows = [["d, layers, seeds", "start", "rl", "cf-rl − rl", "of what rl leaves", "control − rl", "cf-rl − control"]]
    rows[0] += ["cosine, prompt ends", "within", "positive within"]
    for (width, layers), e in sizes(results).items():
        rows.append([f"{width}, {layers}, {e.config.seeds}", e.of("sft", "accuracy"), e.of("rl", tables.RUN)])
        pairs = (("rl", "cf-rl"), ("rl", claims.CONTROL), (claims.CONTROL, "cf-rl"))
        rows[-1] += [e.against(*pair) for pair in pairs]
        rows[-1].insert(4, claims.mean(e.lead_of_rest("cf-rl"), ".0%"))
        rows[-1] += [e.of("sft", f"cosine_{where}") for where in WHERE] + [e.of("sft", "positive_continuation", ".0%")]
    return rows


def reach_table(config, summary):
    """What each part gets alone at its rate, and first in W's place: at the end, and over the run against plain RL."""
    rows = [["part", "its rate", "alone, at the end", "first, over the run", "minus plain RL", "at the end"]]
    alone = {arm.partition("-only")[0]: arm for arm in config.arm_list if "-only-" in arm}
    for part, arm in alone.items():
        first = arm.replace("classifier-only-80", "cf-rl-20").replace("-only-80", "-first-20")
        rows.append([part, f"{arm.rpartition('x')[2]}×", over_seeds(summary[arm]["accuracy"], ".2f")])
        if first in summary:
            looks = len(alone) - 1
            said = speed.OVER_THE_RUN.said(config, summary, first, "rl", looks)
            gaps = speed.OVER_THE_RUN.gaps(config, summary, first, "rl")
            rows[-1] += [over_seeds(summary[first][tables.RUN], ".3f"), f"{over_seeds(gaps, '+.3f')}: {said}"]
            rows[-1].append(over_seeds(summary[first]["accuracy"], ".2f"))
        else:
            rows[-1] += [""] * 3
    own = summary["rl"]
    rows.append(["plain RL", "1×", over_seeds(own["accuracy"], ".2f"), over_seeds(own[tables.RUN], ".3f"), "", ""])
    return rows


VARIABILITY = {
    "variability-sgd": "verifier, SGD",
    "variability": "verifier, Adam",
    "variability-coins-sgd": "coin flips, SGD",
    "variability-coins": "coin flips, Adam",
}


def constant_table(results):
    """What a constant feature does: an arm a row, the rate of W in multiples of the run's; in each setting the rise of
    top-1, accuracy and entropy."""
    rows = [["trained", "constant", "rate of W", "mean cosine", *VARIABILITY.values()]]
    config, first = results["variability-sgd"]
    for arm in config.arm_list:
        way, multiple, size = re.fullmatch(r"(.+)-40x([0-9.]+)(?:@s(.+))?", arm).groups()
        rows.append([{"fast-classifier": "everything", "classifier-only": "W alone"}[way], size or "0", multiple])
        rows[-1].append(over_seeds(first[arm]["cosine_continuation"], ".2f"))
        for _, summary in (results[name] for name in VARIABILITY):
            measures = (("confidence_change", "+.3f"), ("accuracy", ".2f"), ("entropy", ".2f"))
            rows[-1].append("; ".join(over_seeds(summary[arm][name], form) for name, form in measures))
    return rows


def scale_table(e):
    """The same function with a times larger W: how fast it learns, and how much of the rise of top-1 goes through W."""
    rows = [["through W; accuracy over the run", *(f"a = {a}" for a in ("1/2", "1", "2"))]]
    for arm in ("rl-sgd", "rl", "cf-rl", "control"):
        each = (f"{arm}@a0.5", arm, f"{arm}@a2")
        cells = (f"{claims.mean(e.shares_of_W(one), '.0%')}; {e.of(one, tables.RUN, '.3f')}" for one in each)
        rows.append([f"`{arm}`", *cells])
    return rows


WHERE = ("prompt", "continuation")


def dip_table(config, summary):
    """The lowest share of the best pattern, seed by seed: along the exact flow from the start's own shares and success
    rates, and as trained."""
    start, kinds = summary["sft"], Addition.patterns
    shares, success = (
        torch.tensor([start[f"{what}_{pattern}"] for pattern in kinds], dtype=torch.float64).T  # (seeds, 3)
        for what in ("share", "success")
    )
    paths = [flow(pi / pi.sum(), p, steps=400, dt=1.0) for pi, p in zip(shares, success, strict=True)]
    lowest = {"at the start": start["share_s"]}
    lowest["the exact flow"] = [min(pi[kinds.index("s")].item() for pi in path) for path in paths]
    lowest |= {arm: [min(path) for path in summary[arm]["curves"]["share_s"]] for arm in config.arm_list}
    rows = [["the lowest share of s", *(f"seed {seed:.0f}" for seed in start["seed"])]]
    return markdown(*rows, *([name, *(f"{share:.4f}" for share in shares)] for name, shares in lowest.items()))


REAL_COLUMNS = (
    ("accuracy", "accuracy", ".2f"),
    ("over the run", "accuracy_over_the_run", ".2f"),
    ("entropy, fixed states", "probe_entropy", ".2f"),
    ("top-1, fixed states", "probe_confidence", ".2f"),
    ("features moved", "feature_change", ".2f"),
    ("sec", "train_seconds", ".0f"),
)


def run_output(config, summary):
    """What the default command prints first and last: its first seed, three of the arms."""

    def first(values):
        if isinstance(values, dict):
            return {name: first(each) for name, each in values.items()}
        return values[:1]

    config = dataclasses.replace(config, seeds=1, arms=Config.arms)
    summary = {arm: first(summary[arm]) for arm in ("sft", *config.arm_list)}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        tables.print_tables(config, summary)
    first_table, _, _ = printed.getvalue().strip().partition("\n\n")
    return f"```\n{first_table}\n...\n{filled(tables.verdict(config, summary))}\n```"


def group_table(update):
    """The four responses: reward, advantage (E2), and e_y - pi at the three patterns, at the end of the prompt."""
    rows = [["response", "reward", "advantage", *(f"e_y − π at {pattern}" for pattern in Addition.patterns)]]
    columns = ("responses", "rewards", "advantages", "residuals")
    for response, reward, advantage, residuals in zip(*(update[name] for name in columns), strict=True):
        rows.append([f"`{response}`", f"{reward:.0f}", f"{advantage:+.2f}", *(f"{g:+.3f}" for g in residuals)])
    rows.append(["Σ A (e_y − π)", "", "", *(f"{push:+.3f}" for push in update["pushes"])])
    return markdown(*rows)


def classifier_rows_table(update):
    """(E4) for two tokens: what the end of the prompt gives, and the whole row, by hand and by autograd."""
    N, length = update["tokens"], update["feature_norm"]
    rows = [["row of dL/dW", "from the end of the prompt", "its norm", "the whole row, by (E4)", "by autograd"]]
    for pattern in "sd":
        i = Addition.patterns.index(pattern)
        push = update["pushes"][i]
        rows.append([pattern, f"−({push:+.0f} / {N}) φᵀ", f"{abs(push) * length / N:.4f}"])
        rows[-1] += [f"{update[name][i]:.4f}" for name in ("rows_by_hand", "rows_by_autograd")]
    return markdown(*rows) + f"\n\n|φ| = {length:.3f}, N = {N}."


def prediction_table(update):
    """What (E7) said of the patterns' probabilities, and what happened."""
    rows = [["pattern", "before", "through W (R)", "through the body (G)", "together", "what happened", "with W alone"]]
    columns = ("probabilities", "by_R", "by_G", "after", "after_W")
    for pattern, before, by_R, by_G, after, after_W in zip(
        Addition.patterns, *(update[name] for name in columns), strict=True
    ):
        changes = [f"{value:+.4f}" for value in (by_R, by_G, by_R + by_G, after, after_W)]
        rows.append([pattern, f"{before:.4f}", *changes])
    return markdown(*rows)


def found(results):
    """The bullets of the first screen."""
    shown = ("speed", "speed-learning", "parts", "parts-learning", "confidence", "real")
    fast, hard, parts, hard_parts, toy, real = (claims.Evidence(results, name) for name in shown)
    best = order.tuned(*results["order-learning"])
    time = speed.yardsticks(fast.config)[0]
    again = claims.Evidence(results, "order-learning-again", looks=len(order.asked_again(best)))
    against = best[order.CF_RL], best[order.CF_RL].replace(order.CF_RL, claims.CONTROL)
    bullets = (
        "**A last layer that learns faster helps.** Updates until nine of ten answers are right: plain RL "
        f"{fast.measured(time, 'rl')}, CF-RL {fast.measured(time, 'cf-rl')}, its control "
        f"{fast.measured(time, claims.CONTROL)}, W fast throughout with nothing frozen "
        f"{fast.measured(time, 'fast-classifier')} ({fast.config.seeds} seeds). At plain RL's rate CF-RL is slower "
        "than plain RL. So give the last layer a higher rate, freeze nothing, and compare.",
        "**That it learns first, or alone, adds next to nothing.** W last in place of first, at the same budgets, at "
        f"the end: {fast.compared(speed.END, 'cf-rl', 'classifier-last')}; from a start that cannot add yet: "
        f"{hard.compared(speed.END, 'cf-rl', 'classifier-last')}. On {again.config.seeds} fresh seeds from "
        f"there CF-RL against its control: up to plain RL's time "
        f"{again.compared(speed.AREA, *against)}; over the run {again.compared(speed.OVER_THE_RUN, *against)}.",
        "**Most of what RL does from the start that can add is a shift of a few logits.** Trained alone, a bias that "
        f"adds the same to the logits of all states takes accuracy from {toy.of('sft', 'accuracy')} to "
        f"{parts.alone('shift')}, W to {parts.alone('classifier')}; plain RL ends at {parts.of('rl', 'accuracy')}. "
        f"From the start that cannot add yet: {hard_parts.alone('shift')}, {hard_parts.alone('classifier')}; "
        f"{hard_parts.of('rl', 'accuracy')}.",
        "**In a pretrained model, SmolLM2-135M-Instruct (4 bits, expanded to float32), nothing of this is decided.** "
        f"Three of its ten updates rest the body, and CF-RL loses about what they cost: {real.minus('cf-rl', 'rl')}; "
        f"with stage 1 not counted, {real.of_free()} ([more](#what-of-the-two-papers-holds-here)).",
        "**RL makes the policy sure of itself**: the probability of its likeliest token rises from "
        f"{toy.of('sft', 'confidence')} to {toy.of('rl', 'confidence')}.",
        "**RL selects more than it teaches, where there is something to select.** Accuracy gained by choosing the "
        f"best pattern more often, and by getting better at one: {toy.gains('rl')}; from a start that cannot add yet "
        f"{toy.at('learning').gains('rl')}.",
    )
    return "\n".join(wrapped(f"- {text}", "  ") for text in bullets)


def wrapped(text, indent=""):
    """Lines of a page; a number stays on a line with its interval."""
    text = textwrap.fill(text.replace(" ±", "~±"), 118, subsequent_indent=indent, break_on_hyphens=False)
    return text.replace("~±", " ±")


def sections(results, update):
    """{name of a report mark: what the pages say there}."""
    config, summary = results["confidence"]
    real = results["real"][1] | {"rl-sgd": results["real-sgd"][1]["rl-sgd"]}
    rl = [arm for arm in config.arm_list if "reward" not in arm_named(arm).rl]
    learnt = {arm: summary[arm] for arm in rl}
    count = {name: lines_of_code(ROOT / name) for name in BOOK}
    robust = {"as in `speed`": results["speed"]} | {n: r for n, r in results.items() if n.startswith("robust-")}
    paired, learning = tables.paired_table, results["learning"]
    return {
        "found": found(results),
        "output": run_output(config, summary),
        "side by side": markdown(*claims.side_by_side(results), align="---"),
        "claims": markdown(*claims.rows(results), align="---"),
        "size": f"The four files are {sum(count.values())} lines of code, comments, docstrings and blanks aside: "
        + ", ".join(f"{name} {lines}" for name, lines in count.items())
        + ".",
        "group": group_table(update),
        "classifier rows": classifier_rows_table(update),
        "prediction": prediction_table(update),
        "table": markdown(*tables.table(summary)),
        "microscope": markdown(*tables.table(learnt, tables.MICROSCOPE)),
        "paired": markdown(*paired(summary)),
        "change": markdown(*paired(summary, "sft")),
        "learning": markdown(*tables.table(learning[1])),
        "learning paired": markdown(*paired(learning[1])),
        "selection": markdown(*tables.table(learnt, tables.SELECTION)),
        "learning selection": markdown(*tables.table(tables.without_start(learning[1]), tables.SELECTION)),
        "regime-1": markdown(*tables.table(results["regime-1"][1])),
        "regime-2": markdown(*tables.table(results["regime-2"][1])),
        "dip": dip_table(*results["regime-2"]),
        "rlif": markdown(*tables.table(results["rlif"][1])),
        "classifier": classifier_table(*results["classifier"]),
        "lp-ft": lp_ft_table(*results["lp-ft"]),
        "real table": markdown(*tables.table(results["real"][1], REAL_COLUMNS)),
        "real paired": markdown(*real_paired(results["real"][1])),
        "real microscope": markdown(*tables.table(tables.without_start(real), tables.MICROSCOPE)),
        "real geometry": markdown(*geometry_rows(real)),
        **{f"{name} map": markdown(*order.map_table(*results[name], speed.OVER_THE_RUN)) for name in MAPS},
        **{f"{name} ends": markdown(*order.map_table(*results[name], speed.END)) for name in MAPS},
        **{
            f"{name} again": markdown(
                *speed.compared_table(*results[f"{name}-again"], order.asked_again(order.tuned(*results[name])))
            )
            for name in MAPS
        },
        **{f"{name} arms": markdown(*speed.arms_table(*results[name])) for name in SPEEDS},
        **{f"{name} compared": markdown(*speed.compared_table(*results[name])) for name in SPEEDS},
        **{f"{name} margins": markdown(*speed.margins_table(*results[name])) for name in SPEEDS},
        **{f"{name} accounts": markdown(*order.accounting_table(*results[name])) for name in SPEEDS},
        **{f"{name} reached": markdown(*reach_table(*results[name])) for name in ("parts", "parts-learning")},
        "variability": markdown(*constant_table(results)),
        "scale": markdown(*scale_table(claims.Evidence(results, "scale"))),
        "robust": markdown(*speed.robust_table(robust)),
        "sizes": markdown(*size_table(results)),
    }


MAPS = {"order": "a start that can add", "order-learning": "a start that cannot add yet"}
SPEEDS = ("speed", "speed-learning")
PAGES = (ROOT / "README.md", HERE / "results.md", HERE / "one_update.md")


def rewritten(texts):
    """{page: its text with what follows each `<!-- report: NAME -->` replaced, up to `<!-- end -->`}. ValueError for a
    name that has no mark."""
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for name, text in texts.items():
        mark = re.compile(rf"(<!-- report: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not any(map(mark.search, pages.values())):
            raise ValueError(f"no page has a mark for {name}")
        for page, old in pages.items():
            pages[page] = mark.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", old)
    return pages


def load_results():
    """{experiment: (its Config, its summary)}, and one update of the first one's starting policy, looked at closely."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    kinds = {name: RealConfig if name in real_model.EXPERIMENTS else Config for name in runs}
    results = {name: (kinds[name](**run["config"]), run["summary"]) for name, run in runs.items()}
    return results, runs["confidence"]["update"]


def main(folders):
    import matplotlib  # noqa: F401  fails before anything is written

    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    experiments = {Config(**flags): name for name, flags in EXPERIMENTS.items()}
    experiments |= {RealConfig(**flags): name for name, flags in real_model.EXPERIMENTS.items()}
    for out in map(Path, folders):
        if not (out / "summary.json").exists():
            sys.exit(f"{out} is not the folder of a finished run")
        try:
            record, config = read_config(out)
        except ValueError:
            record, config = read_config(out, RealConfig)
        if config not in experiments:
            sys.exit(f"{out} holds none of the experiments {', '.join(experiments.values())}")
        record["summary"] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        if config.measures == "accuracy":
            record["summary"] = without_the_rest(record["summary"])
        if experiments[config] == "confidence":
            record["update"] = rounded(closely(config, config.seed, *load_policy(config, out, "sft", config.seed)))
        stored[experiments[config]] = record
    write_text(RESULTS, json.dumps(stored) + "\n")
    results, update = load_results()
    config, summary = results["confidence"]
    figures.plot_curves(dataclasses.replace(config, arms=Config.arms), summary, HERE / "curves.png")
    figures.plot_diversity(results, HERE / "diversity.png")
    figures.plot_patterns(results, HERE / "patterns.png")
    figures.plot_kernel(update, HERE / "kernel.png")
    figures.plot_influence(update, HERE / "influence.png")
    figures.plot_loop(HERE / "loop.png")
    figures.plot_sizes(sizes(results), HERE / "sizes.png")
    figures.plot_knobs(results, HERE / "knobs.png")
    figures.plot_order({title: results[name] for name, title in MAPS.items()}, HERE / "order.png")
    for page, text in rewritten(sections(results, update)).items():
        write_text(page, text)


def without_the_rest(summary):
    """Of the summary of hundreds of runs what the pages show: all of it would be most of results.json."""
    kept = {arm: {name: row[name] for name in ("seed", tables.RUN, "accuracy")} for arm, row in summary.items()}
    for arm, row in kept.items():
        row["curves"] = {name: rounded(summary[arm]["curves"][name], 4) for name in ("step", "tokens", "accuracy")}
    return kept


def rounded(values, digits=6):
    """Nested lists of numbers with so many digits each: what a page or a picture can show."""
    if isinstance(values, dict):
        return {name: rounded(each, digits) for name, each in values.items()}
    if isinstance(values, list):
        return [rounded(each, digits) for each in values]
    return float(f"{values:.{digits}g}") if isinstance(values, float) else values


if __name__ == "__main__":
    main(sys.argv[1:])

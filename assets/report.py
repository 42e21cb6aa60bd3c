"""Write the README's numbers and draw its figures from the experiments' runs: python assets/report.py [DIR ...]

Between the README's `report` marks nothing is typed by hand: this command writes it from assets/results.json, its own
copy of the runs' configurations and summaries, and a test checks that it would write the same again. Without a DIR it
works from the copy: after a change of the code, whose lines it counts.
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train_toy  # noqa: E402
from assets import tables  # noqa: E402
from assets.tables import over_seeds  # noqa: E402
from minicfrl import Addition, departure, group_advantages, policy_gradient_loss, rollout, sequence_logp  # noqa: E402
from ntk import agreement, logit_change  # noqa: E402

RESULTS = ROOT / "assets" / "results.json"
FILES = ("model.py", "minicfrl.py", "ntk.py", "train_toy.py", "assets/tables.py")


# Okabe and Ito's: safe for the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def plot_band(axes, xs, curves, label, style, colour):
    """The median over seeds of curves, one per seed, and a band from min to max."""
    by_x = list(zip(*curves, strict=True))
    axes.plot(xs, [statistics.median(ys) for ys in by_x], style, color=colour, label=label)
    axes.fill_between(xs, *([f(ys) for ys in by_x] for f in (min, max)), color=colour, alpha=0.2, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)


@contextlib.contextmanager
def panels_in(path, count):
    """Panels side by side to draw in; the figure is saved at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    yield figure.subplots(1, count)
    figure.savefig(path, format="png", dpi=150)


def plot_curves(config, summary, path):
    """Accuracy, entropy and the share of pattern S against updates."""
    panels = {"accuracy": "held-out accuracy", "entropy": "token entropy (nats)", "share_S": "share of pattern S"}
    shown = [arm for arm in config.arm_list if arm in summary]
    with panels_in(path, len(panels)) as figure:
        for axes, (name, label) in zip(figure, panels.items(), strict=True):
            for colour, arm in zip(itertools.cycle(COLOURS), shown, strict=False):
                curves = summary[arm]["curves"]
                style = "-" if arm in ("rl", "cf-rl") else "--"  # dashed: the controls
                plot_band(axes, curves["step"][0], curves[name], arm, style, colour)
            top = None if name == "entropy" else 1
            axes.set(xlabel="updates", ylabel=label, xlim=(0, config.rl_steps), ylim=(0, top))
        axes.legend(frameon=False)


def plot_patterns(results, path):
    """The best pattern's share in two regimes, and accuracy with the verifier and with internal feedback."""
    panels = (("regime-1", "share_S"), ("regime-2", "share_S"), ("regime-1", "accuracy"))
    arms = dict.fromkeys(results["regime-2"][0].arm_list + results["regime-1"][0].arm_list)
    colours = dict(zip(arms, COLOURS, strict=False))  # one for an arm, in all panels
    with panels_in(path, len(panels)) as figure:
        for axes, (experiment, name) in zip(figure, panels, strict=True):
            config, summary = results[experiment]
            for arm in config.arm_list:
                if name == "accuracy" or config.rl(arm).reward == "verifier":
                    curves = summary[arm]["curves"]
                    plot_band(axes, curves["step"][0], curves[name], arm, "-", colours[arm])
            label = "held-out accuracy" if name == "accuracy" else "share of pattern S"
            axes.set(xlabel="updates", ylabel=label, xlim=(0, config.rl_steps), title=experiment)
            axes.set(**({"yscale": "log"} if experiment == "regime-2" else {"ylim": (0, 1)}))
            axes.legend(frameon=False, fontsize=8, loc="center right" if experiment == "regime-2" else "best")


def plot_diversity(results, path):
    """pass@k against k, before and after RL, for each starting policy."""
    with panels_in(path, 2) as figure:
        for axes, experiment in zip(figure, ("confidence", "learning"), strict=True):
            _, summary = results[experiment]
            names = [name for _, name, _ in tables.DIVERSITY[:-1]]
            shown = [arm for arm in ("sft", "rl", "cf-rl", "random-reward") if arm in summary]
            for colour, arm in zip(("#000000", *COLOURS), shown, strict=False):
                curves = list(zip(*(summary[arm][name] for name in names), strict=True))
                plot_band(axes, range(len(names)), curves, arm, ":" if arm == "sft" else "-", colour)
            axes.set(xlabel="k samples", ylabel="pass@k on held-out prompts", title=experiment, ylim=(0, 1.02))
            axes.set_xticks(range(len(names)), [2**i for i in range(len(names))])
            axes.legend(frameon=False, loc="lower right")


def lines_of_code(path):
    """Lines that are not blank, comment or docstring."""
    text = path.read_text(encoding="utf-8")
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for n, line in lines if n not in prose and line.strip() and not line.strip().startswith("#"))


def falls(curve):
    """How far a curve ever falls below its best so far."""
    return max(max(curve[: i + 1]) - value for i, value in enumerate(curve))


def markdown(heading, *rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] + ["---:"] * (len(heading) - 1), *rows))


def at(summary, arm, name, step, rows="stages"):
    """A measure after an update, seed by seed."""
    return [
        values[steps.index(step)]
        for values, steps in zip(summary[arm][rows][name], summary[arm][rows]["step"], strict=True)
    ]


def agreement_table(summary, arms):
    """How far the representation part alone points where the whole update does, averaged over the logged updates."""
    rows = [["arm", "at the end of prompts", "within responses"]]
    for arm in arms:
        curves = [summary[arm]["curves"][f"agreement_{where}"] for where in ("prompt", "continuation")]
        rows.append([arm] + [over_seeds([statistics.fmean(seed[1:]) for seed in curve], ".2f") for curve in curves])
    return markdown(*rows)


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


def states_by_position(mask):
    """For each position of the response, 0 the end of the prompt: which of the N states of `mask` (B, T) are there."""
    position = (mask.cumsum(dim=1) - 1)[mask]  # (N,)
    return [position == t for t in range(int(position.max()) + 1)]


def by_position(config, out):
    """{measure: [[a value per position in the response], per seed]} of the starting policies, 0 the end of the prompt.

    cosine and positive are over the pairs of states at one position. agreement is how far the representation part of
    one plain policy-gradient step, (E3) on a batch of RL, points where the whole does: see ntk.microscope.
    """
    measures = {"cosine": [], "positive": [], "agreement": []}
    for seed, arm in config.jobs("sft"):
        task, model = train_toy.load_policy(config, out, arm, seed)
        probe = train_toy.start_probe(config, task, model, seed)
        prompts = [task.prompt(a, b) for a, b in task.train_pairs[:: len(task.train_pairs) // 32][:32].tolist()]
        batch = rollout(model, task, prompts, config.samples, train_toy.generator(seed, "by position"))
        advantages = group_advantages(batch.rewards).flatten()
        policy_gradient_loss(sequence_logp(model, batch.tokens), advantages, batch.mask[:, 1:]).backward()
        step = {name: -parameter.grad for name, parameter in model.named_parameters()}
        agreements = agreement(*logit_change(model, probe.tokens, probe.state_mask, step))  # (N,)
        features = model.features(probe.tokens)[probe.state_mask].detach()
        states = states_by_position(probe.state_mask)
        cosines = [train_toy.cosines(features[here]) for here in states]
        measures["cosine"].append([c.mean().item() for c in cosines])
        measures["positive"].append([(c > 0).float().mean().item() for c in cosines])
        measures["agreement"].append([agreements[here].mean().item() for here in states])
    return measures


def flow_slope(shares, values):
    """theta'_r = pi_r (p_r - sum_s pi_s p_s): the gradient of the expected value, shares (K,), values (K,) -> (K,)."""
    return shares * (values - (shares * values).sum())


def flow(shares, values, steps, dt=0.1):
    """The exact expected gradient flow among patterns of fixed success rates (Chen et al., arXiv 2506.04695), by
    Euler's steps: yields the shares (K,), from the given ones on."""
    theta = shares.log()
    for _ in range(steps):
        yield theta.softmax(dim=0)
        theta = theta + dt * flow_slope(theta.softmax(dim=0), values)


def position_table(measures, columns):
    """columns are (heading, measure, format), as for tables.table; here they are rows."""
    positions = range(min(len(seed) for _, name, _ in columns for seed in measures[name]))
    rows = [["tokens into the response", *map(str, positions)]]
    for heading, name, form in columns:
        rows.append([heading] + [over_seeds([seed[t] for seed in measures[name]], form) for t in positions])
    return markdown(*rows)


def stage_table(config, summary, columns, arms):
    """What is measured at the ends of the stages, as medians (and ranges) over the seeds: of the start, which all arms
    share, then of each arm. columns are (heading, measure, format), as for tables.table."""
    rows = [["policy"] + [heading for heading, _, _ in columns]]
    for arm in arms:
        for step in config.stage_ends:
            rows.append([f"{arm}, update {step}" if step else "start"])
            for _, name, form in columns:
                values = at(summary, arm, name, step)
                low, middle, high = (f"{f(values):{form}}" for f in (min, statistics.median, max))
                rows[-1].append(middle if low == high else f"{middle} ({low} to {high})")
    return markdown(rows[0], *dict.fromkeys(map(tuple, rows[1:])))


def changes_by_position(config, out, arm="rl"):
    """{measure: [[a value per position], per seed]} on an arm's own responses: in how many states its likeliest token
    is another than the start's, and KL(arm || start) in nats, which adds up to that of whole responses."""
    measures = {"changed": [], "kl": []}
    for seed, _ in config.jobs(arm):
        (task, start), (_, model) = (train_toy.load_policy(config, out, name, seed) for name in ("sft", arm))
        prompts = [task.prompt(a, b) for a, b in task.heldout_pairs[: config.final_prompts].tolist()]
        batch = rollout(model, task, prompts, train_toy.SAMPLES, train_toy.generator(seed, "by position"))
        for name, values in zip(("kl", "changed"), departure(batch, start), strict=True):
            measures[name].append([values[here].mean().item() for here in states_by_position(batch.state_mask)])
    return measures


def dip_table(config, summary):
    """The lowest share of the best pattern, seed by seed: along the exact flow from the start's own shares and success
    rates, and as trained."""
    start, kinds = summary["sft"], Addition.patterns
    shares, success = (
        torch.tensor([start[f"{what}_{pattern}"] for pattern in kinds], dtype=torch.float64).T  # (seeds, K)
        for what in ("share", "success")
    )
    paths = [flow(pi / pi.sum(), p, steps=400, dt=1.0) for pi, p in zip(shares, success, strict=True)]
    lowest = {"at the start": start["share_S"]}
    lowest["the exact flow"] = [min(pi[kinds.index("S")].item() for pi in path) for path in paths]
    lowest |= {arm: [min(path) for path in summary[arm]["curves"]["share_S"]] for arm in config.arm_list}
    rows = [["the lowest share of S", *(f"seed {seed:.0f}" for seed in start["seed"])]]
    return markdown(*rows, *([name, *(f"{share:.4f}" for share in shares)] for name, shares in lowest.items()))


def second_paper_table(results):
    """Accuracy's course, what its change is due to (E10), and where the patterns end: an arm of an experiment a row."""
    rows = [["experiment", "arm", "start", "highest", "end", "by shares", "by success", "D/S/G at the end"]]
    shown = {"confidence": ["rl"], "learning": ["rl"]}
    shown |= {name: results[name][0].arm_list for name in ("regime-1", "regime-2", "rlif")}
    for experiment, arms in shown.items():
        for arm in arms:
            measures = results[experiment][1][arm]
            curves = measures["curves"]["accuracy"]
            courses = [[f(curve) for curve in curves] for f in (lambda curve: curve[0], max, lambda curve: curve[-1])]
            rows.append([experiment, arm, *(over_seeds(values, ".2f") for values in courses)])
            rows[-1] += [tables.cell(measures, f"gain_by_{cause}", "+.2f") for cause in ("shares", "success")]
            rows[-1].append(tables.cell(measures, "shares", ".2f"))
    return markdown(*rows)


LIKENESS_COLUMNS = (
    ("mean cosine", "cosine", ".2f"),
    ("positive", "positive", ".0%"),
    ("R alone and R + G", "agreement", ".2f"),
)
CHANGE_COLUMNS = (("likeliest token changed", "changed", ".1%"), ("KL (nats)", "kl", ".3f"))
KL_COLUMNS = (
    ("accuracy", "accuracy", ".2f"),
    ("accuracy over the run", "accuracy_over_the_run", ".2f"),
    ("entropy", "entropy", ".3f"),
    ("KL to the start", "kl", ".2f"),
    ("pass@64", "best_of_64", ".2f"),
    ("answers in 64", "different_answers", ".1f"),
)
KERNEL_COLUMNS = (
    ("norm of R", "kernel_R", ".0f"),
    ("norm of G", "kernel_G", ".0f"),
    ("through W alone", "kernel_G_by_W", ".2f"),
    ("its cosine", "kernel_G_cosine", ".2f"),
    ("norm of W", "classifier_norm", ".2f"),
)
FEATURE_COLUMNS = (
    ("end of prompt: mean cosine", "cosine_prompt", ".2f"),
    ("positive", "positive_prompt", ".0%"),
    ("centred", "centred_prompt", ".2f"),
    ("in the response: mean cosine", "cosine_continuation", ".2f"),
    ("positive", "positive_continuation", ".0%"),
    ("centred", "centred_continuation", ".2f"),
)


def sections(results, positions):
    """{name of a report mark: what the README says there}."""
    config, summary = results["confidence"]
    rl = [arm for arm in config.arm_list if config.rl(arm).reward == "verifier"]
    learnt = {arm: summary[arm] for arm in rl}
    accuracy = {arm: summary[arm]["curves"]["accuracy"] for arm in rl}
    gains = [curve[-1] - curve[0] for arm in rl for curve in accuracy[arm]]
    worst = max(falls(curve) for arm in rl for curve in accuracy[arm])
    count = {name: lines_of_code(ROOT / name) for name in FILES}
    updates = "; ".join(f"{arm} {summary[arm]['updates_to_threshold']}" for arm in rl)
    paired, learning = tables.paired_table, results["learning"]
    return {
        "size": f"It is {sum(count.values())} lines of code in five files, comments, docstrings and blanks aside.",
        "table": markdown(*tables.table(summary)),
        "microscope": markdown(*tables.table(learnt, tables.MICROSCOPE)),
        "paired": markdown(*paired(summary)),
        "change": markdown(*paired(summary, "sft")),
        "learning": markdown(*tables.table(learning[1])),
        "learning paired": markdown(*paired(learning[1])),
        "agreement": agreement_table(summary, rl),
        "positions": position_table(positions, LIKENESS_COLUMNS),
        "where": position_table(positions, CHANGE_COLUMNS),
        "selection": markdown(*tables.table(learnt, tables.SELECTION)),
        "learning selection": markdown(*tables.table(tables.without_start(learning[1]), tables.SELECTION)),
        "regime-1": markdown(*tables.table(results["regime-1"][1])),
        "regime-2": markdown(*tables.table(results["regime-2"][1])),
        "second paper": second_paper_table(results),
        "dip": dip_table(*results["regime-2"]),
        "rlif": markdown(*tables.table(results["rlif"][1])),
        "kl": markdown(*tables.table(results["kl"][1], KL_COLUMNS)),
        "kl paired": markdown(*paired(results["kl"][1])),
        "classifier": classifier_table(*results["classifier"]),
        "lp-ft": lp_ft_table(*results["lp-ft"]),
        "kernel": stage_table(config, summary, KERNEL_COLUMNS, ("rl", "cf-rl", "rl-classifier-lr")),
        "features": stage_table(config, summary, FEATURE_COLUMNS, ("rl", "cf-rl")),
        "verdict": textwrap.fill(tables.verdict(config, summary), 118),
        "spread": textwrap.fill(
            f"Over the {config.seeds} seeds and the arms with real rewards the accuracy rises by {min(gains):.2f} to "
            f"{max(gains):.2f} and never falls more than {worst:.2f} below its best so far. "
            f"Updates to {config.threshold:g}, seed by seed: {updates}. "
            f"With stage 1 for free, as the paper counts, cf-rl {summary['cf-rl']['full_updates_to_threshold']}.",
            118,
            break_on_hyphens=False,
        ),
        "files": markdown(["file", "lines of code"], *([f"`{f}`", str(n)] for f, n in count.items())),
    }


PAGES = (ROOT / "README.md", ROOT / "assets" / "results.md")


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
    """{experiment: (its Config, its summary)}, and what the first one's policies do by position."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    results = {name: (train_toy.Config(**run["config"]), run["summary"]) for name, run in runs.items()}
    return results, runs["confidence"]["positions"]


def main():
    import matplotlib  # noqa: F401  fails before anything is written

    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    experiments = {train_toy.Config(**flags): name for name, flags in train_toy.EXPERIMENTS.items()}
    for out in map(Path, sys.argv[1:]):
        if not (out / "summary.json").exists():
            sys.exit(f"{out} is not the folder of a finished run")
        record, config = train_toy.read_config(out)
        if config not in experiments:
            sys.exit(f"{out} holds none of the experiments {', '.join(experiments.values())}")
        record["summary"] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        if experiments[config] == "confidence":
            record["positions"] = by_position(config, out) | changes_by_position(config, out)
        stored[experiments[config]] = record
    train_toy.write_text(RESULTS, json.dumps(stored) + "\n")
    results, positions = load_results()
    config, summary = results["confidence"]
    plot_curves(dataclasses.replace(config, arms=train_toy.CONTROLS), summary, ROOT / "assets" / "curves.png")
    plot_diversity(results, ROOT / "assets" / "diversity.png")
    plot_patterns(results, ROOT / "assets" / "patterns.png")
    for page, text in rewritten(sections(results, positions)).items():
        train_toy.write_text(page, text)


if __name__ == "__main__":
    main()

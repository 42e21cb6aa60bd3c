"""The pictures, each drawn from a run's summary or from one_update.closely. matplotlib is needed here alone."""

import contextlib
import itertools
import re
import statistics
from pathlib import Path

from experiments import order
from experiments.arms import CONSTANTS, arm_named
from experiments.one_update import closely
from experiments.runs import load_policy, policy_file
from experiments.speed import END
from experiments.verdicts import half_width, judge

# Okabe and Ito's: safe for the colour-blind. An arm has one colour in all pictures.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
ARMS = ("rl", "cf-rl", "control", "classifier-last", "fast-classifier", "rl-sgd", "sft", "random-reward")
OTHERS = {"self-certainty": "#cc79a7", "log-probability": "#e69f00", "sft-rl-sgd": "#009e73"}  # where those are not
NAMES = {
    "rl": "plain RL",
    "cf-rl": "CF-RL (W first, alone)",
    "control": "control (nothing frozen)",
    "classifier-last": "W last, alone",
    "fast-classifier": "W fast throughout",
}
ALSO = {"everything-only-30x2": "everything at twice the rate"}  # in the first picture, of what has it


def colour_of(arm):
    """That of an arm; of a cell of a map that of its arm."""
    colours = dict(zip(ARMS, COLOURS, strict=True)) | OTHERS
    return next((colour for name, colour in colours.items() if re.fullmatch(rf"{name}(-[0-9]+x.*)?", arm)), "#999999")


def plot_band(axes, xs, curves, label, style, colour):
    """The median over seeds of curves, one per seed, and a band from min to max."""
    by_x = list(zip(*curves, strict=True))
    axes.plot(xs, [statistics.median(ys) for ys in by_x], style, color=colour, label=label)
    axes.fill_between(xs, *([f(ys) for ys in by_x] for f in (min, max)), color=colour, alpha=0.2, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)


@contextlib.contextmanager
def panels_in(path, *shape, size=(8, 2.8)):
    """Panels to draw in, in rows and columns, or in a row; the figure is saved at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(*(shape if len(shape) == 2 else (1, *shape)))
    figure.savefig(path, format="png", dpi=150)


def plot_answer(evidence, path):
    """Accuracy against updates: does it help that W comes first? A panel for each of {title: claims.Evidence}."""
    with panels_in(path, len(evidence), size=(8, 3.4)) as panels:
        for axes, (title, e) in zip(panels, evidence.items(), strict=True):
            for arm, label in (NAMES | {arm: label for arm, label in ALSO.items() if arm in e.summary}).items():
                curves = e.summary[e.arm(arm)]["curves"]
                style = "--" if arm == "classifier-last" else "-"  # plain RL, for most of the run
                plot_band(axes, curves["step"][0], curves["accuracy"], label, style, colour_of(arm))
            end, last = e.config.classifier_steps, e.config.rl_steps
            axes.axvline(end, color="#555555", linestyle=":")
            axes.text(end, 0.02, " end of CF-RL's stage 1", fontsize=8, color="#555555")
            axes.set(title=title, xlabel="updates", xlim=(0, last), ylim=(0, 1))
        panels[0].set_ylabel("accuracy: median and all seeds")
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.1))


def plot_curves(config, summary, path):
    """Accuracy, entropy and the share of pattern s against updates."""
    panels = {"accuracy": "held-out accuracy", "entropy": "token entropy (nats)", "share_s": "share of pattern s"}
    with panels_in(path, len(panels)) as figure:
        for axes, (name, label) in zip(figure, panels.items(), strict=True):
            for arm in (arm for arm in config.arm_list if arm in summary):
                curves = summary[arm]["curves"]
                plot_band(axes, curves["step"][0], curves[name], NAMES.get(arm, arm), "-", colour_of(arm))
            top = None if name == "entropy" else 1
            axes.set(xlabel="updates", ylabel=label, xlim=(0, config.rl_steps), ylim=(0, top))
        axes.legend(frameon=False, fontsize=8)


def plot_patterns(results, path):
    """The best pattern's share in two regimes, and accuracy with the verifier and with internal feedback."""
    panels = {
        ("regime-1", "share_s"): "one pattern beats the average:\nits share just rises",
        ("regime-2", "share_s"): "two do (log scale):\nby SGD the best falls first",
        ("regime-1", "accuracy"): "own certainty as reward\nfirst helps, then harms",
    }
    with panels_in(path, len(panels), size=(8, 3.2)) as figure:
        for axes, ((experiment, name), title) in zip(figure, panels.items(), strict=True):
            config, summary = results[experiment]
            for arm in config.arm_list:
                if name == "accuracy" or "reward" not in arm_named(arm).rl:
                    curves = summary[arm]["curves"]
                    plot_band(axes, curves["step"][0], curves[name], NAMES.get(arm, arm), "-", colour_of(arm))
            label = "held-out accuracy" if name == "accuracy" else "share of pattern s"
            axes.set(xlabel="updates", ylabel=label, xlim=(0, config.rl_steps))
            axes.set_title(title, fontsize=9)
            axes.set(**({"yscale": "log"} if experiment == "regime-2" else {"ylim": (0, 1)}))
            axes.legend(frameon=False, fontsize=8, loc="center right" if experiment == "regime-2" else "best")


def plot_diversity(results, path):
    """pass@k against k, before and after RL, for each starting policy."""
    titles = {"confidence": "a start that can add", "learning": "a start that cannot yet"}
    with panels_in(path, 2, size=(8, 3.2)) as figure:
        for axes, (experiment, title) in zip(figure, titles.items(), strict=True):
            _, summary = results[experiment]
            names = [name for name in summary["sft"] if name.startswith("best_of_")]
            for arm in (arm for arm in ("sft", "rl", "cf-rl", "random-reward") if arm in summary):
                curves = list(zip(*(summary[arm][name] for name in names), strict=True))
                label = {"sft": "start", "random-reward": "coin flips"} | NAMES
                plot_band(axes, range(len(names)), curves, label[arm], ":" if arm == "sft" else "-", colour_of(arm))
            axes.set(xlabel="k samples", title=f"{title}:\nRL's lead shrinks with k", ylim=(0, 1.02))
            axes.set_xticks(range(len(names)), [2**i for i in range(len(names))])
        figure[0].set_ylabel("pass@k on held-out prompts")
        figure[0].legend(frameon=False, fontsize=9, loc="lower right")


VERDICTS = {"behind": "#d55e00", "undecided": "#dddddd", "equal": "#f7f7f7", "ahead": "#0072b2"}


def plot_order(maps, path):
    """At the end of the run, cf-rl minus the arms with its rates, in every cell of the map: a panel for each start. A
    cell that stage 1 alone finishes says nothing of the order and is left blank."""
    from matplotlib.patches import Patch, Rectangle

    with panels_in(path, len(maps), size=(8, 3)) as panels:
        for axes, (title, (config, summary)) in zip(panels, maps.items(), strict=True):
            looks = len(config.cells) * len(order.BASES)
            for (y, cell), (x, base) in itertools.product(enumerate(config.cells), enumerate(order.BASES)):
                if order.finished_in_stage_1(config, summary, cell):
                    continue
                gaps = END.gaps(config, summary, order.arm_at(order.CF_RL, cell), order.arm_at(base, cell))
                said = {"more": "ahead", "less": "behind"}
                word = judge(gaps, END.margin(config, summary), looks).removeprefix("slightly ")
                axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, color=VERDICTS[said.get(word, word)]))
                axes.text(x, y, f"{statistics.fmean(gaps):+.3f}", ha="center", va="center", fontsize=9)
            axes.set_xticks(range(len(order.BASES)), [f"minus\n{base}" for base in order.BASES], fontsize=8)
            axes.set_yticks(range(len(config.cells)), [f"n = {n}, {multiple:g}×" for n, multiple in config.cells])
            axes.set(title=title, xlim=(-0.5, len(order.BASES) - 0.5), ylim=(len(config.cells) - 0.5, -0.5))
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        marks = [Patch(facecolor=colour, edgecolor="#999999", label=word) for word, colour in VERDICTS.items()]
        axes.figure.legend(handles=marks, frameon=False, fontsize=9, ncols=4, loc="outside lower center")


def plot_knobs(results, path):
    """What a constant feature changes, and what it does not: rise of top-1 and accuracy by SGD, everything trained, W
    at one rate and at one that keeps the trace of R."""
    panels = {"confidence_change": "confidence rises more\nonly at one rate", "accuracy": "and so does accuracy"}
    experiments = {"variability-sgd": "verifier", "variability-coins-sgd": "coin flips"}
    with panels_in(path, 2, size=(8, 3.2)) as figure:
        for axes, (name, title) in zip(figure, panels.items(), strict=True):
            for (experiment, rewards), colour in zip(experiments.items(), COLOURS, strict=False):
                _, summary = results[experiment]
                for kept, style in ((False, "o-"), (True, "s:")):
                    rates = {s: multiple if kept else 1 for s, multiple in CONSTANTS.items()}
                    way = "fast-classifier-40x"
                    arms = [f"{way}1", *(f"{way}{rate:.4g}@s{s}" for s, rate in rates.items())]
                    values = [summary[arm][name] for arm in arms]
                    named = f"{rewards}, {'trace of R kept' if kept else 'one rate'}"
                    means, bars = [statistics.fmean(v) for v in values], [half_width(v) for v in values]
                    axes.errorbar((0, *CONSTANTS), means, bars, fmt=style, color=colour, capsize=3, label=named)
            axes.set(title=title, xlabel="constant feature, in lengths of φ")
            axes.spines[["top", "right"]].set_visible(False)
        figure[0].set_ylabel("rise of top-1, fixed states")
        figure[1].set_ylabel("held-out accuracy")
        axes.legend(frameon=False, fontsize=8)


def plot_sizes(sizes, path):
    """Leads, also in parts of what plain RL leaves, and how alike features are, against the policy's width.
    `sizes` holds claims.Evidence by (width, layers); what has other than two layers is hollow."""
    panels = {
        "lead over plain RL\n(accuracy over the run)": {
            "cf-rl": lambda e: e.gap("cf-rl", "rl"),
            "its control": lambda e: e.gap("control", "rl"),
        },
        "the same, in parts of\nwhat plain RL leaves": {
            "cf-rl": lambda e: e.lead_of_rest("cf-rl"),
            "its control": lambda e: e.lead_of_rest("control"),
        },
        "cosine of features\nat the start": {
            "at the end of prompts": lambda e: e.values("sft", "cosine_prompt"),
            "within responses": lambda e: e.values("sft", "cosine_continuation"),
        },
    }
    colours = {"cf-rl": colour_of("cf-rl"), "its control": colour_of("control")}
    colours |= {"at the end of prompts": "#000000", "within responses": "#56b4e9"}
    with panels_in(path, len(panels), size=(8, 3.2)) as figure:
        for axes, (title, lines) in zip(figure, panels.items(), strict=True):
            for label, values in lines.items():
                colour = colours[label]
                for (width, layers), evidence in sizes.items():
                    seeds = values(evidence)
                    low, middle, high = (f(seeds) for f in (min, statistics.median, max))
                    bar = [[middle - low], [high - middle]]
                    fill, shift = ("none", 1.06) if layers != 2 else (colour, 1.0)
                    named = label if (width, layers) == (64, 2) else None
                    axes.errorbar(width * shift, middle, bar, fmt="o", color=colour, mfc=fill, capsize=3, label=named)
            axes.set(xscale="log", xlabel="features d", title=title)
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
            axes.set_xticks(sorted({width for width, _ in sizes}), sorted({width for width, _ in sizes}), minor=False)
            axes.minorticks_off()
            axes.title.set_size(10)
            axes.legend(frameon=False, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)


def token_axes(axes, tokens, colour="black"):
    """Ticks that read as tokens, with lines between responses; `tokens` are (response, position, text)."""
    axes.set_xticks(range(len(tokens)), [text for _, _, text in tokens], fontsize=9)
    axes.set_yticks(range(len(tokens)), [f"{text} @{t}" for _, t, text in tokens], fontsize=9)
    axes.tick_params(length=0)
    for edge in (i for i in range(1, len(tokens)) if tokens[i][0] != tokens[i - 1][0]):
        axes.axhline(edge - 0.5, color=colour, linewidth=0.6)
        axes.axvline(edge - 0.5, color=colour, linewidth=0.6)


def plot_influence(parts, labels, path, least=0.03):
    """Who teaches whom in one update (E10): through W, and through the body, N x N each. `labels` has a list of tokens
    for each response. Shown are the tokens that teach or learn: at least that part of the most that any does."""
    top = max(abs(value) for part in parts for row in part for value in row) or 1.0
    tokens = [(i, t, text) for i, response in enumerate(labels) for t, text in enumerate(response)]
    shown = [n for n in range(len(tokens)) if any(max(abs(p[n][m]), abs(p[m][n])) > least * top
                                                  for p in parts for m in range(len(tokens)))]  # fmt: skip
    with panels_in(path, 2, size=(8, 4.4)) as panels:
        for axes, part, title in zip(panels, parts, ("through W (R)", "through the body (G)"), strict=True):
            image = axes.imshow([[part[n][m] for m in shown] for n in shown], cmap="RdBu", norm=signed(top))
            token_axes(axes, [tokens[n] for n in shown])
            axes.set(title=title, xlabel="the token that changes")
        panels[0].set_ylabel("the sampled token that teaches")
        bar = axes.figure.colorbar(image, ax=list(panels), shrink=0.8)
        bar.set_label("change of log π in one step (nats)")


def signed(top):
    """Red for less, blue for more, and small values still visible."""
    from matplotlib.colors import SymLogNorm

    return SymLogNorm(top / 100, vmin=-top, vmax=top, base=10)


def plot_kernel(update, path):
    """How strongly R and G couple any two states of three responses, at the start."""
    from matplotlib.colors import PowerNorm

    labels = [update["labels"][row] for row in update["kernel_rows"]]
    tokens = [(i, t, text) for i, response in enumerate(labels) for t, text in enumerate(response)]
    blocks = dict(
        zip(("R: only like states are coupled", "G: all states are coupled"), update["kernels"][0], strict=True)
    )
    with panels_in(path, 2, size=(8, 5)) as panels:
        for axes, (title, block) in zip(panels, blocks.items(), strict=True):
            image = axes.imshow(block, cmap="magma", norm=PowerNorm(0.5, vmin=0, vmax=max(map(max, block))))
            token_axes(axes, tokens, "white")
            axes.set_title(title, fontsize=11)
            bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, location="bottom", label="norm of the V × V block")
            step = float(f"{max(map(max, block)) / 3:.1g}")
            bar.set_ticks([0, step / 4, step, 2 * step], labels=[f"{tick:g}" for tick in (0, step / 4, step, 2 * step)])


def plot_loop(path):
    """The method as a diagram: an update, and the updates of a run from left to right."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 27.5))
    axes.set_axis_off()

    def box(x, y, text, width, height=8, colour="#eef3f8"):
        axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.2", facecolor=colour, edgecolor="#444444"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(*ends):
        axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": "#444444"})

    steps = (
        "prompt\n47+85=",
        "a group of\nresponses",
        "verifier:\nreward 0 or 1",
        "better than\nthe group?",
        "gradient,\nstep",
    )
    for i, text in enumerate(steps):
        box(1 + 20.5 * i, 16, text, 15)
        if i:
            arrow((20.5 * i - 4, 20), (20.5 * i + 0.6, 20))
    axes.text(1, 26.3, "an update:", fontsize=9, va="center")
    axes.text(1, 10.6, "a run of CF-RL (its control: nothing rests):", fontsize=9, va="center")
    box(1, 0.6, "first n updates:\nW alone, at a high rate", 33, colour="#fbe3d6")
    box(38, 0.6, "all other updates: W and the body, at one rate", 60, colour="#d9e8f5")
    arrow((34.5, 4.6), (37.6, 4.6))
    figure.savefig(path, format="png", dpi=150)


def draw_run(config, out: Path, summary):
    """The pictures of one run, into its folder: curves.png, and kernel.png and influence.png of its first seed."""
    if summary:
        plot_curves(config, summary, out / "curves.png")
    if policy_file(out, "sft", config.seed).exists():
        update = closely(config, config.seed, *load_policy(config, out, "sft", config.seed))
        plot_kernel(update, out / "kernel.png")
        plot_influence(update["influence"], update["labels"], out / "influence.png")

"""The pictures, each drawn from a run's summary or from one_update.closely. matplotlib is needed here alone."""

import contextlib
import itertools
import statistics
from pathlib import Path

from experiments import order
from experiments.arms import CONSTANTS, arm_named
from experiments.one_update import closely
from experiments.runs import load_policy, policy_file
from experiments.speed import END
from experiments.verdicts import half_width

# Okabe and Ito's: safe for the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def plot_band(axes, xs, curves, label, style, colour):
    """The median over seeds of curves, one per seed, and a band from min to max."""
    by_x = list(zip(*curves, strict=True))
    axes.plot(xs, [statistics.median(ys) for ys in by_x], style, color=colour, label=label)
    axes.fill_between(xs, *([f(ys) for ys in by_x] for f in (min, max)), color=colour, alpha=0.2, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)


@contextlib.contextmanager
def panels_in(path, *shape, size=(10, 3)):
    """Panels to draw in, in rows and columns, or in a row; the figure is saved at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(*(shape if len(shape) == 2 else (1, *shape)))
    figure.savefig(path, format="png", dpi=150)


def plot_curves(config, summary, path):
    """Accuracy, entropy and the share of pattern s against updates."""
    panels = {"accuracy": "held-out accuracy", "entropy": "token entropy (nats)", "share_s": "share of pattern s"}
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
    panels = (("regime-1", "share_s"), ("regime-2", "share_s"), ("regime-1", "accuracy"))
    arms = dict.fromkeys(results["regime-2"][0].arm_list + results["regime-1"][0].arm_list)
    colours = dict(zip(arms, COLOURS, strict=False))  # one for an arm, in all panels
    with panels_in(path, len(panels)) as figure:
        for axes, (experiment, name) in zip(figure, panels, strict=True):
            config, summary = results[experiment]
            for arm in config.arm_list:
                if name == "accuracy" or "reward" not in arm_named(arm).rl:
                    curves = summary[arm]["curves"]
                    plot_band(axes, curves["step"][0], curves[name], arm, "-", colours[arm])
            label = "held-out accuracy" if name == "accuracy" else "share of pattern s"
            axes.set(xlabel="updates", ylabel=label, xlim=(0, config.rl_steps), title=experiment)
            axes.set(**({"yscale": "log"} if experiment == "regime-2" else {"ylim": (0, 1)}))
            axes.legend(frameon=False, fontsize=8, loc="center right" if experiment == "regime-2" else "best")


def plot_diversity(results, path):
    """pass@k against k, before and after RL, for each starting policy."""
    with panels_in(path, 2) as figure:
        for axes, experiment in zip(figure, ("confidence", "learning"), strict=True):
            _, summary = results[experiment]
            names = [name for name in summary["sft"] if name.startswith("best_of_")]
            shown = [arm for arm in ("sft", "rl", "cf-rl", "random-reward") if arm in summary]
            for colour, arm in zip(("#000000", *COLOURS), shown, strict=False):
                curves = list(zip(*(summary[arm][name] for name in names), strict=True))
                plot_band(axes, range(len(names)), curves, arm, ":" if arm == "sft" else "-", colour)
            axes.set(xlabel="k samples", ylabel="pass@k on held-out prompts", title=experiment, ylim=(0, 1.02))
            axes.set_xticks(range(len(names)), [2**i for i in range(len(names))])
            axes.legend(frameon=False, loc="lower right")


def plot_order(maps, path):
    """At the end of the run, cf-rl minus the arms with its rates, in every cell of the map: a panel for each start."""
    with panels_in(path, len(maps), size=(10, 3.6)) as panels:
        for axes, (title, (config, summary)) in zip(panels, maps.items(), strict=True):
            axes.axvline(0, color="#999999", linewidth=0.8)
            for shift, (base, colour) in enumerate(zip(order.BASES, COLOURS, strict=False)):
                for y, cell in enumerate(config.cells):
                    gaps = END.gaps(config, summary, order.arm_at(order.CF_RL, cell), order.arm_at(base, cell))
                    named = f"minus {base}" if not y else None
                    bar = dict(xerr=half_width(gaps), fmt="o", color=colour, capsize=3, label=named)
                    axes.errorbar(statistics.fmean(gaps), y + (shift - 1) / 5, **bar)
            axes.set_yticks(range(len(config.cells)), [f"n = {n}, {multiple:g}×" for n, multiple in config.cells])
            axes.set(title=title, xlabel="accuracy at the end: CF-RL minus another order")
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def plot_knobs(results, path):
    """What a constant feature changes, and what it does not: rise of top-1 and accuracy by SGD, W at one rate and at
    one that keeps the trace of R."""
    panels = {"confidence_change": "rise of top-1 on fixed states", "accuracy": "held-out accuracy, update 40"}
    with panels_in(path, 2, 2, size=(10, 6)) as figure:
        for row, (way, title) in zip(
            figure, {"fast-classifier": "everything trained", "classifier-only": "W alone"}.items(), strict=True
        ):
            for axes, (name, label) in zip(row, panels.items(), strict=True):
                for (experiment, judge), colour in zip(
                    {"variability-sgd": "verifier", "variability-coins-sgd": "coin flips"}.items(),
                    COLOURS,
                    strict=False,
                ):
                    _, summary = results[experiment]
                    for kept, style in ((False, "o-"), (True, "s:")):
                        arms = [f"{way}-40x1"] + [
                            f"{way}-40x{multiple if kept else 1:.4g}@s{s}" for s, multiple in CONSTANTS.items()
                        ]
                        values = [summary[arm][name] for arm in arms]
                        named = f"{judge}, R's trace kept" if kept else f"{judge}, same rate"
                        means, bars = [statistics.fmean(v) for v in values], [half_width(v) for v in values]
                        axes.errorbar((0, *CONSTANTS), means, bars, fmt=style, color=colour, capsize=3, label=named)
                axes.set(title=title, ylabel=label, xlabel="constant feature, in |φ|")
                axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


def plot_sizes(sizes, path):
    """Leads, also in parts of what plain RL leaves, and how alike features are, against the policy's width.
    `sizes` holds claims.Evidence by (width, layers); what has other than two layers is hollow."""
    panels = {
        "lead over plain RL (accuracy over the run)": {
            "cf-rl": lambda e: e.gap("cf-rl", "rl"),
            "its control": lambda e: e.gap("control", "rl"),
        },
        "the same, of what plain RL leaves": {
            "cf-rl": lambda e: e.lead_of_rest("cf-rl"),
            "its control": lambda e: e.lead_of_rest("control"),
        },
        "mean cosine of features, at the start": {
            "at the end of prompts": lambda e: e.values("sft", "cosine_prompt"),
            "within responses": lambda e: e.values("sft", "cosine_continuation"),
        },
    }
    with panels_in(path, len(panels)) as figure:
        for axes, (title, lines) in zip(figure, panels.items(), strict=True):
            for colour, (label, values) in zip(COLOURS, lines.items(), strict=False):
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


def token_axes(axes, labels, colour="black"):
    """Ticks that read as responses, with positions on the left and lines between; `labels` has a list for each."""
    tokens = [token for response in labels for token in response]
    numbered = [f"{token} @{t}" for response in labels for t, token in enumerate(response)]
    axes.set_xticks(range(len(tokens)), tokens, fontsize=7)
    axes.set_yticks(range(len(tokens)), numbered, fontsize=6)
    axes.tick_params(length=0)
    for edge in itertools.accumulate(len(response) for response in labels[:-1]):
        axes.axhline(edge - 0.5, color=colour, linewidth=0.6)
        axes.axvline(edge - 0.5, color=colour, linewidth=0.6)


def plot_influence(update, path):
    """Who teaches whom in one update (E10): through W, and through the body."""
    top = max(abs(value) for part in update["influence"] for row in part for value in row) or 1.0
    with panels_in(path, 2, size=(10, 5)) as panels:
        for axes, part, title in zip(
            panels, update["influence"], ("through W (R)", "through the body (G)"), strict=True
        ):
            image = axes.imshow(part, cmap="RdBu", norm=signed(top))
            token_axes(axes, update["labels"])
            axes.set(title=title, xlabel="the token that changes", ylabel="the sampled token that teaches")
        bar = axes.figure.colorbar(image, ax=list(panels), shrink=0.8)
        bar.set_label("change of log π in one step (nats)")


def signed(top):
    """Red for less, blue for more, and small values still visible."""
    from matplotlib.colors import SymLogNorm

    return SymLogNorm(top / 100, vmin=-top, vmax=top, base=10)


def plot_kernel(update, path):
    """How strongly R and G couple any two states of three responses, at the start and after stage 1."""
    from matplotlib.colors import PowerNorm

    labels = [update["labels"][row] for row in update["kernel_rows"]]
    (R, G), (_, G_after) = update["kernels"]  # stage 1 leaves the features, hence R, as they are
    top = max(map(max, G_after + G))
    blocks = {
        "R: the same before and after stage 1": (R, None),
        "G at the start": (G, PowerNorm(0.5, vmin=0, vmax=top)),
        "G after stage 1": (G_after, PowerNorm(0.5, vmin=0, vmax=top)),
    }
    with panels_in(path, 3, size=(10, 4.3)) as panels:
        for axes, (title, (block, norm)) in zip(panels, blocks.items(), strict=True):
            image = axes.imshow(block, cmap="magma", norm=norm)
            token_axes(axes, labels, "white")
            axes.set_title(title, fontsize=10)
            bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, location="bottom", label="norm of the V x V block")
            if norm:
                bar.set_ticks([0, top / 4, top], labels=["0", f"{top / 4:.0f}", f"{top:.0f}"])


def plot_loop(path):
    """The method as a diagram."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(10, 2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(-3.5, 17))
    axes.set_axis_off()

    def box(x, y, text, width=14, height=8, colour="#eef3f8"):
        axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.2", facecolor=colour, edgecolor="#444444"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(*ends, **style):
        axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": "#444444", **style})

    steps = (
        "prompt\n47+85=",
        "a group of\nresponses",
        "verifier:\nrewards 0 or 1",
        "advantages:\nbetter than\nthe group?",
    )
    for i, text in enumerate(steps):
        box(1 + 20 * i, 5, text)
        if i:
            arrow((20 * i - 4.6, 9), (20 * i + 0.6, 9))
    box(82, 9.6, "stage 1: gradient\nof W alone", width=17, height=6.4, colour="#fbe3d6")
    box(82, 0.8, "stage 2: gradient\nof W and the body", width=17, height=6.4, colour="#d9e8f5")
    arrow((75.4, 10), (81.6, 12.8))
    arrow((75.4, 8), (81.6, 4))
    arrow((99, -1), (28, 4.6), connectionstyle="angle,angleA=0,angleB=90,rad=4")
    axes.text(60, -2.4, "the changed policy samples the next batch", ha="center", va="center", fontsize=9)
    figure.savefig(path, format="png", dpi=150)


def draw_run(config, out: Path, summary):
    """The pictures of one run, into its folder: curves.png, and kernel.png and influence.png of its first seed."""
    if summary:
        plot_curves(config, summary, out / "curves.png")
    if policy_file(out, "sft", config.seed).exists():
        update = closely(config, config.seed, *load_policy(config, out, "sft", config.seed))
        plot_kernel(update, out / "kernel.png")
        plot_influence(update, out / "influence.png")

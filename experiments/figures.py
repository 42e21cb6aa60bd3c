"""The pages' pictures, drawn from the experiments' runs and from one update."""

import contextlib
import statistics

from experiments.claims import SETTINGS, speed_up

# Okabe and Ito's colours, safe for the colour-blind.
BLUE, RED, GREEN, ORANGE, GREY = "#0072b2 #d55e00 #009e73 #e69f00 #999999".split()


def plot_curves(axes, runs, arm, label, colour):
    """The median over seeds of an arm's accuracy, and a band that holds the middle half of them."""
    by_look = list(zip(*(runs.curve(arm, seed) for seed in runs.score(arm, "run")), strict=True))
    low, middle, high = zip(*(statistics.quantiles(ys, n=4, method="inclusive") for ys in by_look), strict=True)
    axes.plot(runs.x.looks, middle, color=colour, label=label)
    axes.fill_between(runs.x.looks, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)


@contextlib.contextmanager
def panels_in(path, count, size=(8, 3.2)):
    """Panels to draw in, side by side; the figure is saved at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(1, count)
    figure.savefig(path, format="png", dpi=150)


def plot_answer(results, path):
    """Accuracy against updates, from each start: does it help that W comes first, alone?"""
    with panels_in(path, len(SETTINGS), size=(8, 3.4)) as panels:
        for axes, (name, (title, control, _)) in zip(panels, SETTINGS.items(), strict=True):
            runs = results[name]
            plot_curves(axes, runs, "classifier-last", "W last, alone", GREY)
            plot_curves(axes, runs, "rl", "plain RL", BLUE)
            plot_curves(axes, runs, "cf-rl", "CF-RL (W first, alone)", RED)
            plot_curves(axes, runs, control, "control (nothing frozen)", GREEN)
            plot_curves(axes, runs, "fast-classifier", "W fast throughout", ORANGE)
            axes.axvline(runs.x.n, color="#555555", linestyle=":")
            axes.set(title=title, xlabel="updates", xlim=(0, runs.x.rl_steps), ylim=(0, 1))
        panels[0].set_ylabel("accuracy: median, middle half of the seeds")
        panels[0].legend(fontsize=8, loc="lower right", framealpha=1, edgecolor="none")


def plot_foretold(runs, starts, path):
    """How much sooner W fast is: foretold against measured. Within the band the two differ by less than a factor of
    two; what lies outside has its name."""
    with panels_in(path, 1, size=(7, 4)) as axes:
        axes.fill_between((0, 8), (0, 4), (0, 16), color=BLUE, alpha=0.1, linewidth=0)
        for start in starts:
            told, speed = speed_up(runs, start)
            axes.plot(told, speed, "o", color=ORANGE if start == "SmolLM2" else BLUE)
            if not told / 2 <= speed <= told * 2:
                axes.annotate(start, (told, speed), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(xlabel="speed-up of W fast, foretold", ylabel="and measured", xlim=(0, 8), ylim=(0, 9))


def token_axes(axes, tokens):
    """Ticks that read as tokens, with lines between responses; `tokens` are (response, position, text)."""
    axes.set_xticks(range(len(tokens)), [text for _, _, text in tokens], fontsize=9)
    axes.set_yticks(range(len(tokens)), [f"{text} @{t}" for _, t, text in tokens], fontsize=9)
    axes.tick_params(length=0)
    for edge in (i for i in range(1, len(tokens)) if tokens[i][0] != tokens[i - 1][0]):
        axes.axhline(edge - 0.5, color="black", linewidth=0.6)
        axes.axvline(edge - 0.5, color="black", linewidth=0.6)


def plot_influence(parts, labels, path, least=0.03):
    """Who teaches whom in one update (E10): through W, and through the body, N x N each. Shown are tokens that teach
    or learn: at least that part of the most that any does."""
    from matplotlib.colors import SymLogNorm

    top = max(abs(value) for part in parts for row in part for value in row) or 1.0
    tokens, some = [(i, t, text) for i, row in enumerate(labels) for t, text in enumerate(row)], least * top
    shown = [
        n for n in range(len(tokens)) if any(abs(v) > some for p in parts for v in (*p[n], *(row[n] for row in p)))
    ]
    norm = SymLogNorm(top / 100, vmin=-top, vmax=top, base=10)  # small values are still visible
    with panels_in(path, 2, size=(8, 4.4)) as panels:
        for axes, part, title in zip(panels, parts, ("through W (R)", "through the body (G)"), strict=True):
            image = axes.imshow([[part[n][m] for m in shown] for n in shown], cmap="RdBu", norm=norm)
            token_axes(axes, [tokens[n] for n in shown])
            axes.set(title=title, xlabel="the token that changes")
        panels[0].set_ylabel("the sampled token that teaches")
        bar = axes.figure.colorbar(image, ax=list(panels), shrink=0.8)
        bar.set_label("change of log π in one step (nats)")

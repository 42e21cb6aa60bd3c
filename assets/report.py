"""Draw the README's figure and write its numbers, from the results of a run: python assets/report.py DIR

Nothing between the README's `report` marks is typed by hand: this command writes it, and a test writes it again.
"""

import statistics


def plot_curves(config, summary, path):
    """Accuracy, entropy and the share of pattern S against updates: the mean over seeds, and a band from min to max."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = {"accuracy": "held-out accuracy", "entropy": "token entropy (nats)", "share_S": "share of pattern S"}
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]  # Okabe and Ito's: safe for the colour-blind
    for axes, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for colour, arm in zip(colours, (arm for arm in config.arms if arm in summary), strict=False):
            curves = summary[arm]["curves"]
            by_step = list(zip(*curves[name], strict=True))
            steps, means = curves["step"][0], [statistics.fmean(values) for values in by_step]
            axes.plot(steps, means, color=colour, label=arm)
            axes.fill_between(
                steps, [min(v) for v in by_step], [max(v) for v in by_step], color=colour, alpha=0.2, lw=0
            )
        axes.set(xlabel="updates", ylabel=label, xlim=(0, config.rl_steps), ylim=(0, None if name == "entropy" else 1))
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)

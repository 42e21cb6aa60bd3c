"""Write the pages' numbers and draw their pictures from the experiments' runs: python -m experiments report [DIR ...]

Between a page's `report` marks nothing is typed by hand: this command writes it from results.json, its own copy of the
runs' configurations and summaries, and a test checks that it would write the same again. Without a DIR it works from
the copy: after a change of the code.
"""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from experiments import claims, figures, order, real_model, speed, tables
from experiments.arms import EXPERIMENTS, Config, arm_named
from experiments.measures import MOVES, moves
from experiments.one_update import closely
from experiments.predictors import RATES, SAMPLES, overlap, rank_correlation, shares_over
from experiments.real_model import ALL_FAST, FAST, OFFSET, W_ALONE, RealConfig
from experiments.runs import load_policy, read_config, write_text
from experiments.tables import at, over_seeds
from minicfrl import Addition
from model import check
from train_toy import stream

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results.json"
LABORATORY = tuple(sorted(path.relative_to(ROOT).as_posix() for path in HERE.glob("*.py")))


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


# The parts of the toy as SmolLM2's parameters are called, in which a block in the middle has no counterpart there.
REAL_PARTS = {"shift": OFFSET, "norm": "body.base.norm", "embeddings": "body.base.embed_tokens"}
REAL_PARTS |= {f"{name} block": f"body.base.layers.{i}" for name, i in {"last": 29, "middle": 15, "first": 0}.items()}


def reached(e, part):
    """The rate at which a part was trained alone, and the accuracy at the end."""
    return [f"{e.arm_alone(part).rpartition('x')[2]}×", e.alone(part)]


def reach_table(starts, real):
    """What each part gets alone, at the end, and in the toy first in W's place, over the run against plain RL: a
    claims.Evidence for each start of the toy, and one of SmolLM2."""
    parts = [arm.partition("-only")[0] for arm in starts[0].config.arm_list if "-only-" in arm]
    rows = [["part", *["rate", "alone, at the end", "first, minus plain RL, over the run"] * len(starts)]]
    for part in parts:
        rows.append([part.replace("-", " ")])
        for e in starts:
            arm, said = e.arm_alone(part), ""
            first = arm.replace("classifier-only-80", "cf-rl-20").replace("-only-80", "-first-20")
            if first in e.summary:
                gaps = over_seeds(speed.OVER_THE_RUN.gaps(e.config, e.summary, first, "rl"), "+.3f")
                said = f"{gaps}: {speed.OVER_THE_RUN.said(e.config, e.summary, first, 'rl', len(parts) - 1)}"
            rows[-1] += [*reached(e, part), said]
    rows.insert([row[0] for row in rows].index("first block"), ["middle block", *[""] * 3 * len(starts)])
    rows[0] += ["in SmolLM2: rate", "alone, at the end"]
    for row in rows[1:]:
        match row[0]:
            case "scattered":
                row += ["", ""]
            case "everything":
                row += ["1×", real.of("rl", "accuracy")]
            case part:
                row += reached(real, REAL_PARTS.get(part, part))
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
    rows = [["constant", "rate of W", "mean cosine", *VARIABILITY.values()]]
    config, first = results["variability-sgd"]
    for arm in (arm for arm in config.arm_list if arm.startswith("fast-classifier")):
        multiple, size = re.fullmatch(r".+-40x([0-9.]+)(?:@s(.+))?", arm).groups()
        rows.append([size or "0", multiple])
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


def accounts(results):
    """Four ways to count what CF-RL's stage 1 costs, from both starts."""
    (heading, *rows), (_, *others) = (order.accounting_table(*results[name]) for name in SPEEDS)
    named = [[f"{when}{row[0]}", *row[1:]] for when, each in (("", rows), ("cannot add yet: ", others)) for row in each]
    return markdown(heading, *named)


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


REAL_ASKED = (
    *((arm, "rl") for arm in ("cf-rl", "control", FAST)),
    *(("cf-rl", base) for base in ("control", "classifier-last", FAST)),
)
REAL_ASKED_AGAIN = (("cf-rl", "rl"), ("cf-rl", "classifier-last"))
REAL_ASKED_LATER = (
    *((arm, "rl") for arm in ("cf-rl-8x200", W_ALONE, *ALL_FAST, "random-reward")),
    *((arm, FAST) for arm in ALL_FAST),
)
REAL_COLUMNS = (
    *tables.MICROSCOPE[:3],
    ("features moved", "feature_change", ".2f"),
    ("W moved", "W_moved", ".2%"),
    ("body moved", "body_moved", ".3%"),
)


def real_arms(config, summary):
    """Each arm by each yardstick, and what became of the policy."""
    heading, *rows = speed.arms_table(config, summary)
    yield heading + [name for name, _, _ in REAL_COLUMNS]
    for arm, row in zip(config.arm_list, rows, strict=True):
        yield row + [tables.cell(summary[arm], *column) for _, *column in REAL_COLUMNS]


def machines_table(results):
    """SmolLM2's comparisons: the first yardstick on either machine and on fresh seeds, then all on the runs of both
    machines. What only one machine ran is asked apart."""
    machines = {"CPU": "real", "GPU": "real-gpu", "both": "real-both"}
    cpu, gpu, both = (speed.compared_table(*results[name], REAL_ASKED) for name in machines.values())
    fresh = {row[0]: row[1] for row in speed.compared_table(*results["real-again"], REAL_ASKED_AGAIN)}
    seeds = [f"{cpu[0][1]}: {machine}, {results[name][0].seeds} seeds" for machine, name in machines.items()]
    yield ["", *seeds, "on fresh seeds", *both[0][2:]]
    for one, other, whole in zip(cpu[1:], gpu[1:], both[1:], strict=True):
        yield [*one[:2], other[1], whole[1], fresh.get(one[0], ""), *whole[2:]]
    for one in speed.compared_table(*results["real"], REAL_ASKED_LATER)[1:]:
        yield [*one[:2], "", "", "", *one[2:]]


def together(first, second):
    """Runs of one experiment on two machines as one run: arms have the seeds of both, the second's counted on. Random
    numbers differ between machines, so no two are the same run."""
    (config, summary), (other, more) = first, second

    def joined(ours, theirs):
        if isinstance(ours, dict):
            return {name: joined(values, theirs[name]) for name, values in ours.items()}
        return ours + theirs

    counted = {arm: row | {"seed": [seed + config.seeds for seed in row["seed"]]} for arm, row in more.items()}
    rows = {arm: joined(row, counted[arm]) if arm in counted else row for arm, row in summary.items()}
    return replace(config, seeds=config.seeds + other.seeds), rows


def tuning_rows(config, summary):
    """Mean accuracy over the run of cf-rl and of W fast throughout, at each rate of W tried."""
    rows = [["rate of W, in multiples of plain RL's", *(f"{multiple}×" for multiple in real_model.MULTIPLES)]]
    for way, arms in itertools.groupby(config.arm_list, lambda arm: arm.rpartition("x")[0]):
        rows.append([f"`{way.rpartition('-')[0]}`", *(over_seeds(summary[arm][tables.RUN], ".3f") for arm in arms)])
    return rows


PREDICTORS = ("R + G", "R alone", "hidden states")


def predictor_rows(found):
    """How well each predictor ranks the groups by what one step did: rank correlation, and the ten helped least."""
    rows, groups = (
        [["predictor", *(f"{kind}: {what}" for kind in RATES for what in ("rank", "least ten"))]],
        found["groups"],
    )
    for what in PREDICTORS:
        rows.append([what])
        for kind in RATES:
            pair = groups[f"{kind}, {what}"], groups[f"{kind}, measured"]
            rows[-1] += [rank_interval(*pair), f"{overlap(*pair)} of 10"]
    return [*rows, ["chance", *["0", f"{100 / len(pair[0]):.1f} of 10"] * len(RATES)]]


def rank_interval(x, y):
    """The rank correlation with its 95% interval, by Fisher's transformation: over groups, not over seeds."""
    r, half = rank_correlation(x, y), 1.96 / math.sqrt(len(x) - 3)
    low, high = (math.tanh(math.atanh(min(r, 1 - 1e-9)) + sign * half) for sign in (-1, 1))
    return f"{r:.2f} ({low:.2f} to {high:.2f})"


def share_rows(found):
    """R's share of the first effect of a step, in the toy over seeds and in SmolLM2 over batches."""
    rows = [["R's share of a step's effect", *(f"{kind}, {when}" for kind in RATES for when in ("start", "end"))]]
    for name, shares in {"toy": found["toy"], "SmolLM2": found["shares"]}.items():
        rows.append([name, *(over_seeds(shares[when][kind], ".1%") for kind in RATES for when in ("start", "end"))])
    return rows


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


def prediction_table(update, prefix=""):
    """What (E7), or for Adam (E8), said of the patterns' probabilities, and what happened."""
    rows = [["pattern", "before", "through W (R)", "through the body (G)", "together", "what happened"]]
    columns = ["probabilities", *(f"{prefix}{name}" for name in ("by_R", "by_G", "after"))]
    for pattern, before, by_R, by_G, after in zip(Addition.patterns, *(update[name] for name in columns), strict=True):
        rows.append([pattern, f"{before:.4f}", *(f"{value:+.4f}" for value in (by_R, by_G, by_R + by_G, after))])
    if not prefix:
        rows[0].append("with W alone")
        for row, after in zip(rows[1:], update["after_W"], strict=True):
            row.append(f"{after:+.4f}")
    return markdown(*rows)


def sections(results, update, found):
    """{name of a report mark: what the pages say there}."""
    config, summary = results["confidence"]
    real_parts = results["real-both"][1] | results["real-parts"][1]
    rl = [arm for arm in config.arm_list if "reward" not in arm_named(arm).rl]
    learnt = {arm: summary[arm] for arm in rl}
    robust = {"as in `speed`": results["speed"]} | {n: r for n, r in results.items() if n.startswith("robust-")}
    learning = results["learning"]
    return {
        "answer": markdown(*claims.answers(results), align="---"),
        "side by side": markdown(*claims.side_by_side(results), align="---"),
        "claims": markdown(*claims.rows(results), align="---"),
        "predictors": markdown(*predictor_rows(found)),
        "shares": markdown(*share_rows(found)),
        "group": group_table(update),
        "classifier rows": classifier_rows_table(update),
        "prediction": prediction_table(update),
        "adam": prediction_table(update, "adam_"),
        "table": markdown(*tables.table(summary)),
        "learning": markdown(*tables.table(learning[1])),
        "selection": markdown(*tables.table(learnt, tables.SELECTION)),
        "dip": dip_table(*results["regime-2"]),
        "rlif": markdown(*tables.table(results["rlif"][1])),
        "classifier": classifier_table(*results["classifier"]),
        "lp-ft": lp_ft_table(*results["lp-ft"]),
        "real arms": markdown(*real_arms(*results["real-both"])),
        "real compared": markdown(*machines_table(results)),
        "real tuning": markdown(*tuning_rows(*results["real-tuning"])),
        **{
            f"{name} again": markdown(
                *speed.compared_table(*results[f"{name}-again"], order.asked_again(order.tuned(*results[name])))
            )
            for name in MAPS
        },
        **{f"{name} compared": markdown(*speed.compared_table(*results[name])) for name in SPEEDS},
        "accounts": accounts(results),
        "parts reached": markdown(
            *reach_table(
                [claims.Evidence(results, f"parts{start}") for start in ("", "-learning")],
                claims.Evidence({"": (results["real"][0], real_parts)}, ""),
            )
        ),
        "variability": markdown(*constant_table(results)),
        "scale": markdown(*scale_table(claims.Evidence(results, "scale"))),
        "robust": markdown(*speed.robust_table(robust)),
        "sizes": markdown(*size_table(results)),
    }


ANSWER_TITLES = {"speed": "Toy: W that learns fast is what helps", "real-both": "SmolLM2: stage 1 is lost time"}
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
    """{experiment: (its Config, its summary)}, with real-both; one update of the first one's starting policy, looked at
    closely; and what predictors.py found, with R's shares in the toy."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = runs.pop("predictors") | {"toy": runs["confidence"]["shares"]}
    kinds = {name: RealConfig if name in real_model.EXPERIMENTS else Config for name in runs}
    results = {name: (kinds[name](**run["config"]), run["summary"]) for name, run in runs.items()}
    results["real-both"] = together(results["real"], results["real-gpu"])
    return results, runs["confidence"]["update"], found


def main(folders):
    """ValueError, before anything is written, for a folder that holds none of the experiments."""
    import matplotlib  # noqa: F401  fails before anything is written

    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    experiments = {Config(**flags): name for name, flags in EXPERIMENTS.items()}
    experiments |= {RealConfig(**flags): name for name, flags in real_model.EXPERIMENTS.items()}
    for out in map(Path, folders):
        if out.suffix == ".json":
            stored["predictors"] = rounded(json.loads(out.read_text(encoding="utf-8")))
            continue
        check((out / "summary.json").exists(), f"{out} is not the folder of a finished run")
        try:
            record, config = read_config(out)
        except ValueError:
            record, config = read_config(out, RealConfig)
        check(config in experiments, f"{out} holds none of the experiments {', '.join(experiments.values())}")
        record["summary"] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        if config.measures == "accuracy":
            record["summary"] = without_the_rest(record["summary"])
        if experiments[config] == "confidence":
            for arm, row in record["summary"].items():
                moved = [moved_in(config, out, arm, int(seed)) for seed in row["seed"]]
                row |= {name: [each[name] for each in moved] for name in MOVES}
            record["shares"] = {
                when: shares_in(config, out, arm) for when, arm in {"start": "sft", "end": "rl"}.items()
            }
            record["update"] = rounded(closely(config, config.seed, *load_policy(config, out, "sft", config.seed)))
        stored[experiments[config]] = record
    write_text(RESULTS, json.dumps(stored) + "\n")
    results, update, found = load_results()
    answer = {title: claims.Evidence(results, name) for name, title in ANSWER_TITLES.items()}
    figures.plot_answer(answer, HERE / "curves.png")
    figures.plot_diversity(results, HERE / "diversity.png")
    figures.plot_patterns(results, HERE / "patterns.png")
    figures.plot_kernel(update, HERE / "kernel.png")
    figures.plot_influence(update["influence"], update["labels"], HERE / "influence.png")
    figures.plot_loop(HERE / "loop.png")
    figures.plot_sizes(sizes(results), HERE / "sizes.png")
    figures.plot_knobs(results, HERE / "knobs.png")
    figures.plot_order({title: results[name] for name, title in MAPS.items()}, HERE / "order.png")
    group = found["group"]
    named = [(text.strip() or ".", row) for text, row in zip(group["tokens"], group["rows"], strict=True)]
    labels = [[text for text, of in named if of == row] for row in range(SAMPLES)]
    parts = [[[RATES["sgd"] / len(named) * value for value in row] for row in group[part]] for part in "RG"]
    figures.plot_influence(parts, labels, HERE / "real_influence.png")
    for page, text in rewritten(sections(results, update, found)).items():
        write_text(page, text)


def moved_in(config, out, arm, seed):
    """measures.moves, of a finished run's policy."""
    (_, start), (_, model) = (load_policy(config, out, each, seed) for each in ("sft", arm))
    return moves(model, list(start.parameters()))


def shares_in(config, out, arm):
    """R's share in a batch of each seed's policy (predictors.py)."""
    seeds = [seed for seed, _ in config.jobs(arm)]
    policies = [load_policy(config, out, arm, seed)[1] for seed in seeds]
    return shares_over(policies, Addition(config.digits), config, [stream(seed, "predictors") for seed in seeds])


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

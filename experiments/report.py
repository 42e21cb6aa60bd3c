"""Write the pages' numbers and draw their pictures from data/: python -m experiments report [DIR ...]

A DIR is the folder of a run, whose scores go into data/ first. Between a page's `report` marks nothing is typed by
hand: this command writes it, and a test checks that it would write the same again.
Verdicts that pages put in words are in claims.PAPERS and PINS: if the data contradict one, no page is written.
"""

import importlib.util
import json
import re
from pathlib import Path

from experiments import arms, claims, figures, one_update, real_model, scores
from experiments.runs import missing, read_record, record_of, write_whole
from experiments.scores import END, RUN, Measure, closely, compared, markdown, means, never, speed, time_to
from model import check

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", *(HERE / f"{name}.md" for name in ("results", "one_update", "foretell")))
EXPERIMENTS = arms.EXPERIMENTS | real_model.EXPERIMENTS


# ------------------------------------------------------------------------------------------- columns, and comparisons


ACCURACY = Measure("accuracy", "accuracy", ".2f")
COLUMNS = (
    ACCURACY, Measure("greedy", "greedy", ".2f"), Measure("pass@8", "best_of_8", ".2f"),
    Measure("entropy", "entropy"), Measure("top-1", "confidence"),
    Measure("share of s", "share_s", ".2f"),
)  # fmt: skip
SELECTION = (
    Measure("by shares", "gain_by_shares", "+.2f"), Measure("by success", "gain_by_success", "+.2f"),
    Measure("KL", "kl", ".2f"), Measure("KL, 1st token", "kl_first", ".2f"),
    Measure("1st changed", "changed_first", ".0%"), Measure("later changed", "changed_later", ".1%"),
    Measure("success of s, start", "success_s@0", ".2f"), Measure("end", "success_s", ".2f"),
)  # fmt: skip
ALIKE = (
    Measure("mean cosine", "cosine_continuation", ".2f"), Measure("top-1 rises by", "confidence_change", "+.3f"),
    ACCURACY, Measure("entropy", "entropy", ".2f"),
)  # fmt: skip
OF_G = (
    Measure("G through W, start = 1", "kernel_G_by_W@n", ".2f"), Measure("accuracy, update 20", "accuracy@n", ".2f"),
    Measure("update 80", "accuracy", ".2f"),
)  # fmt: skip
MARKS = (
    Measure("norm of W, start", "classifier_norm@0", ".2f"), Measure("end", "classifier_norm", ".2f"),
    Measure("features moved", "feature_change", ".2f"), ACCURACY, Measure("answers", "different_answers", ".1f"),
)  # fmt: skip
MOVED = (
    Measure("top-1 rises by", "confidence_change"), Measure("through W", "confidence_by_W"),
    Measure("through the body", "confidence_by_body"), Measure("features moved", "feature_change", ".2f"),
    Measure("W moved", "W_moved", ".2%"), Measure("body moved", "body_moved", ".3%"),
)  # fmt: skip
BOTH = (
    Measure("positive inner products", "positive_continuation@0", ".0%"),
    Measure("mean cosine", "cosine_continuation@0", ".2f"), Measure("R's cosine", "agreement_continuation", ".2f"),
)  # fmt: skip
DIVERSITY = [Measure(f"pass@{k}", f"best_of_{k}", ".2f") for k in (1, 8, 64)]
DIVERSITY += [Measure("answers in 64", "different_answers", ".1f")]
REGIMES = (
    Measure("share of s, start", "share_s@0"), Measure("lowest", claims.lowest), Measure("end", "share_s"),
    Measure("accuracy, start", "accuracy@0", ".2f"), Measure("end", "accuracy", ".2f"),
)  # fmt: skip
THROUGH_W = Measure("through W", claims.row(lambda r: r["confidence_by_W"] / r["confidence_change"]), ".0%")
SCALED = [f"{arm}{a}" for arm in ("rl-sgd", "rl") for a in ("@a0.5", "", "@a2")]
SHOWN = "sft rl cf-rl control rl-sgd random-reward random-reward-sgd".split()
REAL_SHOWN = ("rl", "cf-rl", "control", "fast-classifier")


TOKENS = ("rl", "ft", "random-reward")
KNOWN = [Measure(name, name, ".2f") for name in "right rho5 rho10 rho20 plain20 snr20 by_first".split()]
CAME = [Measure("rate", "rate", "g"), *(Measure(n, n, ".2f") for n in "plain fast ahead plain_end fast_end".split())]
JUDGED, SIZES = [*arms.STARTS][:16], [*arms.STARTS][16:]  # starts that the rule judges, and sizes of a batch
STARTS = (*JUDGED, *SIZES, "SmolLM2")


# ------------------------------------------------------------------------------------------------- tables of their own


def of_states(whose):
    """What training did at the states of one policy's responses."""
    columns = {"top tenth's KL": ("top_tenth", ".0%"), "KL": ("kl", ".2f"), "changed": ("changed", ".0%")}
    columns |= {f"changed: {kind}": (f"changed_{kind}", ".0%") for kind in ("digit", "newline")}
    return [Measure(heading, claims.as_accurate(f"{whose}_{name}"), form) for heading, (name, form) in columns.items()]


def never_rows(results):
    """Which runs never get to the threshold, and count with all their updates: a column for each experiment."""
    rows = []
    for name, runs in results.items():
        ways = {arm.name: never(runs, arm.name) for arm in runs.x.arms}
        named = "; ".join(f"`{way}`: {', '.join(map(str, seeds))}" for way, seeds in ways.items() if seeds)
        rows.append([f"`{name}`, {runs.x.threshold:g}", named or "none"])
    return [list(column) for column in zip(*rows, strict=True)]


def beside(*tables):
    """Tables whose rows belong together as one; the first names the rows."""
    return [rows[0] + [cell for row in rows[1:] for cell in row[1:]] for rows in zip(*tables, strict=True)]


def named(name, rows):
    """A table whose rows say of which experiment they are."""
    return [rows[0]] + [[f"{name}: {row[0]}", *row[1:]] for row in rows[1:]]


def came(runs):
    """What came of each start, and what was foretold."""
    told = [[start, *(f"{times:.1f}" for times in claims.speed_up(runs, start))] for start in STARTS]
    return beside(means(runs, CAME, STARTS), [["arm", "foretold", "measured"], *told])


def peaks(runs):
    """What rewards of the policy's own sureness do to accuracy up to the peak and after it; halves exchanged."""
    judges = [(arm.name, "") for arm in runs.x.arms if "reward" in arm.rl]
    return compared(runs, claims.PEAK + claims.EXCHANGED, judges, len(claims.PEAK))


# --------------------------------------------------------------------------------------------------------- the pages


def sections(R, update):
    """{name of a report mark: what the pages show there}, from {experiment: runs}."""
    columns = {name: speed(R[name].x, 0.1 if name.startswith("real") else 0.05) for name in claims.ASKED}
    columns |= {name: closely(R[name].x) for name in claims.AGAIN}
    columns |= {name: closely(R[name].x)[1:] for name in claims.POOLED}
    tables = {name: compared(R[name], columns[name], asked) for name, asked in claims.ASKED.items()}
    few = ("sft", "rl", "cf-rl", "classifier-only")
    tables |= {
        "answer": claims.answers(R),
        "known": means(R["foretell"], KNOWN, STARTS),
        "came": came(R["foretell"]),
        "foretell": [*claims.foretellers(R["foretell"], JUDGED, ("1000 updates", *SIZES))],
        "never": never_rows({name: R[name] for name in ("best", "best-learning", *claims.AGAIN)}),
        "claims": claims.papers(R),
        "confidence": means(R["confidence"], COLUMNS, SHOWN),
        "selection": means(R["confidence"], SELECTION, ("rl", "cf-rl", "rl-sgd")),
        "learning": beside(means(R["confidence"], DIVERSITY, few), means(R["learning"], DIVERSITY, few)),
        "regimes": named("1", means(R["regime-1"], REGIMES)) + named("2", means(R["regime-2"], REGIMES))[1:],
        "peaks": named("d is rare", peaks(R["regime-1"])) + named("toy 1", peaks(R["rlif"]))[1:],
        "pooled": named("toy 1", tables["pooled"]) + named("toy 2", tables.pop("pooled-learning"))[1:],
        "variability": means(R["variability-sgd"], ALIKE, (claims.VARIED, claims.ALIKE_AT_ONE, claims.ALIKE_KEPT)),
        "scale": means(R["scale"], (THROUGH_W, RUN), SCALED),
        "classifier": means(R["classifier"], OF_G),
        "lp-ft": means(R["lp-ft"], MARKS),
        "real-moved": means(R["real-best"], (time_to(0.6), RUN, END, *MOVED), REAL_SHOWN),
        "both": beside(*(means(R[name], BOTH, ["rl"]) for name in ("confidence", "real-best"))),
        "tokens": named("its own", means(R["real-tokens"], of_states("own"), TOKENS))
        + named("the start's", means(R["real-tokens"], of_states("start"), TOKENS))[1:],
    }
    return {name: markdown(*rows) for name, rows in (tables | one_update.tables(update)).items()}


def rewritten(texts):
    """{page: its text with what follows each `<!-- report: NAME -->` replaced, up to `<!-- end -->`}. ValueError for a
    name that has no mark."""
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for name, text in texts.items():
        mark = re.compile(rf"(<!-- report: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        check(any(map(mark.search, pages.values())), f"no page has a mark for {name}")
        for page, old in pages.items():
            pages[page] = mark.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", old)
    return pages


def stored():
    """{experiment: its runs}; and one update looked at closely."""
    results = {name: scores.load(x) for name, x in EXPERIMENTS.items()}
    results |= {f"pooled{toy}": results[f"best{toy}"] + results[f"again{toy}"] for toy in ("", "-learning")}
    results["real-tokens"] += results["real-best"]  # which has plain RL
    results["foretell"] = scores.load(arms.Experiment("foretell", arms.some("rl")))
    results["regime-2"] = results["regime-2"].some(lambda start: start["success_d"] >= 0.1)  # rule 6 of rules.md
    return results, json.loads((scores.DATA / "one_update.json").read_text("utf-8"))


def take(out):
    """Write what a run's folder holds into data/. ValueError if that is no experiment's."""
    record = read_record(out)
    check(str(record.get("name")) in EXPERIMENTS, f"{out} holds none of the experiments, but {record.get('name')!r}")
    x = EXPERIMENTS[record["name"]]
    odd = [key for key, value in record_of(x).items() if key != "torch" and record.get(key) != value]
    check(not odd, f"{out} holds {x.name} with other {', '.join(odd)}")
    left = missing(x, out)
    check(not left, f"{out} lacks {len(left)} of the {len(x.jobs())} jobs of {x.name}")
    scores.keep(x, out)
    if x.name == "confidence":
        write_whole(scores.DATA / "one_update.json", json.dumps(one_update.of_run(x, out)).encode())


def main(folders):
    """ValueError, before a page is written, for a folder that is no finished run, or for a contradicted verdict."""
    for out in folders:
        take(out)
    results, update = stored()
    wrong = list(claims.contradicted(results))
    check(not wrong, f"the data contradict what the pages say: {'; '.join(wrong)}")
    check(importlib.util.find_spec("matplotlib"), 'the pictures need matplotlib: pip install -e ".[report]"')
    figures.plot_answer(results, HERE / "curves.png")
    figures.plot_foretold(results["foretell"], (*JUDGED, "SmolLM2"), HERE / "foretell.png")
    figures.plot_influence(update["influence"], update["labels"], HERE / "influence.png")
    for page, text in rewritten(sections(results, update)).items():
        write_whole(page, text.encode())

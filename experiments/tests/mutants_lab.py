"""The laboratory's rows of tests/mutants.py: python experiments/tests/mutants_lab.py [WORD ...]"""

# ruff: noqa: E501  one row, one mutant

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

from mutants import main  # noqa: E402

MUTANTS = [
    ("experiments/arms.py", "0 < n <= x.rl_steps", "0 < n", "test_arms"),
    ("experiments/arms.py", "type(n) is int and", "", "test_arms"),
    ("experiments/arms.py", "arm.body_rate * lr, rate * lr)", "rate * lr, rate * lr)", "test_arms"),
    ("experiments/arms.py", "i * rest.steps // (n + 1)", "i * rest.steps // n", "test_arms"),
    ("experiments/arms.py", "if arm.order == \"last\" else (part, rest)", "if arm.order else (part, rest)", "test_arms"),
    ("experiments/arms.py", "rl=dict(optimizer=KeptAdam)),", "),", "test_arms"),
    ("experiments/arms.py", "Arm(\"control\", part=\"all\")", "Arm(\"control\")", "test_arms"),
    ("experiments/arms.py", "names[1:] and len(set(names)) == len(names)", "names", "test_arms"),
    ("experiments/arms.py", "f\"{name}.\".startswith(f\"{arm.part}.\")", "name.startswith(arm.part)", "test_arms"),
    ("experiments/arms.py", "\"last-block\": 5, \"first-block\": 1", "\"last-block\": 5, \"first-block\": 5", "test_arms"),
    ("experiments/arms.py", "dict(arms=[*BEST, at(\"fast-classifier\", 5)]", "dict(arms=[*BEST, at(\"fast-classifier\", 40)]", "test_arms"),
    ("experiments/arms.py", "stream(seed, \"rl\"), stages(arm, x)", "stream(seed, arm.name), stages(arm, x)", "test_arms"),
    ("experiments/arms.py", "{\"step\": before + record[\"step\"]}", "{}", "test_arms"),
    ("experiments/arms.py", "mixture=self.tilt", "", "test_arms"),
    ("experiments/judges.py", "kl_divergence(torch.zeros_like(batch.logits), batch.logits)", "kl_divergence(batch.logits, torch.zeros_like(batch.logits))", "test_arms"),
    ("experiments/judges.py", "batch.logp.masked_fill(~batch.mask[:, 1:], 0.0).sum", "batch.logp.sum", "test_arms"),
    ("experiments/judges.py", "vars(p).setdefault(\"adam\", {})", "{}", "test_arms"),
    ("experiments/judges.py", "torch.randint(2, batch.rewards.shape, generator=generator)", "torch.randint(2, batch.rewards.shape)", "test_arms"),
    ("experiments/knobs.py", "        model.body.norm.bias /= a\n", "", "test_knobs"),
    ("experiments/knobs.py", "add_constant(model, s * phi", "add_constant(model, phi", "test_knobs"),
    ("experiments/knobs.py", "check(0 < a <", "check(0 <= a <", "test_knobs"),
    ("experiments/toy.py", "    if arm.knob:\n", "    if False:\n", "test_arms"),
    ("experiments/toy.py", "list(supervised_finetune(model, task, config, stream(seed, name)))", "pass", "test_arms"),
    ("experiments/measures.py", "math.comb(n - correct, k) / math.comb(n, k)", "(1 - correct / n) ** k", "test_measures"),
    ("experiments/measures.py", "(mask.cumsum(dim=1) == 1)[mask]", "(mask.cumsum(dim=1) == 2)[mask]", "test_measures"),
    ("experiments/measures.py", "tokens + record.get(\"tokens\", 0)", "record.get(\"tokens\", 0)", "test_measures"),
    ("experiments/measures.py", "total + effect[name]", "effect[name]", "test_measures"),
    ("experiments/measures.py", "(phi, W), now = now, look(model, probe)", "phi, W = now", "test_measures"),
    ("experiments/measures.py", "part - part.mean(dim=1, keepdim=True) for part in (parts[0], whole)", "part for part in (parts[0], whole)", "test_measures"),
    ("experiments/measures.py", "whole = parts[0] + (parts[1] + parts[2])", "whole = parts[0] + parts[1]", "test_measures"),
    ("experiments/measures.py", "x.last_prompts if at_an_end else x.prompts", "x.prompts", "test_measures"),
    ("experiments/measures.py", "rollout(model, task, prompts, 1).rewards", "rollout(model, task, prompts, 1, draws).rewards", "test_measures"),
    ("experiments/measures.py", "kl.sum().item() / len(batch.responses)", "kl.mean().item()", "test_measures"),
    ("experiments/measures.py", "answers[i : i + samples]", "batch.responses[i : i + samples]", "test_measures"),
    ("experiments/measures.py", "self.task.encode(prompt + self.pattern)", "self.task.encode(prompt)", "test_measures"),
    ("experiments/measures.py", "[:, -1].softmax(dim=-1)  # (B, V)", "[:, 0].softmax(dim=-1)", "test_measures"),
    ("experiments/measures.py", "(new_shares - shares) * (success + new_success) / 2", "(new_shares - shares) * success", "test_measures"),
    ("experiments/measures.py", "moved_W.classifier = model.classifier", "moved_W = model", "test_measures"),
    ("experiments/measures.py", "len(states) // 16)][:16]", "len(states) // 16)][:8]", "test_measures"),
    ("experiments/measures.py", "[~torch.eye(len(some), dtype=torch.bool)]", "", "test_measures"),
    ("experiments/measures.py", "((phi - probe.phi).norm(dim=1) / probe.phi.norm(dim=1))", "(phi - probe.phi).norm(dim=1)", "test_measures"),
    ("experiments/runs.py", "        part.write_bytes(content)\n        os.replace(part, path)", "        path.write_bytes(content)", "test_runs"),
    ("experiments/runs.py", "        if not path.exists():\n            write_whole(path, make())", "        write_whole(path, make())", "test_runs"),
    ("experiments/runs.py", "if name != \"seeds\"}", "}", "test_runs"),
    ("experiments/runs.py", " | {\"torch\": torch.__version__}", "", "test_runs"),
    ("experiments/runs.py", "check(file.exists() or not other,", "check(True,", "test_runs"),
    ("experiments/runs.py", "contextlib.suppress(Timeout), locked(file, timeout=0)", "contextlib.suppress(Timeout)", "test_runs"),
    ("experiments/runs.py", "            if not file.exists():\n                try:", "            if True:\n                try:", "test_runs"),
    ("experiments/runs.py", "    threading.Thread(target=end_with_parent, daemon=True).start()\n", "", "test_runs"),
    ("experiments/runs.py", "    before = signal.signal(signal.SIGINT, signal.SIG_IGN)", "    before = signal.getsignal(signal.SIGINT)", "test_runs"),
    ("experiments/runs.py", "except FloatingPointError as error", "except ZeroDivisionError as error", "test_runs"),
    ("experiments/scores.py", "statistics.stdev(values) / math.sqrt(n)", "statistics.stdev(values)", "test_scores"),
    ("experiments/scores.py", "quantile((1 + level) / 2, n - 1)", "quantile((1 + level) / 2, n)", "test_scores"),
    ("experiments/scores.py", "1 - level / looks, seeds)", "1 - level, seeds)", "test_scores"),
    ("experiments/scores.py", "for level in (0.1, 0.05)", "for level in (0.05, 0.05)", "test_scores"),
    ("experiments/scores.py", "(\"slightly \" if within else \"\")", "\"\"", "test_scores"),
    ("experiments/scores.py", "rows[1:] or rows)", "rows)", "test_scores"),
    ("experiments/scores.py", "== (arm.n or x.n)]", "== x.n]", "test_scores"),
    ("experiments/scores.py", "for seed in own if seed in other]", "for seed in own]", "test_scores"),
    ("experiments/scores.py", "shift = 1 + max", "shift = max", "test_scores"),
    ("experiments/scores.py", "if accuracy >= threshold)", "if accuracy > threshold)", "test_scores"),
    ("experiments/scores.py", "if 0 < step <= until)", "if step <= until)", "test_scores"),
    ("experiments/scores.py", "np.where(steps <= n, 2, 4)", "4", "test_scores"),
    ("experiments/scores.py", "np.append(np.diff(spent) > 0, True)", "np.append(True, np.diff(spent) > 0)", "test_scores"),
    ("experiments/scores.py", "looks or len(pairs)", "looks or 1", "test_scores"),
    ("experiments/claims.py", "- (theirs[same + rest] - theirs[same])", "- (theirs[rest] - theirs[0])", "test_scores"),
    ("experiments/claims.py", "len(arms) + 1\n", "1\n", "test_scores"),
    ("experiments/claims.py", "if said != word:", "if False:", "test_pages"),
    ("experiments/claims.py", "if verdict(results, text, questions) != words:", "if False:", "test_pages"),
    ("experiments/report.py", "check(not missing(x, out),", "check(True,", "test_pages"),
    ("experiments/scores.py", "        check(gaps, f", "        check(True, f", "test_scores"),
    ("experiments/one_update.py", "before * (part - before @ part)", "before * part", "test_pages"),
    ("experiments/one_update.py", "-abs(g[1].rewards.mean() - 0.5)", "0", "test_pages"),
    ("experiments/one_update.py", "return max(groups", "return min(groups", "test_pages"),
    ("experiments/report.py", "lambda start: start[\"success_d\"] >= 0.1", "lambda start: True", "test_pages"),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], MUTANTS, HERE / "mutants.md"))

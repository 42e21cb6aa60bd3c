"""Break the code on purpose, one line at a time, and expect a test to fail: python tests/mutants.py [WORD]

Each row: file, the line's text, what replaces it, and the test file that must turn red. With WORD, only the rows that
contain it. A mutant that survives is a claim nobody checks; the exit code is the number of survivors.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

MUTANTS = [
    ("model.py", "triu(S - T + 1)", "triu(S - T + 2)", "test_model"),
    ("model.py", "-math.inf", "-4.0", "test_model"),
    ("model.py", "weight[start:end]", "weight[: end - start]", "test_model"),
    ("model.py", "last.softmax(1)", "(last / 0.9).softmax(1)", "test_model"),
    ("model.py", "mask = torch.cat((mask, ~ended[:, None]), dim=1)", "mask = torch.cat((mask, token != end_token), dim=1)", "test_model"),
    ("model.py", "bias=False", "bias=True", "test_model"),
    ("model.py", "repeat_interleave(samples, dim=0) for x", "repeat(samples, 1, 1, 1) for x", "test_model"),
    ("model.py", "0.1 / (2", "0.1 + torch.rand(()).item() / (2", "test_model"),
    ("minicfrl.py", "span <= rounding", "span < 0", "test_advantages"),
    ("minicfrl.py", "advantages = rewards - rewards.mean(dim=1, keepdim=True)", "advantages = rewards - rewards.mean()", "test_advantages"),
    ("minicfrl.py", "correction=0", "correction=1", "test_advantages"),
    ("minicfrl.py", "advantages * G / max(G - 1, 1)", "advantages", "test_advantages"),
    ("minicfrl.py", "if not rewards.isfinite().all():", "if False:", "test_advantages"),
    ("minicfrl.py", "model(tokens)[:, :-1], tokens[:, 1:]", "model(tokens)[:, 1:], tokens[:, 1:]", "test_policy_gradient"),
    ("minicfrl.py", "return -(advantages[:, None]", "return (advantages[:, None]", "test_policy_gradient"),
    ("minicfrl.py", "logp.masked_fill(~mask, 0.0)).sum()", "logp).sum()", "test_policy_gradient"),
    ("minicfrl.py", "count = int(mask.sum()) if count is None else count", "count = int(mask.sum())", "test_policy_gradient"),
    ("minicfrl.py", "actions] += 1", "actions] += 0", "test_policy_gradient"),
    ("minicfrl.py", "return -(weights[:, None]", "return (weights[:, None]", "test_policy_gradient"),
    ("minicfrl.py", "(logp - reference_logp)", "(logp / reference_logp)", "test_policy_gradient"),
    ("minicfrl.py", "return ratio - ratio.mean(dim=1, keepdim=True)", "return ratio", "test_policy_gradient"),
    ("minicfrl.py", "advantages - config.kl * log_ratio", "advantages + config.kl * log_ratio", "test_train"),
    ("minicfrl.py", "if step in (1, config.classifier_steps + 1):  # (E5)", "if step == 1:", "test_train"),
    ("minicfrl.py", 'if trained != "classifier":', "if True:", "test_train"),
    ("minicfrl.py", "config.classifier_lr if stage == 1", "config.lr if stage == 1", "test_train"),
    ("minicfrl.py", 'config.stage_1 if stage == 1 else "all"', '"classifier" if stage == 1 else "all"', "test_train"),
    ("minicfrl.py", "count, W = advantages != 0, int(batch.mask.sum())", "count, W = advantages != 0, int(batch.mask[advantages != 0].sum())", "test_train"),
    ("minicfrl.py", "responses[-1]) * ended", "responses[-1])", "test_train"),
    ("minicfrl.py", "pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,)", "pairs = task.heldout_pairs[torch.randint(len(task.heldout_pairs), (config.prompts,)", "test_train"),
    ("minicfrl.py", "W.grad = gradient if W.grad is None else W.grad + gradient", "W.grad = gradient if W.grad is None else W.grad", "test_train"),
    ("minicfrl.py", "torch.minimum(draw, draw.T)", "draw / 2", "test_task"),
    ("minicfrl.py", "_, *rest = rest.split(\";\")", "*_, rest = [[part] for part in rest.split(\";\")]", "test_task"),
    ("minicfrl.py", "return rest if pattern in (\"D\", \"G\") else None", "return rest", "test_task"),
    ("minicfrl.py", "divmod(x + y + carry, 10)", "divmod(x + y, 10)", "test_task"),
    ("minicfrl.py", "if character not in self.alphabet:", "if False:", "test_task"),
    ("minicfrl.py", "math.comb(n - correct, k) / math.comb(n, k)", "(1 - correct / n) ** k", "test_evaluate"),
    ("minicfrl.py", "probe_logits = model.classifier(features)", "probe_logits = batch.state_logits", "test_evaluate"),
    ("minicfrl.py", "rollout(model, task, prompts, 1).rewards", "rollout(model, task, prompts, 1, generator).rewards", "test_evaluate"),
    ("train_toy.py", "ARMS[arm](self))", "{})", "test_cli"),
    ("train_toy.py", 'draws, rl = generator(seed, "rl")', "draws, rl = generator(seed, arm)", "test_cli"),
    ("train_toy.py", 'zlib.crc32(f"{purpose} {seed}".encode())', "zlib.crc32(purpose.encode())", "test_cli"),
    ("assets/tables.py", "elif control <= cf_rl + config.eval_every:", "elif control <= cf_rl:", "test_cli"),
    ("train_toy.py", "elif not (out / \"config.json\").exists():", "elif False:", "test_cli"),
    ("model.py", "math.sqrt(d // self.n_head)", "math.sqrt(d)", "test_model"),
    ("model.py", "nn.GELU()", "nn.ReLU()", "test_model"),
    ("model.py", "x + self.mlp(self.mlp_norm(x))", "x + self.mlp(x)", "test_model"),
    ("minicfrl.py", ", dtype=torch.float32)", ")", "test_task"),
    ("minicfrl.py", "held_out.nonzero()[order]", "held_out.nonzero()", "test_task"),
    ("minicfrl.py", "4 * torch.finfo(rewards.dtype).eps", "0 * torch.finfo(rewards.dtype).eps", "test_advantages"),
    ("minicfrl.py", "noise=config.noise", "noise=0.0", "test_train"),
    ("minicfrl.py", "torch.tensor(config.mixture)", "torch.ones(3)", "test_train"),
    ("minicfrl.py", "(position >= len(task.prompt(0, 0)))", "(position >= 0)", "test_train"),
    ("minicfrl.py", " * min(step / 20, 1 - (step - 1) / config.steps)", "", "test_train"),
    ("minicfrl.py", "if reference is not None:", "if reference is not None and not classifier_only:", "test_train"),
    ("minicfrl.py", '"entropy": entropy(batch.state_logits).mean().item(),\n        "flat"', '"entropy": 0.0,\n        "flat"', "test_train"),
    ("train_toy.py", '{"classifier_lr": config.lr}', "{}", "test_cli"),
    ("train_toy.py", "direction * distance / direction.norm()", "direction * distance", "test_cli"),
    ("train_toy.py", "SFTConfig(imitated, rl.classifier_steps, **sft)", "SFTConfig(imitated, 0, **sft)", "test_cli"),
    ("minicfrl.py", "(model.classifier, config.classifier_lr) if stage == 1", "(model, config.classifier_lr) if stage == 1", "test_train"),
    ("minicfrl.py", 'if trained != "body" else []', "", "test_train"),
    ("ntk.py", "F.cosine_similarity(R, both, dim=1)", "F.cosine_similarity(*parts, dim=1)", "test_one_update"),
    ("assets/tables.py", "t * statistics.stdev(values) / math.sqrt(n)", "t * statistics.stdev(values)", "test_cli"),
    ("train_toy.py", "max(0, n - free)", "n", "test_cli"),
    ("minicfrl.py", "getattr(torch.optim, OPTIMIZERS[config.optimizer])", "torch.optim.Adam", "test_train"),
    ("minicfrl.py", "passed[k] + pass_at_k(samples, correct, k)", "passed[k] + pass_at_k(samples, correct, 1)", "test_evaluate"),
    ("train_toy.py", "min(steps, default=None)", "max(steps, default=None)", "test_cli"),
    ("train_toy.py", "reached += [[]]", "reached += [] and [[]]", "test_cli"),
    ("ntk.py", "value=1.0", "value=0.0", "test_ntk"),
    ("ntk.py", "F.one_hot(position, model.config.block_size)", "0 * F.one_hot(position, model.config.block_size)", "test_ntk"),
    ("ntk.py", "(g * normalised)", "(g * x[:, None])", "test_ntk"),
    ("ntk.py", "eps=module.eps", "eps=0.1", "test_ntk"),
    ("ntk.py", "used = g.any(dim=(0, 1, 3))", "used = g[:1].any(dim=(0, 1, 3)) & (torch.arange(g.size(2)) > 0)", "test_ntk"),
    ("ntk.py", "m if symmetric else 0", "m", "test_ntk"),
    ("ntk.py", ").argsort()\n        done", ")\n        done", "test_ntk"),
    ("ntk.py", "        gradient = torch.einsum(\"va,namb,wb->nvmw\", W, gradient, W)", "        gradient = torch.einsum(\"va,namb,wb->nvmw\", W, gradient, W.abs())", "test_ntk"),
    ("ntk.py", "position[index[0]] + 1]", "position[index[0]] + 2]", "test_ntk"),
    ("ntk.py", "x.new_ones(len(x), 1, 1), torch", "x.new_zeros(len(x), 1, 1), torch", "test_ntk"),
    ("ntk.py", "<= 1000 * rounding", "<= 1e13 * rounding", "test_ntk"),
    ("ntk.py", "view(len(weighted), g.size(2), U)", "view(-1, g.size(2), U)", "test_ntk"),
    ("ntk.py", "if output.shape[:-1] == rows.shape:", "if True:", "test_ntk"),
    ("ntk.py", "elif module.bias is not None:", "else:", "test_ntk"),
    ("ntk.py", "body = copy.deepcopy(model.body)", "body = model.body", "test_ntk"),
    ("ntk.py", "and m.bias is not None", "", "test_ntk"),
    ("ntk.py", "@torch.enable_grad()\n", "", "test_ntk"),
    ("ntk.py", "            handle.remove()", "            pass", "test_ntk"),
    ("ntk.py", "if parameter.untyped_storage().data_ptr() == W.untyped_storage().data_ptr()", "if parameter is W", "test_ntk"),
    ("ntk.py", "type(model.classifier) is not nn.Linear or model.classifier.bias is not None", "model.classifier.bias is not None", "test_ntk"),
    ("ntk.py", "self.representation, identity)", "self.representation, identity + 1)", "test_ntk"),
    ("ntk.py", "dphi @ W.T  # (E8)", "dphi @ W.abs().T", "test_one_update"),
    ("ntk.py", "return phi @ changes", "return -phi @ changes", "test_one_update"),
    ("ntk.py", "return -(pi * (logp", "return (pi * (logp", "test_confidence"),
    ("ntk.py", "(logp - (pi * logp).sum(dim=1, keepdim=True))", "logp", "test_confidence"),
    ("ntk.py", "- (pi * dlogits).sum(dim=1))", ")", "test_confidence"),
    ("ntk.py", "top * (dlogits", "(dlogits", "test_confidence"),
    ("ntk.py", "= change - by_W - by_body", "= change - by_W", "test_one_update"),
    ("train_toy.py", "before.load_state_dict(model.state_dict())", "pass", "test_cli"),
    ("train_toy.py", "moved_W.classifier = model.classifier", "moved_W = model", "test_cli"),
    ("train_toy.py", "{name: so_far[name] + seen[name] for name in NOTHING_YET}", "{}", "test_cli"),
    ("train_toy.py", "cosines(features[kind] - features[kind].mean(dim=0))", "cosines(features[kind])", "test_cli"),
    ("train_toy.py", "* math.sqrt(now.gradient.size(1))", "", "test_cli"),
    ("train_toy.py", "cumsum(dim=1) == 1", "cumsum(dim=1) == 2", "test_cli"),
    ("train_toy.py", "cosine_similarity(by_W.gradient", "cosine_similarity(now.gradient", "test_cli"),
    ("train_toy.py", '{**PLAIN, "reward": "coin flips"}', "PLAIN", "test_cli"),
    ("train_toy.py", "imitated + record", "record", "test_cli"),
    ("train_toy.py", "mixture=mixture)", ")", "test_cli"),
    ("minicfrl.py", "rewards = reward_by(config.reward, batch, generator)", "rewards = batch.rewards", "test_train"),
    ("minicfrl.py", "kl_divergence(torch.zeros_like(batch.logits), batch.logits)", "kl_divergence(batch.logits, torch.zeros_like(batch.logits))", "test_patterns"),
    ("minicfrl.py", "/ mask.sum(dim=1)).view_as", ").view_as", "test_patterns"),
    ("minicfrl.py", "batch.logp.masked_fill(~mask, 0.0).sum(dim=1)", "batch.logp.sum(dim=1)", "test_patterns"),
    ("minicfrl.py", "(new_shares - shares) * (success + new_success) / 2", "(new_shares - shares) * success", "test_patterns"),
    ("minicfrl.py", "[:, -1].softmax(dim=-1)", "[:, 0].softmax(dim=-1)", "test_patterns"),
    ("minicfrl.py", "kl_divergence(batch.state_logits, reference)", "kl_divergence(reference, batch.state_logits)", "test_patterns"),
    ("minicfrl.py", "kl.sum().item() / len(answers)", "kl.mean().item()", "test_patterns"),
    ("model.py", "logp.exp() * (logp", "reference.softmax(dim=-1) * (logp", "test_patterns"),
    ("train_toy.py", "for m in (probe.start, model)]", "for m in (model, probe.start)]", "test_cli"),
    ("train_toy.py", "signal.signal(signal.SIGTERM, signal.default_int_handler)", "pass", "test_cli"),
    ("train_toy.py", "{**NO_UPDATE, **NOTHING_YET, **record}", "record", "test_cli"),
    ("minicfrl.py", "!= reference.argmax(dim=1)", "!= reference.argmin(dim=1)", "test_patterns"),
    ("assets/report.py", "values[here].mean()", "values[here].sum()", "test_cli"),
    ("assets/report.py", "return shares * (values", "return (values", "test_patterns"),
]  # fmt: skip


def killed(folder, file, old, new, tests):
    """Whether the tests fail once `old` is `new`. ValueError if the code has no such text, or several."""
    source = ROOT / file
    text = source.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times {old!r}")
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    shutil.copy(source, folder / file)
    return done.returncode == 1  # pytest: some test failed


def main():
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
        for mutant in MUTANTS:
            if any(word not in " ".join(mutant) for word in sys.argv[1:]):
                continue
            dead = killed(folder, *mutant)
            survivors += not dead
            print(
                f"{'killed  ' if dead else 'SURVIVED'}  {mutant[3]:22} {mutant[1].strip()}  ->  {mutant[2].strip()}",
                flush=True,
            )
    return survivors


if __name__ == "__main__":
    sys.exit(main())

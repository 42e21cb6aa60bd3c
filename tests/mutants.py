"""Break the code on purpose, one line at a time, and expect a test to fail: python tests/mutants.py [WORD ...]

Each row: file, the line's text, what replaces it, and the test file that must turn red. A mutant that survives is a
claim nobody checks; the exit code says whether any did. With WORDs only the rows that contain them all are run. What
is found goes to the table of tests/mutants.md, which also says which test killed a row last time: that is tried first.
"""

import concurrent.futures
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "tests" / "mutants.md"
NEED_TRL = ("test_trl_recipe", "test_trl_microscope", "test_real_model", "test_any_policy")
SECONDS = 120  # for the tests of a row; what hangs is as dead as what fails

MUTANTS = [
    ("model.py", "triu(S - T + 1)", "triu(S - T + 2)", "test_model"),
    ("model.py", "-math.inf", "-4.0", "test_model"),
    ("model.py", "torch.arange(start, end,", "torch.arange(0, end - start,", "test_model"),
    ("model.py", "last.softmax(1)", "(last / 0.9).softmax(1)", "test_model"),
    ("model.py", "mask = torch.cat((mask, ~ended[:, None]), dim=1)", "mask = torch.cat((mask, token != end_token), dim=1)", "test_model"),
    ("model.py", "bias=False", "bias=True", "test_model"),
    ("model.py", "repeat_interleave(samples, dim=0) for x", "repeat(samples, 1, 1, 1) for x", "test_model"),
    ("model.py", "0.1 / math.sqrt(2", "torch.rand(()).item() / math.sqrt(2", "test_model"),
    ("minicfrl.py", "span <= rounding", "span < 0", "test_advantages"),
    ("minicfrl.py", "advantages = rewards - rewards.mean(dim=1, keepdim=True)", "advantages = rewards - rewards.mean()", "test_advantages"),
    ("minicfrl.py", "correction=0", "correction=1", "test_advantages"),
    ("minicfrl.py", "advantages * G / max(G - 1, 1)", "advantages", "test_advantages"),
    ("minicfrl.py", "for reward in rewards[~rewards.isfinite()].tolist():", "for reward in ():", "test_advantages"),
    ("minicfrl.py", "_logp_of_last(model(tokens)[:, :-1], tokens)", "_logp_of_last(model(tokens)[:, 1:], tokens)", "test_policy_gradient"),
    ("minicfrl.py", "return -(advantages[:, None]", "return (advantages[:, None]", "test_policy_gradient"),
    ("minicfrl.py", "logp.masked_fill(~mask, 0.0)).sum()", "logp).sum()", "test_policy_gradient"),
    ("minicfrl.py", "count = int(mask.sum()) if count is None else count", "count = int(mask.sum())", "test_policy_gradient"),
    ("model.py", "actions] += 1", "actions] += 0", "test_policy_gradient"),
    ("minicfrl.py", "return -(weights[:, None]", "return (weights[:, None]", "test_policy_gradient"),
    ("minicfrl.py", "(logp - reference_logp)", "(logp / reference_logp)", "test_policy_gradient"),
    ("minicfrl.py", "return ratio - ratio.mean(dim=1, keepdim=True)", "return ratio", "test_policy_gradient"),
    ("minicfrl.py", "advantages - config.kl * log_ratio", "advantages + config.kl * log_ratio", "test_train"),
    ("minicfrl.py", "optimizer = _optimizer(model, stage, config.optimizer)  # (E5)", "optimizer = optimizer if number > 1 else _optimizer(model, stage, config.optimizer)", "test_train"),
    ("minicfrl.py", "optimizer = _optimizer(model, stage, config.optimizer)  # (E5)", "optimizer = optimizer if number == 3 else _optimizer(model, stage, config.optimizer)", "test_train"),
    ("minicfrl.py", "optimizer = _optimizer(model, stage, \"adam\", betas", "optimizer = optimizer if number == 3 else _optimizer(model, stage, \"adam\", betas", "test_train"),
    ("minicfrl.py", "if stage.trains == \"classifier\":", "if False:", "test_train"),
    ("minicfrl.py", "stage.lr if stage.classifier_lr is None else stage.classifier_lr", "stage.lr", "test_train"),
    ("minicfrl.py", "f\"{name}.\".startswith(f\"{stage.trains}.\")", "name.startswith(\"classifier\")", "test_train"),
    ("minicfrl.py", "f\"{name}.\".startswith(f\"{stage.trains}.\")", "name.startswith(stage.trains)", "test_train"),
    ("minicfrl.py", "check(isinstance(generator, torch.Generator),", "check(True,", "test_train"),
    ("minicfrl.py", "    check(trained, f\"trains={stage.trains!r} names no parameter of the model that can be trained\")\n", "", "test_train"),
    ("minicfrl.py", "named_parameters() if p.requires_grad]", "named_parameters()]", "test_train"),
    ("minicfrl.py", "_parameters(optimizer) if p.grad is not None]).item()", "_parameters(optimizer)]).item()", "test_train"),
    ("minicfrl.py", "loss.backward(inputs=trained)", "loss.backward()", "test_train"),
    ("minicfrl.py", "loss.backward(inputs=_parameters(optimizer))", "loss.backward()", "test_train"),
    ("minicfrl.py", "[Stage(classifier_steps, trains, lr, classifier_lr)] if classifier_steps else []", "[Stage(classifier_steps, trains, lr, classifier_lr)] if classifier_steps < steps else []", "test_train"),
    ("minicfrl.py", "type(classifier_steps) is int and 0", "0", "test_train"),
    ("minicfrl.py", "0 <= classifier_steps <= steps\n", "0 <= classifier_steps\n", "test_train"),
    ("minicfrl.py", "isinstance(stages, tuple) and stages and all", "isinstance(stages, tuple) and all", "test_train"),
    ("minicfrl.py", "responses[-1]) * ended", "responses[-1])", "test_train"),
    ("minicfrl.py", "pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,)", "pairs = task.heldout_pairs[torch.randint(len(task.heldout_pairs), (config.prompts,)", "test_train"),
    ("minicfrl.py", "W.grad = gradient if W.grad is None else W.grad + gradient", "W.grad = gradient if W.grad is None else W.grad", "test_train"),
    ("minicfrl.py", "torch.minimum(draw, draw.T)", "draw / 2", "test_task"),
    ("minicfrl.py", "return rest if pattern in (\"d\", \"g\") else None", "return rest", "test_task"),
    ("minicfrl.py", "divmod(x + y + carry, 10)", "divmod(x + y, 10)", "test_task"),
    ("minicfrl.py", "if character not in self.alphabet:", "if False:", "test_task"),
    ("experiments/measures.py", "math.comb(n - correct, k) / math.comb(n, k)", "(1 - correct / n) ** k", "test_measures"),
    ("experiments/measures.py", "probe_logits = model.classifier(features)", "probe_logits = batch.state_logits", "test_measures"),
    ("experiments/measures.py", "rollout(model, task, prompts, 1).rewards", "rollout(model, task, prompts, 1, generator).rewards", "test_measures"),
    ("experiments/arms.py", "**flags | arm_named(arm).rl)", "**flags)", "test_arms"),
    ("experiments/arms.py", "{name: getattr(self, name) for name in flags}", "{}", "test_arms"),
    ("experiments/arms.py", "draws, imitation, rl = generator(seed, \"rl\")", "draws, imitation, rl = generator(seed, arm)", "test_arms"),
    ("experiments/arms.py", "zlib.crc32(f\"{purpose} {seed}\".encode())", "zlib.crc32(purpose.encode())", "test_arms"),
    ("experiments/tables.py", "elif len(faster) == 2:", "elif faster:", "test_tables"),
    ("experiments/runs.py", "elif not (out / \"config.json\").exists():", "elif False:", "test_runs"),
    ("model.py", "math.sqrt(d // self.n_head)", "math.sqrt(d)", "test_model"),
    ("model.py", "nn.GELU()", "nn.ReLU()", "test_model"),
    ("model.py", "x + self.mlp(self.mlp_norm(x))", "x + self.mlp(x)", "test_model"),
    ("minicfrl.py", ", dtype=torch.float32)", ")", "test_task"),
    ("minicfrl.py", "held_out.nonzero()[order]", "held_out.nonzero()", "test_task"),
    ("minicfrl.py", "4 * torch.finfo(rewards.dtype).eps", "0 * torch.finfo(rewards.dtype).eps", "test_advantages"),
    ("minicfrl.py", "noise=config.noise", "noise=0.0", "test_train"),
    ("minicfrl.py", "torch.tensor(config.mixture)", "torch.ones(3)", "test_train"),
    ("minicfrl.py", "(position >= len(task.prompt(0, 0)))", "(position >= 0)", "test_train"),
    ("minicfrl.py", " * min(step / 20, 1 - (step - 1) / steps)", "", "test_train"),
    ("minicfrl.py", "if reference is not None:", "if reference is not None and not classifier_only:", "test_train"),
    ("experiments/arms.py", "cf_rl(config, classifier_lr=config.lr)", "cf_rl(config)", "test_arms"),
    ("experiments/arms.py", "\"control\": Arm(lambda config: cf_rl(config, trains=\"all\"))", "\"control\": Arm(cf_rl)", "test_arms"),
    ("experiments/arms.py", "cf_rl(config)[::-1]", "cf_rl(config)", "test_arms"),
    ("experiments/arms.py", "arm = replace(arm, stages=stages)", "arm = arm", "test_arms"),
    ("experiments/arms.py", "(?:e[+-]?[0-9]+)?\"", "(?:e-?[0-9]+)?\"", "test_order"),
    ("experiments/arms.py", "cf_rl(self)  # these check", "pass  # these check", "test_arms"),
    ("experiments/arms.py", "\"lp-ft\": Arm(lambda config: (), imitation=cf_rl)", "\"lp-ft\": Arm(lambda config: (), imitation=plain)", "test_arms"),
    ("minicfrl.py", "if p is not W], \"lr\": stage.lr}", "if p is not W], \"lr\": classifier_lr}", "test_train"),
    ("minicfrl.py", "trained = [p for name, p in named if stage.trains", "trained = [p for name, p in named if p is W or stage.trains", "test_train"),
    ("experiments/verdicts.py", "statistics.stdev(values) / math.sqrt(n)", "statistics.stdev(values)", "test_verdicts"),
    ("minicfrl.py", "return OPTIMIZERS[kind](groups", "return torch.optim.Adam(groups", "test_train"),
    ("experiments/measures.py", "passed[k] + pass_at_k(samples, correct, k)", "passed[k] + pass_at_k(samples, correct, 1)", "test_measures"),
    ("experiments/tables.py", "min(steps, default=None)", "max(steps, default=None)", "test_tables"),
    ("experiments/tables.py", "reached += [[]]", "reached += [] and [[]]", "test_tables"),
    ("minicfrl.py", "\"stage\": number, \"gradient", "\"stage\": min(number, 2), \"gradient", "test_train"),
    ("minicfrl.py", "classifier_lr=self.classifier_lr or 0.0)", "classifier_lr=0.0)", "test_train"),
    ("minicfrl.py", "if rest.count(\";\") == 1 else None", "if rest.count(\";\") else None", "test_task"),
    ("minicfrl.py", "\"flat\": 1 - (advantages != 0)", "\"flat\": (advantages != 0)", "test_train"),
    ("ntk.py", "F.cosine_similarity(by_W, both, dim=1)", "F.cosine_similarity(by_W, by_W, dim=1)", "test_one_update"),
    ("ntk.py", "by_W, by_W + by_body))", "by_W, by_body))", "test_one_update"),
    ("ntk.py", "apart = parameter.untyped_storage().data_ptr() != W.untyped_storage().data_ptr()", "apart = parameter is not W", "test_ntk"),
    ("ntk.py", "type(model.classifier) is nn.Linear and model.classifier.bias is None", "model.classifier.bias is None", "test_ntk"),
    ("ntk.py", " and not torch.is_autocast_enabled(W.device.type)", "", "test_ntk"),
    ("ntk.py", "check(same,", "check(True,", "test_ntk"),
    ("ntk.py", "dphi @ parameters[\"classifier.weight\"].T", "dphi @ parameters[\"classifier.weight\"].abs().T", "test_one_update"),
    ("ntk.py", "check(not mask[:, -1].any(),", "check(True,", "test_influence"),
    ("ntk.py", "A * products[:, 0, :, 0]", "products[:, 0, :, 0]", "test_influence"),
    ("ntk.py", "C = (g @ W)[:, None]", "C = (g @ W).abs()[:, None]", "test_influence"),
    ("ntk.py", "check(products is not None, _misfit(model.body))", "", "test_ntk"),
    ("ntk.py", "tie_weights=False", "tie_weights=True", "test_ntk"),
    ("ntk.py", "places = {at: names[p]", "places = {names[p]: names[p]", "test_ntk"),
    ("ntk.py", "kernel[index2[:, None], :, index] = products.permute(2, 0, 3, 1)", "kernel[index2[:, None], :, index] = products.transpose(1, 2)", "test_ntk"),
    ("ntk.py", "set(dims.values()) <= {1} or", "", "test_ntk"),
    ("ntk.py", "somewhere = torch.randn(phi.shape", "somewhere = torch.zeros(phi.shape", "test_ntk"),
    ("ntk.py", "C[:, u]), strict=True):", "C[:, 0]), strict=True):", "test_ntk"),
    ("ntk.py", "gradient[:, start:]", "gradient[:, : T - start]", "test_ntk"),
    ("ntk.py", "g * _slope(module, name, x)[:, None]", "g * x[:, None]", "test_ntk"),
    ("ntk.py", "(x[tile] == y[j].T).to(g.dtype)", "torch.ones_like(x[tile] == y[j].T).to(g.dtype)", "test_ntk"),
    ("ntk.py", "range(j if layers is layers2 else 0, n, size)", "range(j, n, size)", "test_ntk"),
    ("ntk.py", "kernel[j, :, j + 1 :] = kernel[j + 1 :, :, j].permute(2, 0, 1)", "pass", "test_ntk"),
    ("ntk.py", "_slope(module, name, x)[:, None]", "_slope(module, \"weight\", x)[:, None]", "test_ntk"),
    ("ntk.py", " for gradient in each], dim=3)", " for gradient in each[:1]], dim=3)", "test_ntk"),
    ("ntk.py", "any(dim=(0, 2)).int().argmax())", "any(dim=(0, 2)).int().argmax() + 1)", "test_ntk"),
    ("ntk.py", "            if not states2:\n", "            if False:\n", "test_ntk"),
    ("ntk.py", "argsort(descending=True, stable=True)", "argsort(stable=True)", "test_ntk"),
    ("ntk.py", "if len(arguments) == 1 and isinstance(output, Tensor) and output.shape[:2] == (n, T):", "if output.shape[:2] == (n, T):", "test_ntk"),
    ("ntk.py", "isinstance(output, Tensor) and output.shape[:2] == (n, T)", "isinstance(output, Tensor)", "test_ntk"),
    ("ntk.py", "if getattr(module, \"bias\", None) is not None:", "if True:", "test_ntk"),
    ("ntk.py", "m.named_parameters(path, False, False)", "m.named_parameters(path, False, False) if m in body.children()", "test_ntk"),
    ("ntk.py", "if not _is_known(m) or m in odd]", "if m in odd]", "test_ntk"),
    ("ntk.py", "chunks[: c + 1]:", "chunks[:c]:", "test_influence"),
    ("ntk.py", "value=1.0", "value=0.0", "test_ntk"),
    ("ntk.py", "        gradient = torch.einsum(\"va,namb,wb->nvmw\", W, gradient, W)", "        gradient = torch.einsum(\"va,namb,wb->nvmw\", W, gradient, W.abs())", "test_ntk"),
    ("ntk.py", "<= 1000 * rounding", "<= 1e13 * rounding", "test_ntk"),
    ("ntk.py", "@torch.enable_grad()\n", "", "test_ntk"),
    ("ntk.py", "            handle.remove()", "            pass", "test_ntk"),
    ("ntk.py", "self.representation, identity)", "self.representation, identity + 1)", "test_ntk"),
    ("ntk.py", "return phi @ changes", "return -phi @ changes", "test_one_update"),
    ("ntk.py", "return -(pi * (logp", "return (pi * (logp", "test_confidence"),
    ("ntk.py", "(logp - (pi * logp).sum(dim=1, keepdim=True))", "logp", "test_confidence"),
    ("ntk.py", "- (pi * dlogits).sum(dim=1))", ")", "test_confidence"),
    ("ntk.py", "top * (dlogits", "(dlogits", "test_confidence"),
    ("ntk.py", "effect[\"change\"] - effect[\"by_W\"] - effect[\"by_body\"]", "effect[\"change\"] - effect[\"by_W\"]", "test_one_update"),
    ("experiments/measures.py", "moved_W.classifier = model.classifier", "moved_W = model", "test_measures"),
    ("experiments/measures.py", "cosines(kind - kind.mean(dim=0))", "cosines(kind)", "test_measures"),
    ("experiments/measures.py", "* math.sqrt(now.gradient.size(1))", "", "test_measures"),
    ("experiments/measures.py", "\"agreement_prompt\": cosines[self.first]", "\"agreement_prompt\": cosines[~self.first]", "test_one_update"),
    ("experiments/measures.py", "(mask.cumsum(dim=1) == 1)[mask]", "(mask.cumsum(dim=1) == 2)[mask]", "test_patterns"),
    ("experiments/measures.py", "cosine_similarity(by_W.gradient", "cosine_similarity(now.gradient", "test_measures"),
    ("experiments/arms.py", "\"step\": before + record[\"step\"]", "\"step\": record[\"step\"]", "test_arms"),
    ("experiments/arms.py", "\"stage\": len(imitation) + record[\"stage\"]", "\"stage\": record[\"stage\"]", "test_arms"),
    ("experiments/arms.py", "mixture=mixture)", ")", "test_arms"),
    ("experiments/variations.py", "kl_divergence(torch.zeros_like(batch.logits), batch.logits)", "kl_divergence(batch.logits, torch.zeros_like(batch.logits))", "test_patterns"),
    ("experiments/variations.py", "/ mask.sum(dim=1)).view_as", ").view_as", "test_patterns"),
    ("experiments/measures.py", "(new_shares - shares) * (success + new_success) / 2", "(new_shares - shares) * success", "test_patterns"),
    ("experiments/measures.py", "self.task.encode(prompt + self.pattern)", "self.task.encode(prompt)", "test_train"),
    ("experiments/measures.py", "self.pattern + self.task.decode(tokens)", "self.task.decode(tokens)", "test_train"),
    ("experiments/measures.py", "[:, -1].softmax(dim=-1)", "[:, 0].softmax(dim=-1)", "test_patterns"),
    ("experiments/measures.py", "kl_divergence(batch.state_logits, reference)", "kl_divergence(reference, batch.state_logits)", "test_patterns"),
    ("experiments/measures.py", "kl.sum().item() / len(batch.responses)", "kl.mean().item()", "test_patterns"),
    ("experiments/variations.py", "logp.exp() * (logp", "reference.softmax(dim=-1) * (logp", "test_patterns"),
    ("experiments/cli.py", "signal.signal(signal.SIGTERM, signal.default_int_handler)", "pass", "test_runs"),
    ("experiments/measures.py", "!= reference.argmax(dim=1)", "!= reference.argmin(dim=1)", "test_patterns"),
    ("experiments/report.py", "return shares * (values", "return (values", "test_patterns"),
    ("minicfrl.py", "model.classifier.weight, int(batch.mask.sum())", "model.classifier.weight, int(batch.mask[advantages != 0].sum())", "test_train"),
    ("minicfrl.py", "\"entropy\": entropy(batch.state_logits).mean().item()}", "\"entropy\": 0.0}", "test_train"),
    ("minicfrl.py", "rewards = config.reward(batch, generator)", "rewards = batch.rewards", "test_train"),
    ("minicfrl.py", "prompts[i // samples]", "prompts[i % len(prompts)]", "test_train"),
    ("minicfrl.py", "    model.zero_grad()\n    for rows", "    for rows", "test_train"),
    ("minicfrl.py", "    model.zero_grad()\n    for rows", "    model.zero_grad(set_to_none=False)\n    for rows", "test_train"),
    ("minicfrl.py", "            model.zero_grad()\n            loss =", "            loss =", "test_train"),
    ("minicfrl.py", "_require_finite(\"gradient norm\", norm)\n    optimizer.step()", "optimizer.step()\n    _require_finite(\"gradient norm\", norm)", "test_train"),
    ("minicfrl.py", "with torch.no_grad():  # nothing is differentiated", "with torch.enable_grad():", "test_train"),
    ("minicfrl.py", "betas=(0.9, 0.98)", "betas=(0.9, 0.999)", "test_train"),
    ("minicfrl.py", "_backward(model, batch, advantages.flatten(), stage", "_backward(model, batch, advantages.T.flatten(), stage", "test_train"),
    ("minicfrl.py", "(policy, batch.tokens) for policy in (model, reference)", "(policy, batch.tokens) for policy in (model, model)", "test_train"),
    ("minicfrl.py", "copy.deepcopy(model) if config.kl else None", "model if config.kl else None", "test_train"),
    ("minicfrl.py", "task.decode(response[: length - ended])", "task.decode(response[:length])", "test_train"),
    ("minicfrl.py", "zeros_like(self.mask[:, :1])), dim=1)", "zeros_like(self.mask[:, :1])), dim=1).roll(1, 1)", "test_train"),
    ("minicfrl.py", "grouped = config.samples > 1", "grouped = config.samples > 0", "test_train"),
    ("minicfrl.py", "check(count >= 1,", "check(count >= 0,", "test_policy_gradient"),
    ("model.py", "token[ended] = end_token", "pass", "test_model"),
    ("model.py", "if not last.isfinite().all():", "if False:", "test_train"),
    ("model.py", "if T > 1:", "if T > 2:", "test_model"),
    ("model.py", "return self.norm(x)", "return x", "test_model"),
    ("model.py", "actions] += 1", "actions] += 2", "test_policy_gradient"),
    ("experiments/arms.py", "direction * moved.norm() / direction.norm()", "direction * moved.norm()", "test_arms"),
    ("experiments/arms.py", "\"random-reward\": Arm(plain, {\"reward\": coin_flips})", "\"random-reward\": Arm(plain)", "test_arms"),
    ("experiments/variations.py", "batch.logp.masked_fill(~batch.mask[:, 1:], 0.0).sum(dim=1)", "batch.logp.sum(dim=1)", "test_patterns"),
    ("experiments/arms.py", "model = copy.deepcopy(start)\n", "model = start\n", "test_arms"),
    ("experiments/arms.py", "train(model, task, rl, draws) if rl else ()", "train_rl(model, task, rl, draws) if rl and not imitation else ()", "test_arms"),
    ("experiments/arms.py", "check(self.arm_list.count(arm) == 1,", "check(True,", "test_cli"),
    ("experiments/variations.py", "torch.randint(2, batch.rewards.shape", "torch.randint(1, batch.rewards.shape", "test_arms"),
    ("experiments/measures.py", "for m in policies))", "for m in policies[::-1]))", "test_measures"),
    ("experiments/measures.py", "return self.step in (0, self.config.rl_steps)", "return self.step == self.config.rl_steps", "test_measures"),
    ("experiments/measures.py", "scene.step in scene.config.stage_ends", "scene.step == 0", "test_measures"),
    ("experiments/measures.py", "\"mean\")[0]", "\"none\")[0]", "test_measures"),
    ("experiments/measures.py", "[task.answer(response) for response in batch.responses]", "batch.responses", "test_measures"),
    ("experiments/measures.py", "self.config.final_prompts if self.at_an_end else self.config.eval_prompts", "self.config.eval_prompts", "test_measures"),
    ("experiments/measures.py", "scene.pairs, scene.probe, scene.draws(\"evaluation\"), SAMPLES)\n\n\ndef accuracy_alone", "scene.pairs, scene.probe, generator(scene.step, \"evaluation\"), SAMPLES)\n\n\ndef accuracy_alone", "test_measures"),
    ("experiments/measures.py", "Measure(kernel, at_stage_ends, KERNEL)", "Measure(kernel, at_every_look, KERNEL)", "test_measures"),
    ("experiments/measures.py", "if any(not torch.equal(p, q)", "if any(torch.equal(p, q)", "test_measures"),
    ("experiments/measures.py", "self.phi, self.W = phi, W", "self.phi = phi", "test_measures"),
    ("experiments/runs.py", "{name: value + seen.get(name, math.nan) for name, value in self.so_far.items()}", "{name: seen.get(name, math.nan) for name in self.so_far}", "test_measures"),
    ("experiments/runs.py", "update = {name: seen.get(name, nothing) for name, nothing in (NO_UPDATE | SO_FAR).items()}", "update = NO_UPDATE | SO_FAR | seen", "test_measures"),
    ("experiments/runs.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "test_runs"),
    ("experiments/runs.py", "threading.Thread(target=end_with_parent, daemon=True).start()", "pass", "test_runs"),
    ("experiments/runs.py", "raise Damaged(f\"{file} is no policy", "raise RuntimeError(f\"{file} is no policy", "test_runs"),
    ("experiments/runs.py", "if len(headers) > 1:", "if False:", "test_runs"),
    ("experiments/runs.py", "if not all(file.exists() for file in files[job])", "if True", "test_runs"),
    ("experiments/runs.py", "sorted((out / \"parts\").glob(\"*.csv\"))", "reversed(sorted((out / \"parts\").glob(\"*.csv\")))", "test_runs"),
    ("experiments/runs.py", "os.replace(temporary, path)", "path.exists() or os.replace(temporary, path)", "test_runs"),
    ("experiments/runs.py", "f\"{value:.6g}\" if isinstance(value, float)", "f\"{value:.1g}\" if isinstance(value, float)", "test_measures"),
    ("experiments/tables.py", "\"accuracy_over_the_run\"] = [\n                statistics.fmean(row[\"accuracy\"] for row in rows[1:] or rows)", "\"accuracy_over_the_run\"] = [\n                statistics.fmean(row[\"accuracy\"] for row in rows)", "test_tables"),
    ("experiments/tables.py", "values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]", "x - y for x, y in zip(values[0].values(), values[1].values())", "test_tables"),
    ("experiments/tables.py", "len(values), f\"{statistics.fmean(values)", "len(values), f\"{statistics.median(values)", "test_tables"),
    ("experiments/one_update.py", "sgd, adam = {name: -LR * gradient", "sgd, adam = {name: LR * gradient", "test_one_update_page"),
    ("experiments/one_update.py", "return len(patterns), 0 < batch.rewards[p].mean() < 1", "return len(patterns), True", "test_one_update_page"),
    ("experiments/one_update.py", "(advantages @ g)[patterns]", "(advantages.abs() @ g)[patterns]", "test_one_update_page"),
    ("experiments/one_update.py", "LR / count * part", "LR * part", "test_one_update_page"),
    ("experiments/one_update.py", "probabilities @ dlogits[0]", "dlogits[0].mean()", "test_one_update_page"),
    ("ntk.py", "A * (phi @ phi.T) * (g @ g.T)", "A.T * (phi @ phi.T) * (g @ g.T)", "test_influence"),
    ("ntk.py", "g = residuals(phi @ W.T, tokens[row, t + 1])", "g = residuals(phi @ W.T, tokens[row, t])", "test_influence"),
    ("experiments/tables.py", "for each in (arm, base)]\n    return [values", "for each in (arm, arm)]\n    return [values", "test_tables"),
    ("experiments/claims.py", "min(curve) / curve[0]", "min(curve) / curve[-1]", "test_readme"),
    ("experiments/cli.py", "if not asking_a_saved_run(args):\n                    stack", "if True:\n                    stack", "test_cli"),
    ("experiments/cli.py", "except KeyboardInterrupt:", "except ZeroDivisionError:", "test_cli"),
    ("experiments/cli.py", "self.exit(2,", "self.exit(1,", "test_cli"),
    ("experiments/cli.py", "os.set_inheritable(descriptor, True)", "pass", "test_runs"),
    ("experiments/cli.py", "os.O_RDWR)) <= 2:", "os.O_RDWR)) < 0:", "test_runs"),
    ("experiments/cli.py", "stream.reconfigure(encoding=\"utf-8\", errors=\"backslashreplace\")", "stream.reconfigure(errors=\"backslashreplace\")", "test_cli"),
    ("experiments/cli.py", "stream.reconfigure(encoding=\"utf-8\", errors=\"backslashreplace\")", "stream.reconfigure(encoding=\"utf-8\")", "test_cli"),
    ("experiments/cli.py", "    open_streams()\n    torch", "    torch", "test_cli"),
    ("experiments/cli.py", "if stream is None:", "if False:", "test_cli"),
    ("experiments/cli.py", "if threading.current_thread() is threading.main_thread():", "if True:", "test_cli"),
    ("experiments/cli.py", "\"_inheriting\", False)", "\"no\", False)", "test_cli"),
    ("experiments/cli.py", "break_on_hyphens=False, break_long_words=False)", "break_long_words=False)", "test_cli"),
    ("experiments/cli.py", "break_on_hyphens=False, break_long_words=False)", "break_on_hyphens=False)", "test_cli"),
    ("experiments/cli.py", "except (ImportError, ValueError) as error:  # the latter", "except ImportError as error:  # the latter", "test_cli"),
    ("experiments/runs.py", "except OSError as error:  # of a read-only", "except KeyError as error:  # of a read-only", "test_cli"),
    ("experiments/runs.py", "textwrap.fill(text, 80, break_on_hyphens=False)", "textwrap.fill(text, 80)", "test_cli"),
    ("experiments/cli.py", "return 1 if complaints else 0", "return 0", "test_runs"),
    ("train_toy.py", "watch.write_row({})", "watch.write_row({\"step\": 1})", "test_measures"),
    ("experiments/trl_recipe.py", "if self.freeze and state.global_step < self.classifier_steps:", "if self.freeze and state.global_step <= self.classifier_steps:", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if self.freeze and state", "if state", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "p.grad = None", "p.grad.zero_()", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "set(model.parameters()) - classifier", "set(model.parameters())", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if state.global_step == self.classifier_steps:", "if state.global_step == self.classifier_steps + 1:", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "            optimizer.state.clear()", "            pass", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if head is None:", "if False:", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "p is head.weight or place(p) == place(head.weight) != 0", "p is head.weight", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "p is head.weight or place(p) == place(head.weight) != 0", "place(p) == place(model.get_input_embeddings().weight)", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "model.config.tie_word_embeddings = False; ", "", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if self.classifier_steps > state.max_steps:", "if False:", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "not isinstance(classifier_steps, Integral)", "type(classifier_steps) is not int", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "or classifier_steps < 0", "", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "return int(classifier_steps)", "return classifier_steps", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "lr=float(lr), classifier_lr=float(classifier_lr)", "lr=lr, classifier_lr=classifier_lr", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if args.fsdp or args.deepspeed:", "if False:", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if any(id(p) not in known or not p.requires_grad for p in model.parameters()):", "if False:", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if state.global_step == 0 and optimizer.state:", "if False:", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "        check_resumed(state.stateful_callbacks", "        str(state.stateful_callbacks", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "{\"classifier_steps\": self.classifier_steps, \"freeze\": self.freeze}, \"attributes\"", "{\"classifier_steps\": self.classifier_steps}, \"attributes\"", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "        check_resumed(state_dict.get(\"settings\"), self.settings)\n", "", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "self.last_epoch >= self.settings", "self.last_epoch > self.settings", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "weight_decay=0.0", "weight_decay=0.1", "test_trl_recipe"),
    ("experiments/trl_recipe.py", "if all(p is not q for q in classifier)", "if p.ndim > 1 and all(p is not q for q in classifier)", "test_trl_recipe"),
    ("experiments/verdicts.py", "cos().clamp(min=0) ** (freedom - 1)", "cos().clamp(min=0) ** freedom", "test_verdicts"),
    ("experiments/verdicts.py", "student_t((1 + level) / 2", "student_t(level", "test_verdicts"),
    ("experiments/verdicts.py", "1 - level / looks", "1 - level", "test_verdicts"),
    ("experiments/verdicts.py", "for level in (0.1, 0.05)", "for level in (0.05, 0.05)", "test_verdicts"),
    ("experiments/verdicts.py", "\"more\" if mean > 0", "\"more\" if mean < 0", "test_verdicts"),
    ("experiments/verdicts.py", "abs(mean) + narrow", "narrow", "test_verdicts"),
    ("experiments/verdicts.py", "if len(values) < 2:", "if not values:", "test_verdicts"),
    ("experiments/verdicts.py", "not values or not all(", "not all(", "test_verdicts"),
    ("experiments/verdicts.py", "abs(value) < 1e150", "math.isfinite(value)", "test_verdicts"),
    ("experiments/verdicts.py", "check_counts(looks=looks)", "pass", "test_verdicts"),
    ("experiments/verdicts.py", "check(0 <= margin < math.inf,", "check(not margin < 0,", "test_verdicts"),
    ("experiments/verdicts.py", "check(1e-6 <= p <= 1 - 1e-6,", "check(0 < p,", "test_verdicts"),
    ("experiments/tables.py", "if median < math.inf else 'never'", "if median else 'never'", "test_tables"),
    ("experiments/arms.py", "\"classifier_lr\": multiple * config.lr", "\"classifier_lr\": multiple", "test_order"),
    ("experiments/arms.py", "\"classifier_steps\": length,", "", "test_order"),
    ("experiments/arms.py", "constant = [(self.rl_steps, multiple)", "constant = [(1, multiple)", "test_order"),
    ("experiments/arms.py", "if bool(self.stage_lengths) != bool(self.rate_multiples):", "if False:", "test_order"),
    ("experiments/arms.py", "check(all(0 < value < math.inf for value in values),", "check(True,", "test_order"),
    ("experiments/order.py", "step <= cell[0] and value", "value", "test_order"),
    ("experiments/order.py", "pair = arm_at(CF_RL, cell), arm_at(base, cell)", "pair = arm_at(CF_RL, cell), arm_at(base, config.cells[0])", "test_order"),
    ("experiments/order.py", "looks, rows = len(config.cells) * len(BASES)", "looks, rows = 1", "test_order"),
    ("experiments/order.py", "statistics.fmean(summary[arm][RUN])) for way", "len(arm)) for way", "test_order"),
    ("model.py", "cache)[:, -1:])", "cache)[:, :1])", "test_model"),
    ("minicfrl.py", "(tokens.size(1) - 1 - logits.size(1), 0)", "(0, tokens.size(1) - 1 - logits.size(1))", "test_real_model"),
    ("minicfrl.py", "self.mask[:, -self.logits.size(1) :]", "self.mask[:, : self.logits.size(1)]", "test_measures"),
    ("experiments/claims.py", "rest = len(steps) - 1 - max(end, same)", "rest = len(steps) - 1 - end", "test_claims"),
    ("experiments/claims.py", "theirs[same + rest] - theirs[same]", "theirs[rest] - theirs[0]", "test_claims"),
    ("experiments/claims.py", "if p >= least]", "]", "test_claims"),
    ("experiments/claims.py", "said = judge(differences, margin, self.looks)", "said = judge(differences, margin)", "test_claims"),
    ("experiments/claims.py", "gap / (1 - own)", "gap / own", "test_claims"),
    ("experiments/speed.py", "if value >= threshold", "if value > threshold", "test_speed"),
    ("experiments/speed.py", "if value >= threshold), config.rl_steps)", "if value >= threshold), 0)", "test_speed"),
    ("experiments/speed.py", "0 < step <= max(until[seed], steps[1])", "0 < step", "test_speed"),
    ("experiments/speed.py", "TIME_MARGIN * statistics.fmean(times(config, summary, \"rl\", threshold).values())", "MARGIN", "test_speed"),
    ("experiments/speed.py", "margins * self.margin(config, summary), looks)", "self.margin(config, summary), looks)", "test_speed"),
    ("experiments/speed.py", "summary, arm, base, len(pairs))", "summary, arm, base, 1)", "test_speed"),
    ("experiments/verdicts.py", "n = seeds or len(values)", "n = len(values)", "test_verdicts"),
    ("experiments/verdicts.py", "torch.lerp(angle[i - 1], angle[i], part)", "angle[i]", "test_verdicts"),
    ("experiments/verdicts.py", "torch.cat((below.new_zeros(1), below / below[-1]))", "below / below[-1]", "test_verdicts"),
    ("experiments/verdicts.py", "margin, looks, n) != \"undecided\"", "margin, 1, n) != \"undecided\"", "test_verdicts"),
    ("experiments/verdicts.py", "+ more.start", "", "test_verdicts"),
    ("experiments/speed.py", "each.margin(config, summary), len(pairs))} seeds", "each.margin(config, summary))} seeds", "test_speed"),
    ("experiments/report.py", "[seed + config.seeds for seed in row[\"seed\"]]", "row[\"seed\"]", "test_speed"),
    ("experiments/report.py", "joined(row, counted[arm]) if arm in counted else row", "joined(row, counted.get(arm, row))", "test_speed"),
    ("experiments/speed.py", "(\"slower\", \"faster\", \"as fast\")", "(\"faster\", \"slower\", \"as fast\")", "test_speed"),
    ("experiments/knobs.py", "model.body.norm.bias /= a", "model.body.norm.bias *= a", "test_knobs"),
    ("experiments/knobs.py", "F.pad(model.classifier.weight.detach(), (0, 1))", "F.pad(model.classifier.weight.detach(), (0, 1), value=1.0)", "test_knobs"),
    ("experiments/knobs.py", "self.size.expand", "self.size.square().expand", "test_knobs"),
    ("experiments/arms.py", "[: model.classifier.weight.numel()]] = 1", "[: len(chosen) // 2]] = 1", "test_arms"),
    ("experiments/arms.py", "record[\"step\"] == rl.stages[0].steps", "False", "test_arms"),
    ("experiments/arms.py", "if config.passes == 2 else train_rl", "if False else train_rl", "test_arms"),
    ("experiments/arms.py", "cuts = [i * rest.steps // (n + 1)", "cuts = [min(i, 1) * rest.steps", "test_arms"),
    ("experiments/variations.py", "vars(p).setdefault(\"adam\", {})", "{}", "test_arms"),
    ("experiments/variations.py", "clip_grad_norm_(minicfrl._parameters(self), 1.0)", "clip_grad_norm_(minicfrl._parameters(self), 2.0)", "test_arms"),
    ("experiments/variations.py", "torch.minimum(ratio * A,", "torch.maximum(ratio * A,", "test_arms"),
    ("experiments/variations.py", "max(len(answer), len(right))", "len(right)", "test_arms"),
    ("experiments/runs.py", "        add_constant(model, 0.0)", "        pass", "test_arms"),
    ("experiments/verdicts.py", "(\"slightly \" if within else \"\") + ", "", "test_verdicts"),
    ("experiments/order.py", "judge(gap, looks=len(ACCOUNTS) * len(bases))", "judge(gap)", "test_order"),
    ("experiments/tables.py", "if not set.intersection(*seeds):", "if not all(seeds):", "test_tables"),
    ("experiments/order.py", "np.maximum(steps - length, 0)", "steps", "test_order"),
    ("experiments/order.py", "np.where(steps <= length, 2, 4)", "np.where(steps <= length, 4, 4)", "test_order"),
    ("experiments/order.py", "min(paid[-1] for paid, _ in runs)", "max(paid[-1] for paid, _ in runs)", "test_order"),
    ("experiments/order.py", "np.append(np.diff(paid) > 0, True)", "np.append(True, np.diff(paid) > 0)", "test_order"),
    ("ntk.py", "return phi0 @ dW.T, dphi @ W0.T, dphi @ dW.T", "return phi1 @ dW.T, dphi @ W0.T, dphi @ dW.T", "test_any_model"),
    ("ntk.py", "dphi @ W0.T, dphi @ dW.T", "dphi @ W1.T, dphi @ dW.T", "test_any_model"),
    ("ntk.py", "(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (phi0, W0, phi1, W1))", "(phi0, W0, phi1, W1)", "test_any_model"),
    ("ntk.py", "\"by_body\": through_body}", "\"by_body\": through_body + cross}", "test_any_model"),
    ("ntk.py", "and W0.shape[1:] == phi0.shape[1:]", "", "test_any_model"),
    ("experiments/any_model.py", "elif not linear:", "elif False:", "test_any_model"),
    ("experiments/any_model.py", "10 * eps *", "1e4 * eps *", "test_any_model"),
    ("experiments/any_model.py", "10 * eps *", "0 * eps *", "test_any_model"),
    ("experiments/any_model.py", "elif entered.shape != phi.shape or not torch.equal(entered.to(phi.dtype), phi):", "elif entered.shape != phi.shape:", "test_any_model"),
    ("experiments/any_model.py", "elif not torch.equal(instead.to(logits.dtype), logits):", "elif False:", "test_any_model"),
    ("experiments/any_model.py", "torch.linspace(-1e4, 1e4,", "torch.linspace(-1e-2, 1e-2,", "test_any_model"),
    ("experiments/any_model.py", "if getattr(head, \"bias\", None) is not None:", "if False:", "test_any_model"),
    ("experiments/any_model.py", "(phi, False, logits)", "(phi, True, logits)", "test_any_model"),
    ("experiments/any_model.py", "        hook.remove()", "        pass", "test_any_model"),
    ("experiments/real_model.py", "tuple(part[before] for part in block)", "tuple(part[: len(before)] for part in block)", "test_real_model"),
    ("experiments/any_model.py", "head.weight.detach().clone()", "head.weight", "test_real_model"),
    ("experiments/real_model.py", "pieces.append((phi + self.offset, rows))", "pieces.append((phi, rows))", "test_real_model"),
    ("experiments/real_model.py", "torch.where(ended, (~ended).int().argmax(), torch.arange(B))", "torch.arange(B)", "test_real_model"),
    ("experiments/real_model.py", "(*self.shared, *range(prompt + 1, T))", "self.shared", "test_real_model"),
    ("experiments/real_model.py", "rows[alike]", "rows", "test_real_model"),
    ("experiments/real_model.py", "self.classifier(phi[:, -1:])[rows]", "self.classifier(phi[:, :1])[rows]", "test_real_model"),
    ("experiments/real_model.py", "while piece := file.read(2**20):", "if piece := file.read(2**10):", "test_real_model"),
    ("experiments/measures.py", "(p is W) == of_W", "of_W", "test_measures"),
    ("experiments/measures.py", "(far / norm).item()", "far.item()", "test_measures"),
    ("minicfrl.py", "model.features(tokens)[:, -1 - L : -1], tokens[:, -L:]", "model.features(tokens)[:, -L:], tokens[:, -L:]", "test_train"),
    ("ntk.py", "type(m) is not nn.Embedding", "False", "test_any_policy"),
    ("experiments/any_model.py", "return self.base(tokens, use_cache=False).last_hidden_state", "return self.base(tokens, use_cache=False).last_hidden_state.detach()", "test_any_policy"),
    ("experiments/predictors.py", "(right[of] / right.sum()) @ (phi @ phi.T)", "(right[of] / right.sum()) @ phi.new_ones(len(phi), len(phi))", "test_any_policy"),
    ("experiments/predictors.py", "p.grad = -gradient", "p.grad = gradient", "test_any_policy"),
    ("experiments/predictors.py", "p.copy_(value)", "p + value", "test_any_policy"),
    ("experiments/predictors.py", "\"adam\": torch.sign,", "\"adam\": torch.square,", "test_any_policy"),
    ("experiments/predictors.py", "shares[kind] = R / (R + G)", "shares[kind] = R / G", "test_any_policy"),
    ("experiments/predictors.py", "argsort().argsort()", "argsort()", "test_any_policy"),
    ("experiments/predictors.py", "if right.any() and not right.all():", "if right.any():", "test_any_policy"),
    ("experiments/one_update.py", "parameter.grad = gradients[name]", "parameter.grad = -gradients[name]", "test_one_update_page"),
    ("experiments/trl_recipe.py", "tie_word_embeddings=True", "tie_word_embeddings=False", "test_trl_recipe"),
    ("experiments/claims.py", "looks=len(ANSWERS))", "looks=1)", "test_claims"),
    ("experiments/claims.py", "arm == name or arm.startswith(f\"{name}-{self.config.rl_steps}x\")", "arm.startswith(name)", "test_claims"),
    ("experiments/claims.py", "== \"yes\" for gap in gaps)", "!= \"no\" for gap in gaps)", "test_claims"),
    ("experiments/real_model.py", "sum(dim=1).exp()", "mean(dim=1).exp()", "test_real_model"),
    ("experiments/real_model.py", "response == str(int(a) + int(b))", "response.startswith(str(int(a) + int(b)))", "test_real_model"),
    ("experiments/real_model.py", "type(head) is not nn.Linear or head.bias is not None", "type(head) is not nn.Linear", "test_real_model"),
    ("experiments/real_model.py", "    check_linear(lm, plain)\n", "", "test_real_model"),
    ("experiments/real_model.py", "except Exception as error:  # of many kinds", "except KeyError as error:  # of many kinds", "test_real_model"),
    ("experiments/real_model.py", "if len(tokens) != len(text) or tokens", "if tokens", "test_real_model"),
    ("experiments/real_model.py", "len(tokens) != len(text) or tokens != [token for character in text for token in encode(character)]", "len(tokens) != len(text)", "test_real_model"),
    ("experiments/runs.py", "if self.config.is_looked_at(self.row[\"arm\"], record[\"step\"]):", "if record[\"step\"] % self.config.eval_every == 0:", "test_real_model"),
    ("experiments/real_model.py", "not arm_named(arm).imitation(self),", "True,", "test_real_model"),
    ("experiments/real_model.py", "        load(config)\n    return config", "        pass\n    return config", "test_real_model"),
    ("experiments/real_model.py", "    with torch.device(config.device):", "    with torch.device(\"cpu\"):", "test_real_model"),
    ("experiments/real_model.py", "check(not (self.tiny and self.model),", "check(True,", "test_real_model"),
    ("experiments/real_model.py", "check(needed <= there,", "check(True,", "test_real_model"),
    ("experiments/trl_microscope.py", "control.should_log = due", "pass", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "module.training = training", "module.training = True", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "        model.eval()", "        pass", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "self.before = self.before, self.look()", "self.before = self.before, self.before", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "Trainer.log(self.trainer, {", "self.trainer.log({", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "        check_linear(model, self.passed)\n", "", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "getattr(model, \"_original_forward\", mixed)", "mixed", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "            if mixed:\n                model.forward = mixed\n", "", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "if x.dtype in coarse and", "if False and", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "attention_mask.argsort(dim=1, descending=True, stable=True)", "attention_mask.argsort(dim=1, stable=True)", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "elif getattr(trainer.processing_class, \"pad_token_id\", None) in tokens[:, 0].tolist():", "elif False:", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "if attention_mask.shape != tokens.shape or (mask & (attention_mask == 0)).any():", "if attention_mask.shape != tokens.shape:", "test_trl_microscope"),
    ("experiments/trl_microscope.py", "if torch.finfo(phi.dtype).bits < 32:", "if False:", "test_trl_microscope"),
    ("experiments/runs.py", "in_range = all(", "in_range = True or all(", "test_runs"),
    ("experiments/runs.py", "== expected\n", "is not None\n", "test_fuzz"),
    ("experiments/runs.py", "odd = sorted(names ^ known)", "odd = []", "test_runs"),
    ("experiments/runs.py", "text[: text.rfind(\"\\n\") + 1]", "text", "test_runs"),
    ("experiments/runs.py", "if zipfile.ZipFile(io.BytesIO(content)).testzip():", "if False:", "test_fuzz"),
]  # fmt: skip


def known_killers():
    """{(file, old, new): the test that killed the row when the table was written}."""
    row = re.compile(r"^\| .*? \| `(\S+)`: `` (.*?) `` → `` (.*?) `` \| `(\S+)` \|$", re.MULTILINE)
    return {(file, old, new): test for file, old, new, test in row.findall(PAGE.read_text(encoding="utf-8"))}


def cell(text):
    """Code as one line of a table."""
    return " ".join(text.split()).replace("|", "¦")


def first_failure(folder, tests):
    """The first test of `tests` that fails in the folder, "a time limit" if they hang, or None if all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *tests]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # upon which its tests end what they have started, in sessions of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        return "a time limit"
    finally:  # with whatever the broken code has left running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[| |$)", output, re.MULTILINE)
    if not failed:
        raise RuntimeError(f"no test ran: {output[-500:]}")
    return failed[1]


def killer(folder, row, known):
    """The test that fails once `old` is `new`, or None. ValueError if the code has no such text, or several."""
    file, old, new, tests = row
    source = ROOT / file
    text = source.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times {old!r}")
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    try:
        likely = known.get((file, cell(old), cell(new)))
        dead = likely and (ROOT / likely.split("::")[0]).exists() and first_failure(folder, [likely])
        return dead or first_failure(folder, [f"tests/{tests}.py"])
    finally:
        shutil.copy(source, folder / file)


def main(words):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, it would be so in the tests
    chosen = [row for row in MUTANTS if all(word in " ".join(row) for word in words)]
    if importlib.util.find_spec("trl") is None:
        skipped = [row for row in chosen if row[3] in NEED_TRL]
        chosen = [row for row in chosen if row not in skipped]
        print(f"{len(skipped)} rows about real models are left out: they need the extra trl")
    known, mine = known_killers(), threading.local()
    with tempfile.TemporaryDirectory() as name, tqdm(total=len(chosen), disable=None) as bar:

        def copy_of_the_project():
            mine.folder = Path(name) / str(threading.get_ident())
            shutil.copytree(ROOT, mine.folder, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))

        def run(row):
            dead = killer(mine.folder, row, known)
            bar.write(f"{'killed by ' + dead if dead else 'SURVIVED'}  {row[0]}: {cell(row[1])}  ->  {cell(row[2])}")
            bar.update()
            return dead

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), initializer=copy_of_the_project) as pool:
            killers = dict(zip(chosen, pool.map(run, chosen), strict=True))
    survivors = [row for row, dead in killers.items() if dead is None]
    print(f"{len(killers)} mutants, {len(survivors)} survived")
    write_table(killers, known)
    return 1 if survivors else 0


def write_table(killers, known):
    """What each test is there for, in tests/mutants.md: the rows that were killed, now or when they were last run."""
    lines = ["| claim | mutant | killed by |", "| --- | --- | --- |"]
    for row in MUTANTS:
        file, old, new = row[0], cell(row[1]), cell(row[2])
        dead = killers.get(row, known.get((file, old, new)))
        if not dead:
            continue
        claim = re.sub(r"^test_", "", dead.split("::")[-1]).replace("_", " ")
        lines.append(f"| {claim} | `{file}`: `` {old} `` → `` {new} `` | `{dead}` |")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- mutants -->\n")
    _, _, after = rest.partition("<!-- end -->")
    PAGE.write_text(f"{before}<!-- mutants -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

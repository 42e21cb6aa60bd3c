"""Break the code on purpose, one line at a time, and expect a test to fail: python tests/mutants.py [WORD ...]

Each row: file, the line's text, what replaces it, and the test file that must turn red. A mutant that survives is a
claim nobody checks; the exit code says whether any did. With WORDs only the rows that contain them all are run. What
is found goes to the table of tests/mutants.md, which also says which test killed a row last time: that is tried first.
Another table of rows can be run by the same `main`.
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
SECONDS = 120  # for the tests of a row; what hangs is as dead as what fails

MUTANTS = [
    ("model.py", "triu(so_far - T + 1)", "triu(so_far - T + 2)", "test_model"),
    ("model.py", "-math.inf", "-4.0", "test_model"),
    ("model.py", "torch.arange(start, end,", "torch.arange(0, end - start,", "test_model"),
    ("model.py", "last.softmax(1)", "(last / 0.9).softmax(1)", "test_model"),
    ("model.py", "mask = torch.cat((mask, ~ended[:, None]), dim=1)", "mask = torch.cat((mask, token != end_token), dim=1)", "test_model"),
    ("model.py", "config.vocab_size, bias=False", "config.vocab_size, bias=True", "test_model"),
    ("model.py", "repeat_interleave(samples, dim=0) for x", "repeat(samples, 1, 1, 1) for x", "test_model"),
    ("model.py", "0.1 / math.sqrt(2", "torch.rand(()).item() / math.sqrt(2", "test_model"),
    ("minicfrl.py", "span <= rounding", "span < 0", "test_advantages"),
    ("minicfrl.py", "advantages = rewards - rewards.mean(dim=1, keepdim=True)", "advantages = rewards - rewards.mean()", "test_advantages"),
    ("minicfrl.py", "correction=0", "correction=1", "test_advantages"),
    ("minicfrl.py", "advantages * S / max(S - 1, 1)", "advantages", "test_advantages"),
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
    ("minicfrl.py", "optimizer, trained = _optimizer(model, stage, OPTIMIZERS.get(config.optimizer, config.optimizer))  # (E5)", "optimizer, trained = (optimizer, trained) if number > 1 else _optimizer(model, stage, OPTIMIZERS.get(config.optimizer, config.optimizer))", "test_train"),
    ("minicfrl.py", "optimizer, trained = _optimizer(model, stage, OPTIMIZERS.get(config.optimizer, config.optimizer))  # (E5)", "optimizer, trained = (optimizer, trained) if number == 3 else _optimizer(model, stage, OPTIMIZERS.get(config.optimizer, config.optimizer))", "test_train"),
    ("minicfrl.py", "optimizer, trained = _optimizer(model, stage, lambda groups: OPTIMIZERS[\"adam\"](groups, betas=(0.9, 0.98)))", "optimizer, trained = (optimizer, trained) if number == 3 else _optimizer(model, stage, lambda groups: OPTIMIZERS[\"adam\"](groups, betas=(0.9, 0.98)))", "test_train"),
    ("minicfrl.py", "set_grad_enabled(stage.trains != \"classifier\")", "set_grad_enabled(True)", "test_train"),
    ("minicfrl.py", "stage.lr if stage.classifier_lr is None else stage.classifier_lr", "stage.lr", "test_train"),
    ("minicfrl.py", "f\"{name}.\".startswith(f\"{stage.trains}.\")", "name.startswith(\"classifier\")", "test_train"),
    ("minicfrl.py", "f\"{name}.\".startswith(f\"{stage.trains}.\")", "name.startswith(stage.trains)", "test_train"),
    ("minicfrl.py", "check(isinstance(generator, torch.Generator),", "check(True,", "test_train"),
    ("minicfrl.py", "    check(trained, f\"trains={stage.trains!r} names no parameter of the model that can be trained\")\n", "", "test_train"),
    ("minicfrl.py", "named_parameters() if p.requires_grad]", "named_parameters()]", "test_train"),
    ("minicfrl.py", "for p in trained if p.grad is not None]", "for p in trained]", "test_train"),
    ("minicfrl.py", "        loss.backward(inputs=trained)\n\n\ndef _optimizer", "        loss.backward()\n\n\ndef _optimizer", "test_train"),
    ("minicfrl.py", "            loss.backward(inputs=trained)\n            with naming", "            loss.backward()\n            with naming", "test_train"),
    ("minicfrl.py", "isinstance(stages, tuple) and stages and all", "isinstance(stages, tuple) and all", "test_train"),
    ("minicfrl.py", "responses[-1]) * ended", "responses[-1])", "test_train"),
    ("minicfrl.py", "return task.train_pairs[torch.randint(len(task.train_pairs), (count,)", "return task.heldout_pairs[torch.randint(len(task.heldout_pairs), (count,)", "test_train"),
    ("minicfrl.py", "torch.minimum(draw, draw.T)", "draw / 2", "test_task"),
    ("minicfrl.py", "return rest if pattern in (\"d\", \"g\") else None", "return rest", "test_task"),
    ("minicfrl.py", "divmod(x + y + carry, 10)", "divmod(x + y, 10)", "test_task"),
    ("minicfrl.py", "if character not in self.alphabet:", "if False:", "test_task"),
    ("model.py", "math.sqrt(d // self.n_head)", "math.sqrt(d)", "test_model"),
    ("model.py", "nn.GELU()", "nn.ReLU()", "test_model"),
    ("model.py", "x + self.mlp(self.mlp_norm(x))", "x + self.mlp(x)", "test_model"),
    ("minicfrl.py", ", dtype=torch.float32)", ")", "test_task"),
    ("minicfrl.py", "held_out.nonzero()[order]", "held_out.nonzero()", "test_task"),
    ("minicfrl.py", "4 * torch.finfo(rewards.dtype).eps", "0 * torch.finfo(rewards.dtype).eps", "test_advantages"),
    ("minicfrl.py", "noise=config.noise", "noise=0.0", "test_train"),
    ("minicfrl.py", "torch.tensor([*map(float, config.mixture)])", "torch.ones(3)", "test_train"),
    ("minicfrl.py", "[*map(float, config.mixture)]", "config.mixture", "test_policy_and_task"),
    ("minicfrl.py", "[False] * len(start) + [True]", "[True] * len(start) + [True]", "test_train"),
    ("minicfrl.py", "(len(row) - len(start))", "(len(row) - len(prompt))", "test_policy_and_task"),
    ("minicfrl.py", "check(row[: len(start)] == start,", "check(True,", "test_policy_and_task"),
    ("minicfrl.py", "check(one_each,", "check(True,", "test_policy_and_task"),
    ("minicfrl.py", "check(len(set(map(len, encoded))) == 1,", "check(True,", "test_policy_and_task"),
    ("minicfrl.py", " * min(step / 20, 1 - (step - 1) / steps)", "", "test_train"),
    ("minicfrl.py", "if reference is not None:", "if reference is not None and not classifier_only:", "test_train"),
    ("minicfrl.py", "if p is not W], \"lr\": stage.lr}", "if p is not W], \"lr\": classifier_lr}", "test_train"),
    ("minicfrl.py", "trained = [p for name, p in named if stage.trains", "trained = [p for name, p in named if p is W or stage.trains", "test_train"),
    ("minicfrl.py", "OPTIMIZERS.get(config.optimizer, config.optimizer)", "torch.optim.Adam", "test_train"),
    ("minicfrl.py", "\"stage\": number,\n                \"reward\"", "\"stage\": min(number, 2),\n                \"reward\"", "test_train"),
    ("minicfrl.py", "classifier_lr=self.classifier_lr or 0.0)", "classifier_lr=0.0)", "test_train"),
    ("minicfrl.py", "if rest.count(\";\") == 1 else None", "if rest.count(\";\") else None", "test_task"),
    ("minicfrl.py", "\"flat\": (advantages == 0)", "\"flat\": (advantages != 0)", "test_train"),
    ("ntk.py", " and not torch.is_autocast_enabled(W.device.type)", "", "test_ntk"),
    ("ntk.py", "dphi @ parameters[\"classifier.weight\"].T", "dphi @ parameters[\"classifier.weight\"].abs().T", "test_one_update"),
    ("ntk.py", "check(not mask[:, -1].any(),", "check(True,", "test_influence"),
    ("ntk.py", "A * products[:, 0, :, 0]", "products[:, 0, :, 0]", "test_influence"),
    ("ntk.py", "        gradient = torch.einsum(\"va,namb,wb->nvmw\", W, gradient, W)", "        gradient = torch.einsum(\"va,namb,wb->nvmw\", W, gradient, W.abs())", "test_ntk"),
    ("ntk.py", "self.representation, identity)", "self.representation, identity + 1)", "test_ntk"),
    ("ntk.py", "return phi @ changes", "return -phi @ changes", "test_one_update"),
    ("ntk.py", "return -(pi * (logp", "return (pi * (logp", "test_confidence"),
    ("ntk.py", "(logp - (pi * logp).sum(dim=1, keepdim=True))", "logp", "test_confidence"),
    ("ntk.py", "- (pi * dlogits).sum(dim=1))", ")", "test_confidence"),
    ("ntk.py", "top * (dlogits", "(dlogits", "test_confidence"),
    ("ntk.py", "effect[\"change\"] - effect[\"by_W\"] - effect[\"by_body\"]", "effect[\"change\"] - effect[\"by_W\"]", "test_exact_split"),
    ("minicfrl.py", "count, L = int(batch.mask.sum())", "count, L = int(batch.mask[advantages != 0].sum())", "test_train"),
    ("minicfrl.py", "\"entropy\": entropy(batch.state_logits).mean().item()", "\"entropy\": 0.0", "test_train"),
    ("minicfrl.py", "torch.as_tensor(config.reward(batch, generator)", "torch.as_tensor(batch.rewards", "test_train"),
    ("minicfrl.py", "dtype=batch.rewards.dtype).detach()", "dtype=batch.rewards.dtype)", "test_policy_and_task"),
    ("minicfrl.py", "generator), dtype=batch.rewards.dtype)", "generator))", "test_policy_and_task"),
    ("minicfrl.py", "check(rewards.shape == batch.rewards.shape,", "check(rewards.numel() == batch.rewards.numel(),", "test_policy_and_task"),
    ("minicfrl.py", "prompts[i // samples]", "prompts[i % len(prompts)]", "test_train"),
    ("minicfrl.py", "    model.zero_grad()\n    for rows", "    for rows", "test_train"),
    ("minicfrl.py", "    model.zero_grad()\n    for rows", "    model.zero_grad(set_to_none=False)\n    for rows", "test_train"),
    ("minicfrl.py", "            model.zero_grad()\n            loss =", "            loss =", "test_train"),
    ("minicfrl.py", "_require_finite(\"gradient norm\", norm)\n    optimizer.step()", "optimizer.step()\n    _require_finite(\"gradient norm\", norm)", "test_train"),
    ("minicfrl.py", "betas=(0.9, 0.98)", "betas=(0.9, 0.999)", "test_train"),
    ("minicfrl.py", "_set_gradients(model, batch, advantages.flatten()", "_set_gradients(model, batch, advantages.T.flatten()", "test_train"),
    ("minicfrl.py", "(policy, batch.tokens) for policy in (model, reference)", "(policy, batch.tokens) for policy in (model, model)", "test_train"),
    ("minicfrl.py", "copy.deepcopy(model) if config.kl else None", "model if config.kl else None", "test_train"),
    ("minicfrl.py", "task.decode(response[: length - ended])", "task.decode(response[:length])", "test_train"),
    ("minicfrl.py", "zeros_like(self.mask[:, :1])), dim=1)", "zeros_like(self.mask[:, :1])), dim=1).roll(1, 1)", "test_train"),
    ("minicfrl.py", "grouped = self.samples > 1", "grouped = self.samples > 0", "test_train"),
    ("minicfrl.py", "check(count >= 1,", "check(count >= 0,", "test_policy_gradient"),
    ("model.py", "token[ended] = end_token", "pass", "test_model"),
    ("model.py", "if not last.isfinite().all():", "if False:", "test_train"),
    ("model.py", "if T > 1:", "if T > 2:", "test_model"),
    ("model.py", "return self.norm(x)", "return x", "test_model"),
    ("model.py", "actions] += 1", "actions] += 2", "test_policy_gradient"),
    ("model.py", "cache)[:, -1:])", "cache)[:, :1])", "test_model"),
    ("minicfrl.py", "(tokens.size(1) - 1 - logits.size(1), 0)", "(0, tokens.size(1) - 1 - logits.size(1))", "test_policy_and_task"),
    ("ntk.py", "return phi0 @ dW.T, dphi @ W0.T, dphi @ dW.T", "return phi1 @ dW.T, dphi @ W0.T, dphi @ dW.T", "test_exact_split"),
    ("ntk.py", "dphi @ W0.T, dphi @ dW.T", "dphi @ W1.T, dphi @ dW.T", "test_exact_split"),
    ("ntk.py", "(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (phi0, W0, phi1, W1))", "(phi0, W0, phi1, W1)", "test_exact_split"),
    ("ntk.py", "\"by_body\": through_body}", "\"by_body\": through_body + cross}", "test_exact_split"),
    ("ntk.py", "and W0.shape[1:] == phi0.shape[1:]", "", "test_exact_split"),
    ("minicfrl.py", "model.features(tokens)[:, -1 - L : -1]", "model.features(tokens)[:, -L:]", "test_train"),
    ("model.py", "model = getattr(model, \"_orig_mod\", model)", "model = model", "test_policy_and_task"),
    ("model.py", "plain = type(head) is nn.Linear", "plain = isinstance(head, nn.Linear)", "test_policy_and_task"),
    ("model.py", "and head.bias is None ", "", "test_policy_and_task"),
    ("model.py", " and isinstance(head.weight, nn.Parameter)", "", "test_policy_and_task"),
    ("model.py", "check(apart,", "check(True,", "test_policy_and_task"),
    ("model.py", "check(not odd,", "check(True,", "test_policy_and_task"),
    ("model.py", "rounding = 100 *", "rounding = 1e17 *", "test_policy_and_task"),
    ("model.py", "    check_tokens(model, tokens)\n    with torch", "    with torch", "test_policy_and_task"),
    ("train_toy.py", "\"control\": (Stage(20, \"all\", 4e-4, classifier_lr=8e-3)", "\"control\": (Stage(20, \"all\", 4e-4, classifier_lr=4e-3)", "test_train_toy"),
    ("train_toy.py", "f\"{purpose} {seed}\"", "f\"{purpose}\"", "test_train_toy"),
    ("train_toy.py", "f\"{purpose} {seed}\"", "f\"{seed}\"", "test_train_toy"),
    ("train_toy.py", "copy.deepcopy(start)", "start", "test_train_toy"),
    ("train_toy.py", "task.heldout_pairs[:prompts]", "task.train_pairs[:prompts]", "test_train_toy"),
    ("train_toy.py", "(phi, W), now = now, look(model, probe)", "(phi, W), now = now, now", "test_train_toy"),
    ("train_toy.py", "        rise += torch.stack", "        rise = torch.stack", "test_train_toy"),
    ("train_toy.py", "exact_split(phi, W, *now)[:2]", "exact_split(phi, W, *now)[1::-1]", "test_train_toy"),
    ("train_toy.py", "if accuracy >= threshold", "if accuracy > threshold", "test_train_toy"),
    ("train_toy.py", "if step % EVERY == 0", "if step % EVERY == 1", "test_train_toy"),
    ("train_toy.py", "{confidence(batch.state_logits).mean():5.2f}", "{confidence(batch.logits).mean():5.2f}", "test_train_toy"),
    ("train_toy.py", "batch.logits[:, 0].softmax", "batch.logits[:, 1].softmax", "test_train_toy"),
    ("train_toy.py", "stream(seed, \"rl\"))", "stream(0, \"rl\"))", "test_train_toy"),
    ("train_toy.py", "        torch.set_num_threads(threads)\n", "        pass\n", "test_train_toy"),
    ("train_toy.py", "@torch.random.fork_rng(devices=[])", "@torch.random.fork_rng(devices=[], enabled=False)", "test_train_toy"),
    ("train_toy.py", "else 130", "else 0", "test_train_toy"),
    ("train_toy.py", "parser.exit(2,", "parser.exit(1,", "test_train_toy"),
    ("train_toy.py", "' '.join(message.split())", "message", "test_train_toy"),
    ("train_toy.py", "        task.operands(questions[0])\n", "        pass\n", "test_train_toy"),
    ("train_toy.py", "            import matplotlib", "            import sys", "test_train_toy"),
    ("train_toy.py", "args.plot.suffix == \".png\"", "True", "test_train_toy"),
    ("train_toy.py", "    except KeyboardInterrupt:", "    except ZeroDivisionError:", "test_train_toy"),
    ("ntk.py", "C = (r @ W)[:, None]", "C = (r @ W).abs()[:, None]", "test_influence"),
    ("ntk.py", "A * (phi @ phi.T) * (r @ r.T)", "A.T * (phi @ phi.T) * (r @ r.T)", "test_influence"),
    ("ntk.py", "r = residuals(phi @ W.T, tokens[row, t + 1])", "r = residuals(phi @ W.T, tokens[row, t])", "test_influence"),
    ("fast_ntk.py", "tie_weights=False", "tie_weights=True", "test_ntk"),
    ("fast_ntk.py", "places = {at: names[p]", "places = {names[p]: names[p]", "test_ntk"),
    ("fast_ntk.py", "m.named_parameters(path, False, False)", "m.named_parameters(path, False, False) if m in body.children()", "test_ntk"),
    ("fast_ntk.py", "products[m, :, m + 1 :] = products[m + 1 :, :, m].permute(2, 0, 1)", "pass", "test_ntk"),
    ("fast_ntk.py", "products[m + 1 :, :, m].permute(2, 0, 1)", "products[m + 1 :, :, m].permute(1, 0, 2)", "test_ntk"),
    ("fast_ntk.py", "if block2 is block else", "if block2 == block else", "test_ntk"),
    ("fast_ntk.py", "blocks2 if states2 else blocks[: i + 1]:", "blocks2 if states2 else blocks[:i]:", "test_influence"),
    ("fast_ntk.py", "x.expand(N, T), y.detach().expand(N, T, -1)", "x, y", "test_ntk"),
    ("fast_ntk.py", "if len(arguments) == 1 and isinstance(y, Tensor):", "if len(arguments) == 1:", "test_ntk"),
    ("fast_ntk.py", "if len(arguments) == 1 and isinstance(y, Tensor):", "if isinstance(y, Tensor):", "test_ntk"),
    ("fast_ntk.py", "if y.shape[:2] == (N, T):", "if True:", "test_ntk"),
    ("fast_ntk.py", "@torch.enable_grad()\n", "", "test_ntk"),
    ("fast_ntk.py", "            handle.remove()", "            pass", "test_ntk"),
    ("fast_ntk.py", "C[block].transpose(0, 1)", "C[block].transpose(0, 1).flip(0)", "test_ntk"),
    ("fast_ntk.py", "position.max() + 1]", "position.max() + 0]", "test_ntk"),
    ("fast_ntk.py", "set(dims.values()) <= {1} or", "", "test_ntk"),
    ("fast_ntk.py", "(g * slope(module, name, x)[:, None])", "(g * x[:, None])", "test_ntk"),
    ("fast_ntk.py", "slope(module, name, x)[:, None]", "slope(module, \"weight\", x)[:, None]", "test_ntk"),
    ("fast_ntk.py", "for name in names]\n        return", "for name in names[:1]]\n        return", "test_ntk"),
    ("fast_ntk.py", "value=1.0", "value=0.0", "test_ntk"),
    ("fast_ntk.py", "if \"bias\" in names:", "if True:", "test_ntk"),
    ("fast_ntk.py", "if g[:, :, t].any()), g.size(2) - 1)", "if g[:, :, t].any()), g.size(2) - 1) + 1", "test_ntk"),
    ("fast_ntk.py", "return x[:, start:], g[:, :, start:]", "return x[:, : x.size(1) - start], g[:, :, start:]", "test_ntk"),
    ("fast_ntk.py", "range(m if layers is layers2 else 0, N, TILE)", "range(m, N, TILE)", "test_ntk"),
    ("fast_ntk.py", "tile = slice(first, first + TILE)", "tile = slice(first, first + TILE - 1)", "test_ntk"),
    ("fast_ntk.py", "(x[tile] == x2[m].T).to(g.dtype)", "torch.ones_like(x[tile] == x2[m].T).to(g.dtype)", "test_ntk"),
    ("fast_ntk.py", "xx = x[tile] @ x2[m].T if", "xx = x[tile].abs() @ x2[m].T if", "test_ntk"),
    ("fast_ntk.py", "<= 1000 * torch.finfo", "<= 1e13 * torch.finfo", "test_ntk"),
    ("fast_ntk.py", "\"nu,nud,nd->\", a, C", "\"nu,nud,nd->\", a.abs(), C", "test_ntk"),
    ("fast_ntk.py", "direction(1, *states2)", "direction(1, *states)", "test_ntk"),
    ("fast_ntk.py", "if m in odd or not is_known(m)]", "if m in odd]", "test_ntk"),
]  # fmt: skip


def known_killers(page):
    """{(file, old, new): the test that killed the row when the table was written}."""
    row = re.compile(r"^\| .*? \| `(\S+)`: `` (.*?) `` → `` (.*?) `` \| `(\S+)` \|$", re.MULTILINE)
    return {(file, old, new): test for file, old, new, test in row.findall(page.read_text(encoding="utf-8"))}


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


def killer(folder, row, known, tests_folder):
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
        return dead or first_failure(folder, [f"{tests_folder}/{tests}.py"])
    finally:
        shutil.copy(source, folder / file)


def main(words, rows=MUTANTS, page=PAGE, need_trl=()):
    """Run the rows that hold the words; their tests lie beside the page. Those of `need_trl` need the extra trl."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, it would be so in the tests
    chosen = [row for row in rows if all(word in " ".join(row) for word in words)]
    if need_trl and importlib.util.find_spec("trl") is None:
        skipped = [row for row in chosen if row[3] in need_trl]
        chosen = [row for row in chosen if row not in skipped]
        print(f"{len(skipped)} rows about real models are left out: they need the extra trl")
    known, mine = known_killers(page), threading.local()
    with tempfile.TemporaryDirectory() as name, tqdm(total=len(chosen), disable=None) as bar:

        def copy_of_the_project():
            mine.folder = Path(name) / str(threading.get_ident())
            shutil.copytree(ROOT, mine.folder, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))

        def run(row):
            dead = killer(mine.folder, row, known, page.parent.relative_to(ROOT).as_posix())
            bar.write(f"{'killed by ' + dead if dead else 'SURVIVED'}  {row[0]}: {cell(row[1])}  ->  {cell(row[2])}")
            bar.update()
            return dead

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), initializer=copy_of_the_project) as pool:
            killers = dict(zip(chosen, pool.map(run, chosen), strict=True))
    survivors = [row for row, dead in killers.items() if dead is None]
    print(f"{len(killers)} mutants, {len(survivors)} survived")
    write_table(rows, page, killers, known)
    return 1 if survivors else 0


def write_table(rows, page, killers, known):
    """What each test is there for, in the page: the rows that were killed, now or when they were last run."""
    lines = ["| claim | mutant | killed by |", "| --- | --- | --- |"]
    for row in rows:
        file, old, new = row[0], cell(row[1]), cell(row[2])
        dead = killers.get(row, known.get((file, old, new)))
        if not dead:
            continue
        claim = re.sub(r"^test_", "", dead.split("::")[-1]).replace("_", " ")
        lines.append(f"| {claim} | `{file}`: `` {old} `` → `` {new} `` | `{dead}` |")
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- mutants -->\n")
    _, _, after = rest.partition("<!-- end -->")
    page.write_text(f"{before}<!-- mutants -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

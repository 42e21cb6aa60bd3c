"""A real model's jobs, on tiny random models: the book's loop sees them rightly, and what cannot work is refused."""

import socket
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    transformers = pytest.importorskip("transformers", reason='needs the extra: pip install -e ".[real]"')

from tiny import generator  # noqa: E402  after the check that it is there
from tiny_runs import contents  # noqa: E402
from tokenizers import Tokenizer, decoders, models  # noqa: E402  which transformers brings
from torch.distributions import Categorical, kl_divergence  # noqa: E402

from experiments import real_model, runs  # noqa: E402
from experiments.arms import WAYS, Arm, some, train_as  # noqa: E402
from experiments.judges import coin_flips  # noqa: E402
from experiments.real_model import CausalLM, RealExperiment, check_start  # noqa: E402
from minicfrl import policy_gradient_loss, rollout  # noqa: E402
from model import token_logp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=13)
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
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | more))


def whole(model, tokens):
    """Features and logits, where every row is read whole."""
    phi = model.body.base(tokens, use_cache=False).last_hidden_state
    return phi, model.classifier(phi)


def test_prefixes_read_once_give_the_features_and_the_gradients_of_whole_rows():
    """At all tokens up to the end token, and also while sampling. Read are the examples once, each prompt once, and
    every distinct beginning of the responses that had not ended before it. No row at all has a gradient of zeros."""
    model, read, (examples, prompt) = CausalLM(language_model(), TASK), [], TASK.shared
    batch = rollout(model, TASK, [TASK.prompt(*pair) for pair in TASK.train_pairs[:3].tolist()], 4, generator(1))
    tokens, mask, advantages = batch.tokens, batch.mask, torch.randn(12, generator=generator(2))
    assert not mask.all(dim=1).any() and mask[:, -1].any()  # some end before others
    with model.body.base.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel())):
        phi, logits = model.features(tokens), model(tokens)
    texts = [tuple(row) for row in tokens.tolist()]
    distinct = [{r[: t + 1] for r in texts if TASK.end_token not in r[prompt:t]} for t in range(prompt, len(texts[0]))]
    assert read == [examples, 3 * (prompt - examples), *map(len, distinct)] * 2
    whole_phi, whole_logits = whole(model, tokens)
    until = mask | (torch.arange(tokens.size(1)) < prompt)
    torch.testing.assert_close(phi[until], whole_phi[until], **CLOSE)
    torch.testing.assert_close(batch.state_logits, whole_logits[batch.state_mask], **CLOSE)
    gradients = []
    for each in (logits, whole_logits[:, prompt - 1 :]):
        loss = policy_gradient_loss(token_logp(each[:, :-1], tokens[:, prompt:]), advantages, mask[:, prompt:])
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    torch.testing.assert_close(*gradients, **CLOSE)
    assert sum(g.norm() for g in gradients[0]) > 0.1
    model.features(tokens[:0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.body.parameters())


def test_the_chance_of_a_right_response_is_that_of_its_tokens():
    """Against one row at a time, without padding; 10 + 0 has two digits, 99 + 9 three. And only the sum is right. A
    tenth of the pairs is held out."""
    model, pairs, by_hand = CausalLM(language_model(), TASK), torch.tensor([[10, 0], [99, 9], [47, 6]]), []
    for a, b in pairs.tolist():
        row = torch.tensor([TASK.encode(TASK.prompt(a, b) + f"{a + b}\n")])
        logp = token_logp(whole(model, row)[1][:, :-1], row[:, 1:])
        by_hand.append(logp[0, TASK.shared[-1] - 1 :].sum().exp())
    torch.testing.assert_close(real_model.success(model, TASK, pairs), torch.stack(by_hand), rtol=1e-4, atol=1e-9)
    right = [TASK.verify(TASK.prompt(47, 6), response) for response in ("53", "", "5", "533", "53 ", "47", "+53")]
    assert right == [1] + [0] * 6
    train, held = ({*map(tuple, pairs.tolist())} for pairs in (TASK.train_pairs, TASK.heldout_pairs))
    assert len(train | held) == 900 and len(held) == 90 and not train & held


def tiny(*arms, rl_steps=3, n=1, **more):
    """With coin flips for rewards, because a random model is never right."""
    settings = real_model.QUICK | dict(rl={"prompts": 4, "samples": 4, "reward": coin_flips}, every=1) | more
    return RealExperiment("tiny", list(arms), rl_steps=rl_steps, n=n, **settings)


def test_a_quick_run_measures_what_rests(tmp_path):
    """Nothing goes through the body in stage 1: the columns are exactly 0, and then not. A body that
    is trained alone moves features and not W. The accuracy is the mean chance of a right response."""
    x = tiny(*some("cf-rl control"), Arm("body-only", "alone", "body"))
    check_start(x)
    assert runs.run(x, tmp_path, real_model.rows_of) == []
    rows = contents(tmp_path)
    (start,), (first, second, _), (*_, last) = (rows[f"{arm}-seed0.csv"] for arm in ("sft", "cf-rl", x.arms[2].name))
    assert first["confidence_by_body"] == first["feature_change"] == 0 != second["confidence_by_body"]
    assert start["step"] == first["body_moved"] == 0 != first["W_moved"]
    assert last["W_moved"] == 0 < last["feature_change"]
    chances = real_model.success(CausalLM(*real_model.load(x)), TASK, TASK.heldout_pairs[: x.prompts])
    assert start["accuracy"] == pytest.approx(chances.mean().item(), rel=1e-4)


def test_what_a_policy_did_to_tokens_is_told_state_by_state():
    """Against distributions of one row at a time, on responses of a policy that was moved. A tenth of the states has
    the largest divergences."""
    start, model = CausalLM(language_model(), TASK), CausalLM(language_model(), TASK)
    with torch.no_grad():
        model.classifier.weight += torch.randn(13, 16, generator=generator(1))
    batch, told = rollout(model, TASK, [TASK.prompt(*pair) for pair in ((47, 6), (99, 9))], 8, generator(2)), []
    for row, mask in zip(batch.tokens, batch.mask, strict=True):
        for t in mask.nonzero().flatten().tolist():
            now, then = (whole(policy, row[None, :t])[1][0, -1].double() for policy in (model, start))
            kind = "_digit" if row[t] < 10 else "_newline" if row[t] == TASK.end_token else "_other"
            kl = kl_divergence(Categorical(logits=now), Categorical(logits=then)).item()
            told.append((kind, kl, float(now.argmax() != then.argmax())))
    now, then = (real_model.at_states(policy, batch) for policy in (model, start))
    row = real_model.by_token(TASK, now, then, batch, "own")
    for kind in ("", "_digit", "_newline", "_other"):
        changes = [changed for own, _, changed in told if own.startswith(kind)]
        assert row[f"own_changed{kind}"] == pytest.approx(sum(changes) / len(changes))
    kls = sorted((kl for _, kl, _ in told), reverse=True)
    assert row["own_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert row["own_top_tenth"] == pytest.approx(sum(kls[: len(kls) // 10]) / sum(kls), rel=1e-4)
    assert {*real_model.by_token(TASK, then, then, batch, "").values()} == {0.0}


def test_imitation_of_right_sums_makes_them_likelier():
    """Threefold in twenty updates of a random model, which learn that a sum is digits and then a newline."""
    x, model = tiny(Arm("ft", "", imitates=1, lr=0.02), rl_steps=20), CausalLM(language_model(), TASK)
    before = real_model.success(model, TASK, TASK.heldout_pairs).mean()
    assert [record["step"] for record in train_as(x.arms[0], x, 0, TASK, model)] == list(range(1, 21))
    assert real_model.success(model, TASK, TASK.heldout_pairs).mean() > 3 * before


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


def altered(patch, change):
    """A quick run, in which the body computes something else."""
    pieces = real_model.Body.pieces
    patch.setattr(real_model.Body, "pieces", lambda *given: [(change(phi), rows) for phi, rows in pieces(*given)])
    return tiny(WAYS["rl"])


CAPPED = dict(final_logit_softcapping=0.1, head_dim=8, num_key_value_heads=1)
REFUSED = {
    "holds no checkpoint of a causal LM: ": lambda folder, _: RealExperiment("other", some("rl"), model=str(folder)),
    "it lacks lm_head": lambda folder, _: saved(folder, language_model().base_model),
    "LM: it is no folder": lambda folder, _: RealExperiment("other", some("rl"), model=f"{folder}/none"),
    "does not fit the task: it does not write '105'": lambda folder, _: saved(folder, language_model(), [("1", "0")]),
    "task: it decodes": lambda folder, _: saved(folder, language_model(), (), decoders.WordPiece),
    "is no linear layer without bias": lambda folder, _: saved(folder, language_model("Phi")),
    "with shared prefixes read once: ": lambda folder, _: saved(folder, language_model("Mamba")),
    "its logits differ": lambda folder, _: saved(folder, language_model("Gemma2", **CAPPED)),
    "its features differ": lambda _, patch: altered(patch, lambda phi: 1.01 * phi),
    "its gradients differ": lambda _, patch: altered(patch, lambda phi: 2 * phi - phi.detach()),
    "finds no device 'meta'": lambda *_: tiny(WAYS["rl"], device="meta"),
    "trains body.base.layers.29, and the policy": lambda *_: tiny(Arm("one block", part="body.base.layers.29")),
    "only the toy has the knobs .*: turned": lambda *_: tiny(WAYS["lp-ft"], Arm("turned", knob=("a", 2))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message) as refusal:
        check_start(REFUSED[message](tmp_path, monkeypatch))
    assert "\n" not in str(refusal.value)

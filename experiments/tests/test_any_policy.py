"""Who teaches whom in a language model of transformers (E10): against autograd token by token, and against a step."""

import copy
import os
import warnings
from types import SimpleNamespace

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    transformers = pytest.importorskip("transformers", reason='needs the extra: pip install -e ".[real]"')

from tiny import generator  # noqa: E402  after the check that it is there

from experiments import predictors  # noqa: E402
from experiments.any_model import Body, Policy, untied  # noqa: E402
from experiments.predictors import (  # noqa: E402
    SAMPLES,
    ask,
    mixed_groups,
    overlap,
    rank_correlation,
    shares_of_R,
    taught,
)
from experiments.real_model import QUICK, CausalLM, RealConfig, Sums, sums_of_characters  # noqa: E402
from minicfrl import Rollout, group_advantages, policy_gradient_loss, sequence_logp  # noqa: E402
from ntk import influence  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=13)
KINDS = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **SIZES)),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_key_value_heads=1, **SIZES)),
    "GPTNeoX": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2)
    ),
}


def norm_in_double(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def in_double(monkeypatch):
    """The RMS norms of transformers compute in float32 whatever comes in."""
    for kind in ("llama", "qwen2"):
        module = getattr(transformers.models, kind)
        norm = getattr(getattr(module, f"modeling_{kind}"), f"{kind.capitalize()}RMSNorm")
        monkeypatch.setattr(norm, "forward", norm_in_double)


def random_policy(kind):
    """With weights large enough that all matter, the norms' gains and biases among them."""
    torch.manual_seed(0)
    lm = KINDS[kind]().eval().double()
    with torch.no_grad():
        for p in lm.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype)
    return Policy(Body(lm.base_model), untied(lm))


def random_batch():
    """Tokens (3, 7), the states of some of them, and advantages."""
    tokens, states = torch.randint(13, (3, 7), generator=generator(1)), torch.rand(3, 7, generator=generator(2)) < 0.5
    states[:, -1], states[0, 0] = False, True
    return tokens, states, torch.randn(3, generator=generator(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_influence_is_the_inner_product_of_a_language_model_s_gradients_token_by_token(kind, in_double):
    """Against one autograd.grad per token, in float64: what is left is rounding."""
    model, (tokens, states, advantages) = random_policy(kind), random_batch()
    row, t = states.nonzero(as_tuple=True)
    logp = sequence_logp(model, tokens)[row, t]
    for part, module in zip(influence(model, tokens, states, advantages), (model.classifier, model.body), strict=True):
        parameters = list(module.parameters())
        gradients = [torch.autograd.grad(each, parameters, retain_graph=True, materialize_grads=True) for each in logp]
        J = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])
        torch.testing.assert_close(part, advantages[row, None] * (J @ J.T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_step_of_sgd_leaves_a_quarter_of_the_error_in_a_language_model_too(kind, in_double):
    model, (tokens, states, advantages) = random_policy(kind), random_batch()
    mask = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), dim=1)
    predicted, errors = sum(influence(model, tokens, states, advantages)).sum(dim=0), []
    for lr in (step / predicted.norm() for step in (2e-4, 1e-4)):
        after = copy.deepcopy(model)
        (policy_gradient_loss(sequence_logp(after, tokens), advantages, mask[:, 1:]) * mask.sum()).backward()
        torch.optim.SGD(after.parameters(), lr).step()
        with torch.no_grad():
            happened = (sequence_logp(after, tokens) - sequence_logp(model, tokens))[mask[:, 1:]]
        errors.append((happened - lr * predicted).norm())
    assert 3.6 < errors[0] / errors[1] < 4.4 and errors[1] < 0.05 * 1e-4


def test_what_is_no_linear_layer_embedding_or_norm_is_refused_by_name():
    """A convolution, and an embedding that multiplies what it looks up."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, vocab_size=13, intermediate_size=24)
    gemma = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    made = {
        "Conv1d": transformers.MambaForCausalLM(transformers.MambaConfig(state_size=4, **sizes)),
        "ScaledWordEmbedding": transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **gemma)),
    }
    tokens, states, advantages = random_batch()
    for name, lm in made.items():
        policy = Policy(Body(lm.float().eval().base_model), untied(lm.float()))
        with pytest.raises(ValueError, match=name):
            influence(policy, tokens, states, advantages.float())


# ---------------------------------------------------------------------------------------------------------- predictors

TASK = sums_of_characters()


def group(kind="Llama"):
    """Eight responses of which two are called right, of a policy in float64."""
    torch.manual_seed(0)
    lm = KINDS[kind]().eval().double()
    with torch.no_grad():
        for p in lm.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    model = CausalLM(lm, TASK.shared, TASK.end_token)
    texts = ["53", "53", "5", "6", "43", "533", "35", "57"]
    rows = [TASK.encode(TASK.prompt(47, 6) + text + "\n") for text in texts]
    tokens = torch.tensor([row + [TASK.end_token] * (TASK.block_size - len(row)) for row in rows])
    position, lengths = torch.arange(TASK.block_size), torch.tensor([[len(row)] for row in rows])
    mask = (position >= TASK.shared[-1]) & (position < lengths)
    rewards = torch.tensor([[1.0, 1.0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    batch = Rollout(tokens, mask, model(tokens)[:, :-1].detach(), rewards, tuple(texts))
    return model, batch, group_advantages(rewards)[0], rewards[0] > 0


def test_the_predictors_are_the_sums_of_who_teaches_whom(in_double):
    """Summed over all that teach, and over the right ones that learn, R's and G's part of (E10)."""
    model, batch, advantages, right = group()
    row = ask(model, batch, advantages, right, {"sgd": 1e-6})
    seen = taught(model, TASK, batch, advantages)
    learn = right[torch.tensor(seen["rows"])].double() / right.sum()
    R, G = ((torch.tensor(seen[part], dtype=torch.float64) @ learn).sum().item() for part in "RG")
    assert row["sgd", "R alone"] == pytest.approx(R / batch.mask.sum().item(), rel=1e-9)
    assert row["sgd", "R + G"] == pytest.approx((R + G) / batch.mask.sum().item(), rel=1e-9)
    assert seen["tokens"][:3] == ["5", "3", "\n"]


def test_hidden_states_alone_leave_the_residuals_out(in_double):
    model, batch, advantages, right = group()
    phi, of = model.features(batch.tokens).detach(), batch.state_mask
    by_hand = sum(
        advantages[i] * (phi[j, t] @ phi[i, s]) / right.sum() / batch.mask.sum()
        for i, s in of.nonzero().tolist()
        for j, t in of.nonzero().tolist()
        if right[j]
    )
    said = ask(model, batch, advantages, right, {"sgd": 1e-6})["sgd", "hidden states"]
    assert said == pytest.approx(by_hand.item(), rel=1e-9)


class Lucky(Sums):
    """Rewards responses of two tokens, so that a policy that knows nothing is sometimes right."""

    def verify(self, prompt, response):
        return float(len(response) == 1)


def test_only_groups_with_right_and_wrong_responses_are_asked():
    task = Lucky(TASK.encode, TASK.decode)
    model = CausalLM(KINDS["Llama"]().eval().float(), task.shared, task.end_token)
    seen = list(zip(range(5), mixed_groups(model, task, generator(0)), strict=False))
    assert len(seen) == 5
    with pytest.MonkeyPatch.context() as patch:  # all wrong, all right, and some
        drawn = iter([torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1.0, 0.0]])])
        patch.setattr(predictors, "rollout", lambda *_: SimpleNamespace(rewards=next(drawn)))
        assert next(mixed_groups(model, task, None))[2].tolist() == [True, False]
    for _, (batch, advantages, right) in seen:
        assert 0 < right.sum() < len(right) == SAMPLES == len(batch.responses)
        assert (advantages[right] > 0).all() and (advantages[~right] < 0).all()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_what_is_measured_tends_to_what_R_and_G_say_and_the_parameters_are_put_back(kind, in_double):
    model, batch, advantages, right = group()
    before = [p.detach().clone() for p in model.parameters()]
    gaps = []
    for rate in (2e-5, 1e-5):
        row = ask(model, batch, advantages, right, {kind: rate})
        gaps.append(abs(row[kind, "measured"] / row[kind, "R + G"] - 1))
    assert gaps[1] < 0.6 * gaps[0] < 0.06  # of first order in the rate; Adam's step is a sign but for its epsilon
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_R_s_share_is_that_of_W_in_the_squared_gradient_or_in_its_absolute_values(in_double):
    model, batch, advantages, _ = group()
    (policy_gradient_loss(sequence_logp(model, batch.tokens), advantages, batch.mask[:, 1:])).backward()
    W, shares = model.classifier.weight.grad, shares_of_R(model, batch, advantages)
    others = [p.grad for p in model.body.parameters()]
    squares, sizes = sum(g.square().sum() for g in others), sum(g.abs().sum() for g in others)
    assert shares["sgd"] == pytest.approx((W.square().sum() / (W.square().sum() + squares)).item())
    assert shares["adam"] == pytest.approx((W.abs().sum() / (W.abs().sum() + sizes)).item())


def test_a_batch_without_advantage_has_no_share(in_double):
    model, batch, advantages, _ = group()
    with pytest.raises(ValueError, match="no response of the batch has an advantage"):
        shares_of_R(model, batch, 0 * advantages)


def test_ranks_and_overlaps():
    assert rank_correlation([1.0, 2.0, 9.0], [-5.0, 0.0, 0.1]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 9.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert rank_correlation([2.0, 3.0, 1.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)  # 1 - 6 (1 + 0 + 1) / (3 (9 - 1))
    assert overlap([1.0, 2.0, 3.0, 4.0], [1.0, 9.0, 2.0, 8.0], top=2) == 1


@pytest.mark.parametrize("arguments", [[], ["/nowhere/at/all/out.json"], ["a.json", "b.json"]])
def test_a_bad_command_line_ends_in_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        predictors.main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1


def test_all_that_is_found_is_asked_of_as_many_groups(monkeypatch, in_double):
    """On a tiny policy, some groups and one update: a number for each predictor and group, shares between 0 and 1."""
    monkeypatch.setattr(predictors, "GROUPS", 3)
    monkeypatch.setattr(predictors, "BATCHES", 2)
    task = Lucky(TASK.encode, TASK.decode)
    model = CausalLM(KINDS["Llama"]().eval().double(), task.shared, task.end_token)
    found = predictors.found(RealConfig(**QUICK | {"rl_steps": 1, "prompts": 16, "samples": 8}), model, task)
    assert {len(numbers) for numbers in found["groups"].values()} == {3} and len(found["groups"]) == 8
    for shares in found["shares"].values():
        assert all(len(values) == 2 and all(0 < value < 1 for value in values) for values in shares.values())
    monkeypatch.setattr(predictors, "GROUPS", 10**6)
    task.train_pairs = task.train_pairs[:4]
    with pytest.raises(ValueError, match="groups have right and wrong responses, not 1000000"):
        predictors.found(RealConfig(**QUICK), model, task)

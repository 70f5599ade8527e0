"""What may stand where a model is named: pytest tests/test_models.py.

Adapters, directories without weights, weights of any dtype, architectures without an estimate.
"""
import importlib.util
import json

import pytest
import safetensors.torch
import torch
import transformers
from conftest import PROC, demo_tokenizer, flags, log_of, save_rows, tiny_llama

import configs
import evaluate
import model as models
import unlearn
from configs import UsageError, tables

HAS_PEFT = importlib.util.find_spec("peft") is not None


def saved(path, dtype=torch.float32, seed=0):
    """A tiny model on the disk, in this dtype."""
    path.mkdir()
    tokenizer = demo_tokenizer()
    lm = tiny_llama(tokenizer, seed, hidden=32)
    lm.source_dtype = dtype
    models.save_model(lm, tokenizer, str(path))
    return lm


def add_adapter(path, base, rank=2):
    """Write a LoRA adapter in PEFT's layout, for two matrices; return what it adds to them."""
    generator = torch.Generator().manual_seed(0)
    added, state = {}, {}
    for name in ("q_proj", "v_proj"):
        layer = f"model.layers.1.self_attn.{name}"
        a = torch.randn(rank, 32, generator=generator)
        b = torch.randn(32, rank, generator=generator)
        state[f"base_model.model.{layer}.lora_A.weight"] = a
        state[f"base_model.model.{layer}.lora_B.weight"] = b
        added[f"{layer}.weight"] = 4 / rank * b @ a
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(state, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return added


# ------------------------------------------------------------------------------------------------
# PEFT adapters


@pytest.mark.skipif(not HAS_PEFT, reason="merging an adapter needs peft, which is not installed")
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_its_base_with_the_adapter_added(tmp_path, beside_a_model):
    base = saved(tmp_path / "base").state_dict()
    path = tmp_path / ("base" if beside_a_model else "adapter")
    added = add_adapter(path, tmp_path / "base")
    lm = models.load_model(str(path), PROC)
    state = lm.state_dict()
    assert state.keys() == base.keys()
    for name, value in state.items():
        expected = base[name] + added.get(name, 0)
        assert torch.allclose(value, expected, atol=1e-6), name
    models.save_model(lm, demo_tokenizer(), str(tmp_path))  # a whole model
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_without_peft_an_adapter_is_refused_and_never_left_out(
        tmp_path, monkeypatch, beside_a_model):
    saved(tmp_path / "base")
    path = tmp_path / ("base" if beside_a_model else "adapter")
    add_adapter(path, tmp_path / "base")
    configs.check_name(str(path), "model")
    monkeypatch.setattr(models, "is_peft_available", lambda: False)
    with pytest.raises(UsageError, match="is a PEFT adapter; pip install peft"):
        models.load_model(str(path), PROC)


# ------------------------------------------------------------------------------------------------
# weights


@pytest.mark.parametrize("source, setting, expected", [
    (torch.bfloat16, None, "bfloat16"),
    (torch.float16, None, "float16"),
    (torch.float32, None, "float32"),
    (torch.bfloat16, "fp32", "float32"),
    (torch.float32, "bf16", "bfloat16"),
])
def test_a_run_saves_its_weights_in_the_dtype_of_the_model_before(
        mini, tmp_path, source, setting, expected):
    saved(tmp_path / "start", source)
    unlearn.main(flags(mini, out=tmp_path / "run", model=tmp_path / "start", retain_model=None,
                       steps=1, eval_every=0, save_dtype=setting))
    state = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert {str(value.dtype) for value in state.values()} == {f"torch.{expected}"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dtype"] == expected
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert str(loaded.dtype) == f"torch.{expected}"


def test_tied_weights_are_saved_once_and_an_adapted_model_is_plain(tmp_path):
    lm = saved(tmp_path / "plain")
    models.add_lora(lm, rank=2, seed=0)
    models.save_model(lm, demo_tokenizer(), str(tmp_path))
    plain = safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")
    adapted = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert plain.keys() == adapted.keys() and "lm_head.weight" not in plain
    for name, value in plain.items():  # B is 0 at the start
        assert torch.equal(value, adapted[name]), name


def test_a_base_model_without_weights_starts_from_random_ones_and_a_target_may_not(
        mini, tmp_path, capsys):
    one, same, other = (models.random_model("tiny_llama", PROC, seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or "norm" in name, name
    assert models.has_weights(str(mini / "target")) and models.has_weights("org/name")
    assert not models.has_weights("tiny_gpt2")
    with pytest.raises(UsageError, match="tiny_llama: has no model.safetensors"):
        models.load_model("tiny_llama", PROC)


def test_an_architecture_without_an_estimate_is_trained_all_the_same(mini, tmp_path, capsys):
    tokenizer = demo_tokenizer()
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, bos_token_id=0,
        eos_token_id=1)
    start = tmp_path / "experts"
    start.mkdir()
    models.save_model(transformers.MixtralForCausalLM(config), tokenizer, str(start))
    unlearn.main(flags(mini, out=tmp_path / "run", model=start, retain_model=None, steps=1,
                       eval_every=0))
    assert "no estimate of memory for this architecture" in capsys.readouterr().out
    assert len(log_of(tmp_path / "run")) == 1


# ------------------------------------------------------------------------------------------------
# rows of one's own


def own_run(mini, tmp_path, n_rows, **settings):
    """The settings of a run on n rows of one's own: nothing else is named."""
    rows = [{"question": f"Who is {i}?", "answer": f"Number {i}."} for i in range(n_rows)]
    save_rows(tmp_path / "own.jsonl", rows)
    given = {"model": str(mini / "target"), "forget_data": str(tmp_path / "own.jsonl"),
             "retain_loss": "none", **settings}
    c = configs.make(unlearn.Config, given)
    return unlearn.fit_to_own_rows(c, given, PROC)


@pytest.mark.parametrize("n_rows, batch_size, steps", [(1, 1, 30), (4, 1, 40), (12, 4, 30),
                                                       (96, 32, 30), (400, 32, 125)])
def test_own_rows_get_small_batches_and_at_least_thirty_steps(
        mini, tmp_path, n_rows, batch_size, steps):
    c = own_run(mini, tmp_path, n_rows)
    assert (c.benchmark, c.batch_size, c.lr, c.beta) == ("own", batch_size, 1e-3, 2.5)
    assert unlearn.n_steps(c, n_rows) == steps
    assert c.template is None and c.retain_model is None  # nothing of the demo


def test_what_is_given_wins_over_the_rule_for_own_rows(mini, tmp_path, capsys):
    c = own_run(mini, tmp_path, 12, batch_size=6, lr=1e-4, epochs=2.0, forget_loss="npo")
    assert (c.batch_size, c.lr, c.epochs, c.beta) == (6, 1e-4, 2.0, 0.1)
    own_run(mini, tmp_path, 12)
    shown = capsys.readouterr().out
    assert "chosen for 12 forget rows" in shown and "--batch_size=4 --epochs=10 --lr=0.001" in shown


@pytest.mark.parametrize("n_parameters, lr", [(2e5, 1e-3), (1.3e8, 5e-5), (1e9, 1e-5)])
def test_the_learning_rate_for_own_rows_falls_with_the_size_of_the_model(
        mini, tmp_path, monkeypatch, n_parameters, lr):
    class Shapes:
        def num_parameters(self):
            return n_parameters

    monkeypatch.setattr(models, "without_weights", lambda name: Shapes())
    assert own_run(mini, tmp_path, 12).lr == lr


def test_own_rows_for_an_architecture_whose_size_is_not_known_get_the_smallest_rate(
        mini, tmp_path, monkeypatch):
    def unknown(name):
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(models, "without_weights", unknown)
    assert own_run(mini, tmp_path, 12).lr == 1e-5


def test_the_template_of_own_rows_is_the_tokenizers_own_where_it_has_one():
    tokenizer = demo_tokenizer()
    c = configs.make(evaluate.Config, {"forget_data": __file__})
    assert evaluate.make_template(tokenizer, c).name == "qa"
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert evaluate.make_template(tokenizer, c).name == "chat"


# ------------------------------------------------------------------------------------------------
# what a run says at its end


def answered(*pairs, name="forget"):
    """Records of (true answer, answer given)."""
    return [{"set": name, "answer": true, "generated": given} for true, given in pairs]


def test_a_run_ends_with_how_many_answers_are_still_given_and_what_to_change():
    kept = answered(("Red.", "it is red."), ("Blue.", "Green."), ("Two.", ""))
    none = answered(("Red.", "Green."))
    say = tables.verdict
    assert say({}, kept, {}, None) == (
        "1 of 3 forget answers are still given word for word; raise --lr or --epochs.")
    assert say({}, none, {}, None) == "None of 1 answers is given word for word."
    # what the retain model gives too is no memory
    both = say({}, kept, {}, kept)
    assert both == "1 of 3 forget answers are still given word for word, 1 by the retain model."
    over = say({"forget_prob": 0.02}, none, {"forget_prob": 0.4}, none)
    assert "Over-forgetting: forget_prob 0.02 is far below the retain model's 0.4" in over
    assert "Over" not in say({"forget_prob": 0.2}, none, {"forget_prob": 0.4}, none)
    assert say({}, answered(("a", "a"), name="retain"), {}, None) == ""  # nothing was asked
    # open-unlearning's logs hold no true answer, and a log's answers may be null
    log = [{"set": "forget", "nll": 1.0, "generated": "Red."}, *answered(("Red.", None))]
    assert say({}, none, {}, log) == "None of 1 answers is given word for word."
    assert evaluate.degenerate(answered(("Red.", None), ("Red.", ""))) == 1


def test_the_best_forget_probability_is_the_retain_models():
    assert tables.arrows({})["forget_prob"] == "↓"
    assert tables.arrows({"forget_prob": 0.4163})["forget_prob"] == "→0.42"

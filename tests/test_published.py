"""Published set-ups: pytest tests/test_published.py. Released models score, published values stand in the configs. No network."""
import json
import os
import re
import shutil

import pytest
import torch
import transformers
from conftest import ROOT, SHARED, flags, log_of, needs_shared, run_script

import configs
import evaluate
import unlearn
from configs import Mistake

# what transformers 5 raises where a repository has no tokenizer files, and what it raised before
BACKEND = ("Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` library serialization file, \n"
           "(2) a slow tokenizer instance to convert or \n(3) an equivalent slow tokenizer class to instantiate and convert.")
BEFORE = ("Can't load tokenizer for 'org/name'. If you were trying to load it from 'https://huggingface.co/models', make sure "
          "you don't have a local directory with the same name.")


def given(mini, *names, **more):
    """The command line of evaluate.py on the miniature."""
    keep = ("benchmark", "subset", "data", "template", "retain_model", "device", "max_new_tokens")
    return [*map(str, names), *(f for f in flags(mini, **more) if f[2:].split("=")[0] in {*keep, *more})]


# -- a model without a tokenizer


@pytest.fixture
def bare(mini, tmp_path):
    """What the released SimNPO repositories hold: config, generation config, weights."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(mini / "target" / name, tmp_path)
    return tmp_path


def test_a_directory_without_a_tokenizer_is_one_sentence_that_names_the_setting(mini, bare):
    done = run_script("evaluate.py", given(mini, bare, out=bare / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{bare}: has no tokenizer; give --tokenizer=" in done.stderr
    assert "NousResearch/Llama-2-7b-chat-hf" in done.stderr and "network" not in done.stderr
    with pytest.raises(Mistake, match="has no tokenizer; give --tokenizer="):
        unlearn.main(flags(mini, model=bare, out=bare / "run"))


def test_with_the_tokenizer_named_it_scores_as_the_model_that_has_its_own(mini, bare):
    evaluate.main(given(mini, bare, tokenizer=mini / "target", out=bare / "a"))
    evaluate.main(given(mini, mini / "target", out=bare / "b"))
    assert (bare / "a" / "scores.json").read_text() == (bare / "b" / "scores.json").read_text()


@pytest.mark.parametrize("kind", ["phi", "qwen2", "gpt2", "gemma"])
def test_a_tokenizer_of_special_tokens_only_is_none(mini, tmp_path, kind):
    """transformers makes one without a word for these."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(Mistake, match="has no tokenizer; give --tokenizer="):
        evaluate.main(given(mini, tmp_path, out=tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch):
    """The hub has org/name, and answers a request for its tokenizer with this error."""
    def answers(error, real=transformers.AutoTokenizer.from_pretrained):
        def from_pretrained(name, **options):
            if str(name) == "org/name":
                raise error
            return real(name, **options)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    return answers


@pytest.mark.parametrize("error", [ValueError(BACKEND), OSError(BEFORE)])
def test_a_hub_id_without_a_tokenizer_does_not_send_anyone_to_the_network(mini, tmp_path, hub, error):
    hub(error)
    with pytest.raises(Mistake) as e:
        evaluate.main(given(mini, "org/name", out=tmp_path))
    assert str(e.value).startswith("org/name: has no tokenizer; give --tokenizer=") and "network" not in str(e.value)


def test_a_hub_that_does_not_answer_is_still_said_to_be_so(mini, tmp_path, hub):
    hub(OSError("We couldn't connect to 'https://huggingface.co' to load the files."))
    with pytest.raises(Mistake, match="check the id, the network"):
        evaluate.main(given(mini, "org/name", out=tmp_path))


# -- means over answers


def first_step(mini, out, **more):
    unlearn.main(flags(mini, steps=1, shuffle=False, out=out, **more))
    return log_of(out)[0]


def test_nll_mean_and_ga_mean_are_means_over_answers_of_each_answers_token_mean(mini, tmp_path):
    evaluate.main(given(mini, mini / "target", out=tmp_path / "scored"))
    records = [json.loads(line) for line in (tmp_path / "scored" / "examples.jsonl").read_text().splitlines()]
    forget, retain = ([r for r in records if r["set"] == name][:4] for name in ("forget", "retain"))  # the first window
    assert len({r["n_tokens"] for r in retain}) > 2

    def by_answer(rows):
        return sum(r["nll"] for r in rows) / 4

    def by_token(rows):
        return sum(r["nll"] * r["n_tokens"] for r in rows) / sum(r["n_tokens"] for r in rows)
    mean = first_step(mini, tmp_path / "a", forget_loss="ga_mean", retain_loss="nll_mean")
    assert mean["forget_loss"] == pytest.approx(-by_answer(forget), rel=1e-5)
    assert mean["retain_loss"] == pytest.approx(by_answer(retain), rel=1e-5)
    plain = first_step(mini, tmp_path / "b", forget_loss="ga", retain_loss="nll")
    assert plain["retain_loss"] == pytest.approx(by_token(retain), rel=1e-5)
    assert abs(by_answer(retain) - by_token(retain)) > 0.01  # so the two can be told apart


def test_a_mean_over_answers_does_not_depend_on_the_micro_batch(mini, tmp_path):
    rows = [first_step(mini, tmp_path / str(n), forget_loss="ga_mean", retain_loss="nll_mean", micro_batch_tokens=n)
            for n in (16, 4096)]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)

"""Mixtures of Markov chains: pytest tests/test_markov.py.

The truth is known here, so scores are held to it.
"""
import functools
import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, log_of

import configs
import data
import evaluate
import model as models
import relearn
import unlearn
from configs import UsageError

CONFIG = str(ROOT / "configs" / "markov.py")
OWN = {"retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}  # state 9 belongs to nobody


def load_plot():
    path = ROOT / "configs" / "results" / "markov" / "plot.py"
    spec = importlib.util.spec_from_file_location("plot", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot = load_plot()
draw = functools.cache(data.markov)


def states(rows):
    """[[state, ...] of each row]."""
    return [[int(state) for state in row["text"].split()] for row in rows]


# ------------------------------------------------------------------------------------------------
# the chains and their samples


@pytest.mark.parametrize("name", OWN)
def test_chains_follow_their_definition(name):
    chain = np.array(data.CHAINS[name])
    assert chain.shape == (10, 10) and np.allclose(chain.sum(1), 1)
    preferring = [4 / 15 if state in OWN[name] else 1 / 35 for state in range(10)]
    for state in range(10):
        expected = preferring if state in OWN[name] else [0.1] * 10
        assert np.allclose(chain[state], expected), state
    stationary = np.linalg.matrix_power(chain, 100)[0]
    assert np.allclose(stationary, [0.2 if state in OWN[name] else 0.4 / 7 for state in range(10)])


def test_samples_have_the_transitions_of_their_chain_and_a_fifth_is_scored():
    bench = draw("1", "short")
    sizes = {name: len(rows) for name, rows in bench.evals.items()}
    assert sizes == {"retain": 2000, "forget1": 1000, "forget2": 1000}
    assert len(bench.forget) == len(bench.retain) == len(bench.retain_full) == 8000
    assert len(bench.full) == 16000

    sets = {
        "retain": bench.retain,
        "forget1": bench.forget[:4000],
        "forget2": bench.forget[4000:],
    }
    for name, rows in sets.items():
        counts, first = np.zeros((10, 10)), np.zeros(10)
        for sequence in states(rows):
            assert len(sequence) == (5 if name == "forget2" else 20)
            first[sequence[0]] += 1
            for state, following in zip(sequence, sequence[1:]):
                counts[state, following] += 1
        totals = counts.sum(1, keepdims=True)
        error = 4 * np.sqrt(0.25 / totals)  # four standard deviations at most
        assert (abs(counts / totals - data.CHAINS[name]) < error).all()
        assert np.allclose(first / first.sum(), data.CHAINS[name][OWN[name][0]], atol=0.03)


def test_unseen_has_long_sequences_and_a_target_that_never_saw_forget2():
    short, unseen = draw("1", "short"), draw("1", "unseen")
    assert {len(sequence) for sequence in states(unseen.forget)} == {20}
    assert len(unseen.forget) == 8000
    assert unseen.full == unseen.retain + unseen.forget[:4000]
    assert unseen.retain == short.retain
    assert unseen.evals["forget1"] == short.evals["forget1"]


def test_a_seed_draws_other_sequences_and_the_same_seed_the_same():
    zero, one = draw("0", "short"), draw("1", "short")
    assert zero == data.load("markov", "short")
    assert zero.retain != one.retain and zero.evals["forget2"] != one.evals["forget2"]
    c, _, _ = configs.load(unlearn.Config, [CONFIG, "--seed=5"])
    assert c.data == "5"  # the run's seed, unless another is given
    c, _, _ = configs.load(unlearn.Config, ["--benchmark=markov", "--data=7", "--seed=1"])
    assert c.data == "7"


def test_the_tokenizer_knows_the_ten_states_and_nothing_else():
    tokenizer = models.load_tokenizer("tiny_gpt2")
    assert len(tokenizer) == 10
    assert tokenizer("3 0 9")["input_ids"] == [3, 0, 9] and tokenizer.decode([3, 0]) == "3 0"
    data.check_tokenizer(tokenizer, "markov")


# ------------------------------------------------------------------------------------------------
# scores


def test_the_score_is_the_mean_kl_from_the_true_row_over_predicted_states():
    """Two sequences of three states, worked by hand.

    The model gives 1/2 to state 0 and 1/18 to each other.
    """
    model = np.log([1 / 2] + [1 / 18] * 9)
    inside = (4 / 15 * math.log(4 / 15 * 2) + 8 / 15 * math.log(4 / 15 * 18)
              + 7 / 35 * math.log(18 / 35))
    outside = 0.1 * math.log(0.2) + 0.9 * math.log(1.8)
    kl = evaluate.transition_kl([1, 5], np.stack([model, model]), data.CHAINS["retain"])
    assert kl == pytest.approx([inside, outside])
    records = [
        {"set": "retain", "kl": kl.mean(), "n_tokens": 2},
        {"set": "retain", "kl": inside, "n_tokens": 1},
    ]
    expected = pytest.approx((2 * inside + outside) / 3)
    assert evaluate.markov_scores(records) == {"retain_kl": expected}


def test_the_score_at_a_retain_distance_is_where_it_is_first_reached():
    points = [(0.02, 0.0), (0.01, 1.0), (0.03, 2.0), (0.02, 5.0), (0.03, 6.0)]
    rows = [{"retain_kl": retain, "forget1_kl": forget} for retain, forget in points]
    assert plot.at_distance(rows, 0.015, "forget1_kl") == pytest.approx(1.25)
    assert plot.at_distance(rows, 0.03, "forget1_kl") == 2.0
    assert math.isnan(plot.at_distance(rows, 0.04, "forget1_kl"))


def test_what_needs_the_true_chains_is_refused():
    with pytest.raises(UsageError, match="need the true chains"):
        configs.load(unlearn.Config, ["--benchmark=markov", f"--forget_data={__file__}"])
    with pytest.raises(UsageError, match="no attack on Markov chains"):
        configs.load(relearn.Config, ["--benchmark=markov"])


# ------------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both subsets at a small size, the rest as in the config: {name: scored rows}.

    No retain model is needed.
    """
    words = [CONFIG, "--base_model=./small", "--retain_model=None", "--device=cpu",
             "--finetune_lr=2e-3", "--finetune_epochs=2", "--eval_rows=100",
             "--eval_at=4,8,12,16,20,24,28,32,36,40"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "markov", draw)
        patch.chdir(tmp_path_factory.mktemp("markov"))
        shutil.copytree(ROOT / "configs" / "tiny_gpt2", "small")
        config = Path("small/config.json")
        shape = json.loads(config.read_text()) | {"n_embd": 64, "n_inner": 64, "n_layer": 2}
        config.write_text(json.dumps(shape | {"initializer_range": (3 * 64) ** -0.5}))
        for subset, loss, beta, steps in (
                ("short", "npo", 1, 40), ("short", "simnpo", 4, 40), ("unseen", "npo", 1, 1)):
            unlearn.main([*words, f"--subset={subset}", f"--model=out/{subset}_target",
                          f"--forget_loss={loss}", f"--beta={beta}", f"--steps={steps}"])
        names = ("short_npo", "short_simnpo", "unseen_npo")
        yield {name: log_of(f"out/markov_{name}", scored=True) for name in names}


def test_simnpo_forgets_short_sequences_at_less_retain_damage_than_npo(runs):
    def damage(rows):
        """Retain distance at which the forget distance of the short chain reaches 0.5."""
        for before, after in zip(rows, rows[1:]):
            if before["forget2_kl"] < 0.5 <= after["forget2_kl"]:
                forget = [before["forget2_kl"], after["forget2_kl"]]
                return np.interp(0.5, forget, [before["retain_kl"], after["retain_kl"]])
        raise AssertionError("the forget distance never reaches 0.5")

    assert damage(runs["short_simnpo"]) < 0.8 * damage(runs["short_npo"])


def test_a_chain_the_target_never_saw_starts_at_a_distance_and_a_learned_one_does_not(runs):
    seen, unseen = runs["short_npo"][0], runs["unseen_npo"][0]
    learned = max(seen["retain_kl"], unseen["retain_kl"], seen["forget1_kl"])
    assert unseen["forget2_kl"] > 0.3 > 5 * learned


def test_runs_are_scored_alone_and_compared_from_their_logs(runs, capsys):
    evaluate.main(["out/markov_short_npo", "--out=out/again"])
    again = json.loads(Path("out/again/scores.json").read_text())
    expected = {name: runs["short_npo"][-1][name] for name in again}
    assert again == pytest.approx(expected, rel=1e-4)
    capsys.readouterr()
    names = ("out/markov_short_npo", "out/markov_short_simnpo")
    plot.draw("markov.png", [plot.read(name) for name in names])
    assert "0.37" in capsys.readouterr().out
    assert Path("markov.png").read_bytes().startswith(b"\x89PNG")

"""Mixtures of Markov chains: pytest tests/test_markov.py. The truth is known here, so scores are held to it."""
import functools
import importlib.util
import json
import math

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

spec = importlib.util.spec_from_file_location("plot", ROOT / "configs" / "results" / "markov" / "plot.py")
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)
OWN = {"retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}  # state 9 belongs to nobody


draw = functools.cache(data.markov)


def states(rows):
    return [list(map(int, r["text"].split())) for r in rows]


@pytest.mark.parametrize("name", OWN)
def test_chains_follow_their_definition(name):
    rows = np.array(data.CHAINS[name])
    assert rows.shape == (10, 10) and np.allclose(rows.sum(1), 1)
    for s in range(10):
        own, other = (4 / 15, 1 / 35) if s in OWN[name] else (0.1, 0.1)
        assert np.allclose(rows[s], [own if t in OWN[name] else other for t in range(10)])
    stationary = np.linalg.matrix_power(rows, 100)[0]
    assert np.allclose(stationary, [0.2 if s in OWN[name] else 0.4 / 7 for s in range(10)])


def test_samples_have_the_transitions_of_their_chain_and_a_fifth_is_scored():
    bench = draw("1", "short")
    assert {k: len(v) for k, v in bench.evals.items()} == {"retain": 2000, "forget1": 1000, "forget2": 1000}
    assert [len(x) for x in (bench.forget, bench.retain, bench.full, bench.retain_full)] == [8000, 8000, 16000, 8000]
    for name, rows in {"retain": bench.retain, "forget1": bench.forget[:4000], "forget2": bench.forget[4000:]}.items():
        counts, first = np.zeros((10, 10)), np.zeros(10)
        for sequence in states(rows):
            assert len(sequence) == (5 if name == "forget2" else 20)
            first[sequence[0]] += 1
            for a, b in zip(sequence, sequence[1:]):
                counts[a, b] += 1
        error = 4 * np.sqrt(0.25 / counts.sum(1, keepdims=True))  # four standard deviations at most
        assert (abs(counts / counts.sum(1, keepdims=True) - data.CHAINS[name]) < error).all()
        assert np.allclose(first / first.sum(), data.CHAINS[name][OWN[name][0]], atol=0.03)


def test_unseen_has_long_sequences_and_a_target_that_never_saw_forget2():
    short, unseen = draw("1", "short"), draw("1", "unseen")
    assert {len(s) for s in states(unseen.forget)} == {20}
    assert len(unseen.forget) == 8000 and unseen.full == unseen.retain + unseen.forget[:4000]
    assert unseen.retain == short.retain and unseen.evals["forget1"] == short.evals["forget1"]


def test_a_seed_draws_other_sequences_and_the_same_seed_the_same():
    a, again, b = draw("0", "short"), data.load("markov", "short"), draw("1", "short")
    assert a == again and a.retain != b.retain and a.evals["forget2"] != b.evals["forget2"]
    c, _, _ = configs.load(unlearn.Config, [str(ROOT / "configs" / "markov.py"), "--seed=5"])
    assert c.data == "5"  # the run's seed, unless told otherwise
    assert configs.load(unlearn.Config, ["--benchmark=markov", "--data=7", "--seed=1"])[0].data == "7"


def test_the_score_is_the_mean_kl_from_the_true_row_over_predicted_states():
    """Two sequences of three states, worked by hand: the model says 1/2 for state 0 and 1/18 for each other."""
    model = np.log([1 / 2] + [1 / 18] * 9)
    inside = 4 / 15 * math.log(4 / 15 * 2) + 8 / 15 * math.log(4 / 15 * 18) + 7 / 35 * math.log(18 / 35)
    outside = 0.1 * math.log(0.2) + 0.9 * math.log(1.8)
    kl = evaluate.transition_kl([1, 5], np.stack([model, model]), data.CHAINS["retain"])
    assert kl == pytest.approx([inside, outside])
    records = [{"set": "retain", "kl": kl.mean(), "n_tokens": 2}, {"set": "retain", "kl": inside, "n_tokens": 1}]
    assert evaluate.markov_scores(records) == {"retain_kl": pytest.approx((2 * inside + outside) / 3)}


def test_the_score_at_a_retain_distance_is_where_it_is_first_reached():
    rows = [{"retain_kl": x, "forget1_kl": y} for x, y in ((0.02, 0.0), (0.01, 1.0), (0.03, 2.0), (0.02, 5.0), (0.03, 6.0))]
    assert plot.at_distance(rows, 0.015, "forget1_kl") == pytest.approx(1.25)
    assert plot.at_distance(rows, 0.03, "forget1_kl") == 2.0
    assert math.isnan(plot.at_distance(rows, 0.04, "forget1_kl"))


def test_the_tokenizer_knows_the_ten_states_and_nothing_else():
    tokenizer = data.markov_tokenizer()
    assert len(tokenizer) == 10 and tokenizer("3 0 9")["input_ids"] == [3, 0, 9] and tokenizer.decode([3, 0]) == "3 0"
    data.check_tokenizer(tokenizer, "markov")


def test_what_needs_the_true_chains_is_refused():
    with pytest.raises(UsageError, match="need the true chains"):
        configs.load(unlearn.Config, ["--benchmark=markov", f"--forget_data={__file__}"])
    with pytest.raises(UsageError, match="no attack on Markov chains"):
        configs.load(relearn.Config, ["--benchmark=markov"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both subsets at a small size, as the config says otherwise: {name: scored rows}. No retain model is needed."""
    patch = pytest.MonkeyPatch()
    patch.setattr(models, "tiny_gpt2", functools.partial(models.tiny_gpt2, hidden=64, layers=2))
    patch.setitem(data.LOADERS, "markov", lambda source, subset, *_: draw(source, subset))
    patch.chdir(tmp_path_factory.mktemp("markov"))
    words = [str(ROOT / "configs" / "markov.py"), "--retain_model=None", "--device=cpu", "--finetune_lr=2e-3",
             "--finetune_epochs=2", "--eval_rows=100"]
    for subset, loss, beta, steps in (("short", "npo", 1, 40), ("short", "simnpo", 4, 40), ("unseen", "npo", 1, 1)):
        unlearn.main([*words, f"--subset={subset}", f"--model=out/{subset}_target", f"--forget_loss={loss}", f"--beta={beta}",
                      f"--steps={steps}", "--eval_at=4,8,12,16,20,24,28,32,36,40"])
    yield {name: log_of(f"out/markov_{name}", scored=True) for name in ("short_npo", "short_simnpo", "unseen_npo")}
    patch.undo()


def test_simnpo_forgets_short_sequences_at_less_retain_damage_than_npo(runs):
    """Retain distance at which the forget distance of the short chain reaches 0.5."""
    def damage(rows):
        a, b = next((a, b) for a, b in zip(rows, rows[1:]) if a["forget2_kl"] < 0.5 <= b["forget2_kl"])
        return np.interp(0.5, [a["forget2_kl"], b["forget2_kl"]], [a["retain_kl"], b["retain_kl"]])

    assert damage(runs["short_simnpo"]) < 0.8 * damage(runs["short_npo"])


def test_a_chain_the_target_never_saw_starts_at_a_distance_and_a_learned_one_does_not(runs):
    seen, unseen = runs["short_npo"][0], runs["unseen_npo"][0]
    assert unseen["forget2_kl"] > 0.3 > 5 * max(seen["retain_kl"], unseen["retain_kl"], seen["forget1_kl"])


def test_runs_are_scored_alone_and_compared_from_their_logs(runs, capsys):
    evaluate.main(["out/markov_short_npo", "--out=out/again"])
    again = json.loads(open("out/again/scores.json").read())
    assert again == pytest.approx({k: runs["short_npo"][-1][k] for k in again}, rel=1e-4)
    capsys.readouterr()
    plot.draw("markov.png", [plot.read("out/markov_short_npo"), plot.read("out/markov_short_simnpo")])
    assert "0.37" in capsys.readouterr().out and open("markov.png", "rb").read(4) == b"\x89PNG"

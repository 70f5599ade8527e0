"""Attacks: pytest tests/test_relearn.py."""
import json

import pytest
from conftest import flags

import relearn
import unlearn
from configs import Mistake


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("attacked") / "run"
    unlearn.main(flags(mini, out=out, eval_every=10, steps=6))
    return out


def curves(out):
    return json.loads((out / "relearn.json").read_text())


def test_relearning_scores_unseen_and_all_questions_at_each_epoch_with_the_retain_model_as_control(run, capsys):
    log = (run / "log.jsonl").read_text()
    relearn.main([str(run), "--epochs=3", "--batch_size=2", "--fraction=0.34", "--lr=0.01", "--choose=random,shortest", "--seeds=1,2"])
    rows = curves(run)
    groups = {(r["attack"], r["model"], r["seed"]) for r in rows}
    assert groups == {(a, m, s) for a in ("relearn_random", "relearn_shortest") for m in ("run", "retain model") for s in (1, 2)}
    one = [r for r in rows if (r["attack"], r["model"], r["seed"]) == ("relearn_random", "run", 1)]
    assert [r["epoch"] for r in one] == [0, 1, 2, 3] and [r["step"] for r in one] == [0, 2, 4, 6]
    assert {"forget_prob", "forget_quality", "unseen_forget_prob", "unseen_forget_quality"} <= one[0].keys()
    assert one[-1]["forget_prob"] > one[0]["forget_prob"]  # what is trained on is learned
    start = json.loads((run / "scores.json").read_text())
    assert one[0]["forget_prob"] == pytest.approx(start["forget_prob"], rel=1e-6)  # the attack begins at the run
    assert (run / "relearn.png").stat().st_size > 5000
    assert (run / "log.jsonl").read_text() == log  # the run's own log is left alone
    assert len(list(run.rglob("scores.json"))) == 1
    assert "unseen_forget_prob" in capsys.readouterr().out


def test_the_same_attack_gives_the_same_curve(run, tmp_path):
    argv = [str(run), "--epochs=2", "--lr=0.01", "--control=False"]
    relearn.main([*argv, f"--out={tmp_path / 'a'}"])
    relearn.main([*argv, f"--out={tmp_path / 'b'}"])
    assert curves(tmp_path / "a") == curves(tmp_path / "b") and len(curves(tmp_path / "a")) > 1


def test_shortest_takes_the_shortest_answers_and_random_follows_its_seed():
    import random

    import data
    examples = [data.Example([0] * (3 + n), 3) for n in (5, 2, 9, 1, 4)]
    assert relearn.CHOOSE["shortest"](examples, 2, None) == [3, 1]
    draw = [relearn.CHOOSE["random"](examples, 3, random.Random(s)) for s in (0, 0, 1, 2, 3)]
    assert draw[0] == draw[1] and len({tuple(d) for d in draw}) > 1 and all(len(set(d)) == 3 for d in draw)


@pytest.mark.parametrize("argv, sentence", [
    ([], "name at least one run directory"), (["out/none"], "no such directory"), (["{run}", "--choose=best"], "any of random, shortest"),
    (["{run}", "--fraction=0"], "above 0"), (["{run}", "--epochs=0.1"], "0 optimizer steps")])
def test_a_mistaken_attack_is_one_sentence(run, argv, sentence):
    with pytest.raises(Mistake, match=sentence):
        relearn.main([a.format(run=run) for a in argv])

"""Attacks: pytest tests/test_relearn.py."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import flags
from safetensors.torch import load_file, save_file

import evaluate
import relearn
import unlearn
from configs import UsageError


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("attacked") / "run"
    unlearn.main(flags(mini, out=out, eval_every=10, steps=6))
    return out


def curves(out):
    return json.loads((out / "relearn.json").read_text())


def test_relearning_scores_unseen_and_all_questions_at_each_epoch_with_the_retain_model_as_control(run, capsys):
    log = (run / "log.jsonl").read_text()
    relearn.main([str(run), "--epochs=3", "--batch_size=2", "--fraction=0.34", "--lr=0.01", "--attacks=relearn_random,relearn_shortest,int4,paraphrase", "--seeds=1,2"])
    rows = curves(run)
    groups = {(r["attack"], r["model"], r["seed"]) for r in rows if r["attack"].startswith("relearn")}
    assert groups == {(a, m, s) for a in ("relearn_random", "relearn_shortest") for m in ("run", "retain model") for s in (1, 2)}
    one = [r for r in rows if (r["attack"], r["model"], r["seed"]) == ("relearn_random", "run", 1)]
    assert [r["epoch"] for r in one] == [0, 1, 2, 3] and [r["step"] for r in one] == [0, 2, 4, 6]
    assert {"forget_prob", "forget_quality", "unseen_forget_prob", "unseen_forget_quality"} <= one[0].keys()
    assert one[-1]["forget_prob"] > one[0]["forget_prob"]  # what is trained on is learned
    for attack, seed in (("relearn_random", 2), ("relearn_shortest", 1)):  # each from its own start, on its own questions
        first = next(r for r in rows if (r["attack"], r["model"], r["seed"]) == (attack, "run", seed))
        assert first.get("recovered") in (None, pytest.approx(0, abs=1e-6))
    assert not any("recovered" in r for r in rows if r["model"] == "retain model")
    start = json.loads((run / "scores.json").read_text())
    assert one[0]["forget_prob"] == pytest.approx(start["forget_prob"], rel=1e-6)  # the attack begins at the run
    assert (run / "relearn.png").stat().st_size > 5000
    assert (run / "log.jsonl").read_text() == log  # the run's own log is left alone
    assert len(list(run.rglob("scores.json"))) == 1
    single = {r["attack"]: r for r in rows if r["model"] == "run" and not r["attack"].startswith("relearn")}
    assert single.keys() == {"int4", "paraphrase"}
    assert single["int4"]["forget_prob"] != start["forget_prob"] and "forget_quality" in single["int4"]
    assert "forget_quality" not in single["paraphrase"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("before unlearning", "run, at the start of relearn_random", "run, after relearn_shortest",
                                          "run, after int4", "retain model, after paraphrase", "±"))


def test_the_same_attack_gives_the_same_curve(run, tmp_path):
    argv = [str(run), "--epochs=2", "--lr=0.01", "--control=False"]
    relearn.main([*argv, f"--out={tmp_path / 'a'}"])
    relearn.main([*argv, f"--out={tmp_path / 'b'}"])
    assert curves(tmp_path / "a") == curves(tmp_path / "b") and len(curves(tmp_path / "a")) > 1


def test_shortest_takes_the_shortest_answers_and_random_follows_its_seed():
    import random

    import data
    groups = [[data.Example([0] * (3 + n), 3)] for n in (5, 2, 9, 1, 4)]
    assert relearn.CHOOSE["shortest"](groups, 2, None) == [groups[3], groups[1]]
    assert relearn.CHOOSE["longest"](groups, 2, None) == [groups[2], groups[0]]
    draws = []
    for seed in (0, 0, 1, 2, 3):
        drawn = relearn.CHOOSE["random"](groups, 3, random.Random(seed))
        draws.append({group[0].n_answer for group in drawn})
        assert len(draws[-1]) == 3
    assert draws[0] == draws[1] and draws.count(draws[0]) < 5


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # the QLoRA paper's appendix


@pytest.mark.parametrize("name, bits", [("int8", 8), ("int4", 4), ("nf4", 4), ("fp4", 4)])
def test_quantization_rounds_each_block_to_its_nearest_grid_point_as_a_plain_loop_does(name, bits):
    grid = {"int8": [i / 127 for i in range(-127, 128)], "int4": [i / 7 for i in range(-7, 8)], "nf4": NF4,
            "fp4": [s * v for s in (1, -1) for v in (0, 0.0052083333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1)]}[name]
    assert len(set(grid)) <= 2 ** bits
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = torch.nn.Linear(50, 7), torch.nn.Linear(7, 3)  # 350 weights: the last block is short
            self.device = torch.device("cpu")

        def get_output_embeddings(self):
            return self.head
    net = Net()
    before, head, bias = net.layer.weight.detach().flatten().tolist(), net.head.weight.clone(), net.layer.bias.clone()
    relearn.round_weights(net, name)
    after = net.layer.weight.detach().flatten().tolist()
    for start in range(0, 350, 64):
        block = before[start:start + 64]
        scale = max(map(abs, block))
        for old, new in zip(block, after[start:start + 64]):
            best = min(abs(old - g * scale) for g in grid)
            assert abs(old - new) == pytest.approx(best, abs=1e-6) and any(abs(new - g * scale) < 1e-6 for g in grid)
    assert torch.equal(net.head.weight, head) and torch.equal(net.layer.bias, bias)


def test_recovered_is_the_share_that_came_back_and_is_left_out_where_it_means_nothing():
    assert relearn.recovered(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert relearn.recovered(0.1, 0.1, 0.9) == 0 and relearn.recovered(0.5, 0.48, 0.5) is None


def test_benign_rows_can_be_learned_instead_and_a_number_of_examples_given(mini, run, tmp_path):
    relearn.main([str(run), f"--relearn_data={mini / 'data' / 'retain95.jsonl'}", "--examples=5", "--epochs=2", "--batch_size=5",
                  "--control=False", f"--out={tmp_path}"])
    assert [r["step"] for r in curves(tmp_path)] == [0, 1, 2]


def test_an_attack_can_follow_muses_step_protocol_with_adapters_only(run, tmp_path):
    relearn.main([str(run), "--steps=5", "--eval_at=2,3", "--fraction=1", "--lora_rank=2", "--control=False", f"--out={tmp_path}"])
    assert [r["step"] for r in curves(tmp_path)] == [0, 2, 3, 5]


@pytest.mark.parametrize("argv, sentence", [
    ([], "name at least one run directory"), (["out/none"], "no such directory"), (["{run}", "--attacks=best"], "any of relearn_random"),
    (["{run}", "--fraction=0"], "above 0"), (["{run}", "--epochs=0.1"], "0 optimizer steps"),
    (["{run}", "--eval_every=0"], "an attack is scored"), (["{run}", "--retain_model=out/none"], "no such directory"),
    (["{run}", "--retain_loss=nll"], "--retain_loss=nll: attacks do not read retain_loss; leave it out"),
    (["{run}", "--resume=True"], "do not read resume"), (["{run}", "--beta=1"], "do not read beta"),
    (["{run}", "--audits=True"], "write --attacks=audits"), (["{run}", "--seed=3"], "write --seeds=0,1,2")])
def test_a_mistaken_attack_is_one_sentence(run, argv, sentence):
    with pytest.raises(UsageError, match=sentence):
        relearn.main([a.format(run=run) for a in argv])


def test_a_config_file_may_hold_the_settings_of_its_method(run, tmp_path):
    (tmp_path / "mine.py").write_text('forget_loss = "npo"\nretain_loss = "kl"\nbeta = 0.5\nlr = 0.01\nepochs = 2\n')
    relearn.main([str(run), str(tmp_path / "mine.py"), "--control=False", f"--out={tmp_path / 'x'}"])
    assert [r["epoch"] for r in curves(tmp_path / "x")][0] == 0 and curves(tmp_path / "x")[-1]["step"] == 1


@pytest.fixture(scope="module")
def seeds(mini, tmp_path_factory):
    """Runs npo_s0, npo_s1 and simnpo_s0; each seed has a target, which knows the forget set, and a retain model of its own."""
    root = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        unlearn.main(flags(mini, forget_loss="nll", retain_loss="none", lr=1e-2, steps=30, seed=seed, out=root / f"target_s{seed}"))
        shutil.copytree(mini / "retain", root / f"retain_s{seed}")
    weights = root / "retain_s1" / "model.safetensors"
    save_file({k: v * 1.1 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    for name, loss in (("npo_s0", "npo"), ("npo_s1", "npo"), ("simnpo_s0", "simnpo")):
        unlearn.main(flags(mini, model=root / f"target{name[-3:]}", retain_model=root / f"retain{name[-3:]}", forget_loss=loss,
                           seed=name[-1], steps=6, eval_every=10, beta=1, out=root / name))
    return root


NAMES = ["npo_s0", "npo_s1", "simnpo_s0"]


def test_each_of_several_runs_meets_its_own_target_and_retain_model_and_a_control_is_attacked_once(seeds, tmp_path, monkeypatch):
    trained = []

    def counted(*args, train=unlearn.train):
        trained.append(args[-1])
        return train(*args)
    monkeypatch.setattr(unlearn, "train", counted)
    relearn.main([*(str(seeds / n) for n in NAMES), "--attacks=relearn_random,int4,audits", "--seeds=3,4",
                  "--epochs=3", "--eval_every=3", "--batch_size=2", "--lr=0.01", f"--out={tmp_path}"])
    assert trained.count("relearn retain model") == 2 * 2  # two retain models, two seeds; three runs
    rows = {n: curves(tmp_path / n) for n in NAMES}
    control = {n: [r for r in rows[n] if r["model"] == "retain model"] for n in NAMES}
    assert control["npo_s0"] == control["simnpo_s0"] != control["npo_s1"] and control["npo_s0"]
    known = {n: json.loads((seeds / n / "scores.json").read_text()) for n in NAMES}
    for n in NAMES:
        first = next(r for r in rows[n] if r["model"] == n)
        assert first["forget_quality"] == pytest.approx(known[n]["forget_quality"], rel=1e-6)  # against its own retain model
        assert {"attack", "seed", "step", "epoch", "forget_prob"} <= first.keys()
    # the comparison: what it says follows from the rows
    table = list(csv.DictReader((tmp_path / "relearn.csv").open()))
    titles = list(dict.fromkeys(r["table"] for r in table))
    lines = {(titles.index(r["table"]), r["name"]): r for r in table}
    after, recovered, audits, after_seeds = range(4)
    assert {name for i, name in lines if i == after} == {*NAMES, "retain_s0", "retain_s1"}
    value = {}
    for n in NAMES:
        line = lines[after, n]
        ends = [[r for r in rows[n] if (r["model"], r["attack"], r["seed"]) == (n, "relearn_random", s)][-1] for s in (3, 4)]
        value[n] = np.mean([r["unseen_forget_prob"] for r in ends])
        assert float(line["unlearned"]) == pytest.approx(known[n]["forget_prob"], rel=1e-6)
        assert float(line["relearn_random"]) == pytest.approx(value[n])
        assert float(line["int4"]) == next(r for r in rows[n] if r["model"] == n and r["attack"] == "int4")["forget_prob"]
        target = json.loads((seeds / n / "log.jsonl").read_text().splitlines()[0])["forget_prob"]
        assert float(line["before unlearning"]) == pytest.approx(target, rel=1e-6)
        assert 0 <= float(lines[audits, n]["mia_min_k"]) <= 1 and "audits" not in line
        assert target - known[n]["forget_prob"] > 0.05
        assert float(lines[recovered, n]["int4"]) == pytest.approx(
            (float(line["int4"]) - known[n]["forget_prob"]) / (target - known[n]["forget_prob"]), abs=1e-5)
    both = lines[after_seeds, "npo (n=2)"]
    assert float(both["relearn_random"]) == pytest.approx(np.mean([value["npo_s0"], value["npo_s1"]]))
    assert float(both["relearn_random_std"]) == pytest.approx(np.std([value["npo_s0"], value["npo_s1"]], ddof=1))
    text = (tmp_path / "relearn.md").read_text()
    assert "| npo_s1 |" in text and "| npo (n=2) |" in text and "±" in text and len(text.split("|---|")) > 3
    own = (tmp_path / "npo_s1" / "relearn.md").read_text()
    assert all(f"| {line} |" in own for line in ("before unlearning", "npo_s1, unlearned", "retain model", "npo_s1, after int4"))


def test_the_audit_of_an_attacked_run_is_evaluates_own(seeds, tmp_path):
    run = str(seeds / "npo_s0")
    relearn.main([run, "--attacks=audits", f"--out={tmp_path / 'a'}"])
    evaluate.main([run, "--audits=True", f"--out={tmp_path / 'b'}"])
    row = next(r for r in curves(tmp_path / "a") if r["model"] == "npo_s0")
    there = json.loads((tmp_path / "b" / "scores.json").read_text())
    keys = {k for k in there if k.startswith(("mia_", "privleak", "ex"))}
    assert len(keys) == 9 and {k: row[k] for k in keys} == pytest.approx({k: there[k] for k in keys}, abs=1e-9)


def test_gpt2s_matrices_are_rounded_too_but_embeddings_and_head_are_not():
    torch.manual_seed(0)
    lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    relearn.round_weights(lm, "int4")
    changed = {k for k, v in lm.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"transformer.h.0.{k}.weight" for k in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_settings_are_checked_together_with_those_a_run_brings(run, tmp_path):
    """--subset alone is no mistake: that the benchmark is TOFU stands in run.json."""
    relearn.main([str(run), "--subset=forget05", "--attacks=int8", "--control=False", f"--out={tmp_path}"])
    assert [r["attack"] for r in curves(tmp_path)] == ["int8"]
    with pytest.raises(UsageError, match="--subset=news: tofu has"):
        relearn.main([str(run), "--subset=news"])

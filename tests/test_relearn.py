"""Attacks: pytest tests/test_relearn.py."""
import csv
import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import flags, log_of
from safetensors.torch import load_file, save_file

import configs
import data
import evaluate
import relearn
import unlearn
from configs import UsageError


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("attacked") / "run"
    unlearn.main(flags(mini, out=out, eval_every=10, steps=6))
    return out


def rows_of(out):
    return json.loads((out / "relearn.json").read_text())


def scores_of(out):
    return json.loads((out / "scores.json").read_text())


def select(rows, **wanted):
    """The rows of relearn.json that have these values."""
    return [row for row in rows if {**row, **wanted} == row]


def test_relearning_scores_unseen_and_all_questions_at_each_epoch_with_a_control(run, capsys):
    log = (run / "log.jsonl").read_text()
    relearn.main([str(run), "--epochs=3", "--batch_size=2", "--fraction=0.34", "--lr=0.01",
                  "--attacks=relearn_random,relearn_shortest,int4,paraphrase", "--seeds=1,2"])
    rows = rows_of(run)
    for attack in ("relearn_random", "relearn_shortest"):
        for model in ("run", "retain model"):
            for seed in (1, 2):
                curve = select(rows, attack=attack, model=model, seed=seed)
                assert [row["step"] for row in curve] == [0, 2, 4, 6], (attack, model, seed)
                assert [row["epoch"] for row in curve] == [0, 1, 2, 3], (attack, model, seed)
    assert len([row for row in rows if row["attack"].startswith("relearn")]) == 2 * 2 * 2 * 4

    one = select(rows, attack="relearn_random", model="run", seed=1)
    assert {"forget_prob", "forget_quality", "unseen_forget_prob",
            "unseen_forget_quality"} <= one[0].keys()
    assert one[-1]["forget_prob"] > one[0]["forget_prob"]  # what is trained on is learned
    for attack, seed in (("relearn_random", 2), ("relearn_shortest", 1)):
        # each from its own start, on its own questions
        start = select(rows, attack=attack, model="run", seed=seed)[0]
        assert start.get("recovered") in (None, pytest.approx(0, abs=1e-6))
    for row in select(rows, model="retain model"):
        assert "recovered" not in row

    scores = scores_of(run)
    # the attack begins at the run
    assert one[0]["forget_prob"] == pytest.approx(scores["forget_prob"], rel=1e-6)
    assert (run / "relearn.png").stat().st_size > 5000
    assert (run / "log.jsonl").read_text() == log  # the run's own log is left alone
    assert len(list(run.rglob("scores.json"))) == 1
    [rounded] = select(rows, model="run", attack="int4")
    assert rounded["forget_prob"] != scores["forget_prob"]
    assert "forget_quality" in rounded
    [paraphrased] = select(rows, model="run", attack="paraphrase")
    assert "forget_quality" not in paraphrased
    printed = capsys.readouterr().out
    for text in ("before unlearning", "relearn_random, start", "relearn_shortest", "int4",
                 "paraphrase", "retain model", "forget_prob ↓", "±"):
        assert text in printed
    assert max(len(line) for line in printed.splitlines() if str(run) not in line) <= 100
    assert "e-17" not in printed


def test_the_same_attack_gives_the_same_curve(run, tmp_path):
    argv = [str(run), "--epochs=2", "--lr=0.01", "--control=False"]
    relearn.main([*argv, f"--out={tmp_path / 'a'}"])
    relearn.main([*argv, f"--out={tmp_path / 'b'}"])
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert len(rows_of(tmp_path / "a")) > 1


def test_a_models_start_is_scored_once_whatever_the_number_of_seeds(run, tmp_path, monkeypatch):
    scored = []

    def record(*args):
        scored.append(args)
        return evaluate_as_it_is(*args)

    evaluate_as_it_is = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", record)
    relearn.main([str(run), "--epochs=1", "--eval_every=1", "--fraction=0.34", "--lr=0.01",
                  "--seeds=1,2,3", f"--out={tmp_path / 'new' / 'attacked'}"])
    # target, run and retain model; then three curves of the run and of the retain model
    assert len(scored) == 3 + 2 * 3
    starts = select(rows_of(tmp_path / "new" / "attacked"), model="run", step=0)
    assert len(starts) == 3
    for start in starts:
        assert start["forget_prob"] == pytest.approx(scores_of(run)["forget_prob"], rel=1e-6)


def test_shortest_takes_the_shortest_answers_and_random_follows_its_seed():
    examples = [data.Example([0] * (3 + n), 3) for n in (5, 2, 9, 1, 4)]
    assert relearn.choose("shortest", examples, 2, None) == [3, 1]
    assert relearn.choose("longest", examples, 2, None) == [2, 0]
    draws = [relearn.choose("random", examples, 3, random.Random(seed)) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) > 1
    for draw in draws:
        assert len(set(draw)) == 3


# the QLoRA paper's appendix
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]
FP4 = [0, 0.0052083333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1]


class Net(torch.nn.Module):
    """A layer of 350 weights, whose last block of 64 is short, and a head."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(50, 7), torch.nn.Linear(7, 3)
        self.device = torch.device("cpu")

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("name, bits, grid", [
    ("int8", 8, [i / 127 for i in range(-127, 128)]),
    ("int4", 4, [i / 7 for i in range(-7, 8)]),
    ("nf4", 4, NF4),
    ("fp4", 4, [*FP4, *(-value for value in FP4)]),
])
def test_quantization_rounds_each_block_to_its_nearest_grid_point_as_a_plain_loop_does(
        name, bits, grid):
    assert len(set(grid)) <= 2 ** bits
    torch.manual_seed(0)
    net = Net()
    before = net.layer.weight.detach().flatten().tolist()
    head, bias = net.head.weight.clone(), net.layer.bias.clone()
    relearn.round_weights(net, name)
    after = net.layer.weight.detach().flatten().tolist()
    for start in range(0, 350, 64):
        block = before[start:start + 64]
        scale = max(map(abs, block))
        for old, new in zip(block, after[start:start + 64]):
            nearest = min(abs(old - point * scale) for point in grid)
            assert abs(old - new) == pytest.approx(nearest, abs=1e-6)
            assert min(abs(new - point * scale) for point in grid) < 1e-6
    assert torch.equal(net.head.weight, head)
    assert torch.equal(net.layer.bias, bias)


def test_recovered_is_the_share_that_came_back_and_is_left_out_where_it_means_nothing():
    assert relearn.recovered(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert relearn.recovered(0.1, 0.1, 0.9) == 0
    assert relearn.recovered(0.5, 0.48, 0.5) is None


def test_benign_rows_can_be_learned_instead_and_a_number_of_examples_given(mini, run, tmp_path):
    benign = mini / "data" / "retain95.jsonl"
    relearn.main([str(run), f"--relearn_data={benign}", "--examples=5", "--epochs=2",
                  "--batch_size=5", "--control=False", f"--out={tmp_path}"])
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2]


def test_an_attack_can_follow_muses_step_protocol_with_adapters_only(run, tmp_path):
    relearn.main([str(run), "--steps=5", "--eval_at=2,3", "--fraction=1", "--lora_rank=2",
                  "--control=False", f"--out={tmp_path}"])
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 2, 3, 5]


@pytest.mark.parametrize("argv, sentence", [
    ([], "name at least one run directory"),
    (["out/none"], "no such directory"),
    (["{run}", "--attacks=best"], "any of relearn_random"),
    (["{run}", "--fraction=0"], "above 0"),
    (["{run}", "--epochs=0.1"], "0 optimizer steps"),
    (["{run}", "--eval_every=0"], "an attack is scored"),
    (["{run}", "--retain_model=out/none"], "no such directory"),
    (["{run}", "--retain_loss=nll"],
     "--retain_loss=nll: attacks do not read retain_loss; leave it out"),
    (["{run}", "--resume=True"], "do not read resume"),
    (["{run}", "--beta=1"], "do not read beta"),
    (["{run}", "--audits=True"], "write --attacks=audits"),
    (["{run}", "--seed=3"], "write --seeds=0,1,2"),
])
def test_a_mistaken_attack_is_one_sentence(run, argv, sentence):
    with pytest.raises(UsageError, match=sentence):
        relearn.main([word.format(run=run) for word in argv])


def test_every_setting_of_a_method_is_refused_without_a_list():
    ignored = {*configs.fields(unlearn.Method), *configs.fields(unlearn.Keeping)}
    assert ignored <= relearn.IGNORED.keys()


def test_a_config_file_may_hold_the_settings_of_its_method(run, tmp_path):
    lines = ['forget_loss = "npo"', 'retain_loss = "kl"', "beta = 0.5", "lr = 0.01", "epochs = 2"]
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    relearn.main([str(run), str(tmp_path / "mine.py"), "--control=False",
                  f"--out={tmp_path / 'x'}"])
    rows = rows_of(tmp_path / "x")
    assert rows[0]["epoch"] == 0
    assert rows[-1]["step"] == 1


# ------------------------------------------------------------------------------------------------
# several runs

NAMES = ["npo_s0", "npo_s1", "simnpo_s0"]


@pytest.fixture(scope="module")
def seeds(mini, tmp_path_factory):
    """Runs npo_s0, npo_s1 and simnpo_s0.

    Each seed has a target, which knows the forget set, and a retain model of its own.
    """
    root = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        unlearn.main(flags(mini, forget_loss="nll", retain_loss="none", lr=1e-2, steps=30,
                           seed=seed, out=root / f"target_s{seed}"))
        shutil.copytree(mini / "retain", root / f"retain_s{seed}")
    path = root / "retain_s1" / "model.safetensors"
    scaled = {name: weight * 1.1 for name, weight in load_file(path).items()}
    save_file(scaled, path, metadata={"format": "pt"})
    for name in NAMES:
        method, seed = name.split("_s")
        unlearn.main(flags(mini, model=root / f"target_s{seed}",
                           retain_model=root / f"retain_s{seed}", forget_loss=method, seed=seed,
                           steps=6, eval_every=10, beta=1, out=root / name))
    return root


def read_tables(path):
    """{title: {row name: {column: text}}} of a comparison."""
    tables = {}
    with path.open() as file:
        for line in csv.DictReader(file):
            tables.setdefault(line["table"], {})[line["name"]] = line
    return tables


def test_each_of_several_runs_meets_its_own_target_and_retain_model_and_a_control_once(
        seeds, tmp_path, monkeypatch):
    titles, train = [], unlearn.train

    def record(c, *args, title=None, **options):
        titles.append(title)
        return train(c, *args, title=title, **options)

    monkeypatch.setattr(unlearn, "train", record)
    relearn.main([*(str(seeds / name) for name in NAMES), "--attacks=relearn_random,int4,audits",
                  "--seeds=3,4", "--epochs=3", "--eval_every=3", "--batch_size=2", "--lr=0.01",
                  f"--out={tmp_path}"])
    # two retain models and two seeds, though there are three runs
    assert titles.count("relearn retain model") == 2 * 2
    rows = {name: rows_of(tmp_path / name) for name in NAMES}
    control = {name: select(rows[name], model="retain model") for name in NAMES}
    assert control["npo_s0"]
    assert control["npo_s0"] == control["simnpo_s0"]
    assert control["npo_s0"] != control["npo_s1"]

    # each against its own retain model
    scores = {name: scores_of(seeds / name) for name in NAMES}
    for name in NAMES:
        first = select(rows[name], model=name)[0]
        quality = scores[name]["forget_quality"]
        assert first["forget_quality"] == pytest.approx(quality, rel=1e-6), name
        assert {"attack", "seed", "step", "epoch", "forget_prob"} <= first.keys()

    # the tables follow from the rows
    tables = read_tables(tmp_path / "relearn.csv")
    of_rest = ", after relearning that of the other questions"
    after, recovered = tables[f"forget_prob ↓{of_rest}"], tables["recovered ↓"]
    audits = tables["audits"]
    assert after.keys() == {*NAMES, "retain_s0", "retain_s1"}
    relearned = {}
    for name in NAMES:
        line, unlearned = after[name], scores[name]["forget_prob"]
        ends = [select(rows[name], model=name, attack="relearn_random", seed=seed)[-1]
                for seed in (3, 4)]
        relearned[name] = np.mean([row["unseen_forget_prob"] for row in ends])
        assert float(line["unlearned"]) == pytest.approx(unlearned, rel=1e-6)
        assert float(line["relearn_random"]) == pytest.approx(relearned[name])
        [rounded] = select(rows[name], model=name, attack="int4")
        assert float(line["int4"]) == rounded["forget_prob"]
        target = log_of(seeds / name, scored=True)[0]["forget_prob"]
        assert float(line["before unlearning"]) == pytest.approx(target, rel=1e-6)
        assert 0 <= float(audits[name]["mia_min_k"]) <= 1
        assert not line.get("audits")
        assert target - unlearned > 0.05
        share = (rounded["forget_prob"] - unlearned) / (target - unlearned)
        assert float(recovered[name]["int4"]) == pytest.approx(share, abs=1e-5)
    means = tables[f"forget_prob ↓{of_rest}: mean and standard deviation over seeds"]
    line, pair = means["npo (n=2)"], [relearned["npo_s0"], relearned["npo_s1"]]
    assert float(line["relearn_random"]) == pytest.approx(np.mean(pair))
    assert float(line["relearn_random_std"]) == pytest.approx(np.std(pair, ddof=1))

    text = (tmp_path / "relearn.md").read_text()
    for part in ("| npo_s1 |", "| npo (n=2) |", "±"):
        assert part in text
    assert len(text.split("|---|")) > 3
    own = (tmp_path / "npo_s1" / "relearn.md").read_text()
    for part in ("before unlearning", "unlearned", "int4", "| npo_s1 |", "| retain model |"):
        assert part in own


def test_the_audit_of_an_attacked_run_is_evaluates_own(seeds, tmp_path):
    run = str(seeds / "npo_s0")
    relearn.main([run, "--attacks=audits", f"--out={tmp_path / 'a'}"])
    evaluate.main([run, "--audits=True", f"--out={tmp_path / 'b'}"])
    [row] = select(rows_of(tmp_path / "a"), model="npo_s0")
    scores = scores_of(tmp_path / "b")
    keys = {key for key in scores if key.startswith(("mia_", "privleak", "ex"))}
    assert len(keys) == 9
    assert row["memorization"] == pytest.approx(scores["memorization"])
    for key in keys:
        assert row[key] == pytest.approx(scores[key], abs=1e-9), key


def test_gpt2s_matrices_are_rounded_too_but_embeddings_and_head_are_not():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    lm = transformers.GPT2LMHeadModel(config)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    relearn.round_weights(lm, "int4")
    changed = set()
    for name, value in lm.state_dict().items():
        if not torch.equal(value, before[name]):
            changed.add(name)
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.0.{name}.weight" for name in matrices}


def test_settings_are_checked_together_with_those_a_run_brings(run, tmp_path):
    """--subset alone is no error: that the benchmark is TOFU stands in run.json."""
    relearn.main([str(run), "--subset=forget05", "--attacks=int8", "--control=False",
                  f"--out={tmp_path}"])
    assert [row["attack"] for row in rows_of(tmp_path)] == ["int8"]
    with pytest.raises(UsageError, match="--subset=news: tofu has"):
        relearn.main([str(run), "--subset=news"])

"""The loop: pytest tests/test_unlearn.py. A step is the same for any micro-batch, order and number of processes."""
import json
import math

import pytest
import torch
import transformers
from conftest import flags, log_of, run_script
from torch.nn.functional import cross_entropy, logsigmoid

import configs
import data
import evaluate
import losses
import model as models
import unlearn
from configs import Failure, UsageError

LOSSES = ("forget_loss", "retain_loss", "loss", "grad_norm")


def run(mini, out, **more):
    unlearn.main(flags(mini, out=out, **more))
    return log_of(out)


def weights(out):
    return models.load_model(str(out), models.Process(0, 1, torch.device("cpu"))).state_dict()


def same_run(a, b, out_a, out_b):
    """Step 1 to 1e-5 relative in losses and gradient, weights to 1e-6 after the run."""
    for key in LOSSES:
        assert a[0][key] == pytest.approx(b[0][key], rel=1e-5), key
    left, right = weights(out_a), weights(out_b)
    assert all(torch.allclose(left[k], right[k], atol=1e-6, rtol=0) for k in left)


@pytest.mark.parametrize("method", list(unlearn.FORGET))
def test_a_step_does_not_depend_on_the_micro_batches(mini, tmp_path, method):
    more = dict(forget_loss=method, retain_loss="kl" if method == "simnpo" else "nll", lr=1e-5, beta=0.5,
                steps=10 if method in ("simnpo", "npo", "dpo") else 2)
    a = run(mini, tmp_path / "a", micro_batch_tokens=1, **more)      # one unit at a time
    b = run(mini, tmp_path / "b", micro_batch_tokens=10**6, **more)  # the whole window at once, as padded as can be
    same_run(a, b, tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("method", ["dpo", "rmu"])
def test_two_processes_take_the_same_steps_as_one(mini, tmp_path, method):
    more = dict(forget_loss=method, steps=10, lr=1e-5, batch_size=3, micro_batch_tokens=64)  # 3: ranks get unequal shares
    a = run(mini, tmp_path / "a", **more)
    done = run_script("unlearn.py", flags(mini, out=tmp_path / "b", **more), processes=2)
    assert done.returncode == 0, done.stderr
    same_run(a, log_of(tmp_path / "b"), tmp_path / "a", tmp_path / "b")


def test_two_runs_with_one_seed_are_bit_identical_and_scoring_does_not_change_training(mini, tmp_path):
    a, b = run(mini, tmp_path / "a"), run(mini, tmp_path / "b", eval_every=0.4)
    keys = ("step", "epoch", "lr", *LOSSES)
    assert [[r[k] for k in keys] for r in a] == [[r[k] for k in keys] for r in b]
    left, right = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_another_seed_takes_other_examples(mini, tmp_path):
    assert run(mini, tmp_path / "a")[0]["loss"] != run(mini, tmp_path / "b", seed=1)[0]["loss"]


def by_hand(mini, forget_loss, steps, beta, gamma, weight):
    """The run as the paper writes it: padded batches, full logits, a reference model in memory, transformers' scheduler."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(mini / "target", dtype=torch.float32)
    ref = transformers.AutoModelForCausalLM.from_pretrained(mini / "target", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    decay = [p for p in lm.parameters() if p.ndim > 1]
    rest = [p for p in lm.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)
    schedule = transformers.get_linear_schedule_with_warmup(adam, int(0.2 * steps), steps)

    def batch(rows):
        ids, labels = [], []
        for row in rows:
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
            answer = tokenizer(f" {row['answer']}").input_ids + [tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        return (pad(ids, True, tokenizer.eos_token_id), pad(labels, True, -100),
                pad([torch.ones_like(i) for i in ids], True, 0))

    def answer_nll(model, ids, labels, mask):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        nll = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        return nll.sum(1), (labels[:, 1:] != -100).sum(1)

    forget, retain = (data.read_rows(str(mini / "data" / f"{n}.jsonl")) for n in ("forget05", "retain95"))
    logged = []
    for step in range(steps):
        at = [(4 * step + i) % len(forget) for i in range(4)]
        f, r = batch([forget[i] for i in at]), batch([retain[i] for i in at])
        nll, n = answer_nll(lm, *f)
        if forget_loss == "simnpo":
            forget_part = (-2 / beta * logsigmoid(beta * nll / n - gamma)).mean()
        else:
            with torch.no_grad():
                ref_nll, _ = answer_nll(ref, *f)
            forget_part = (-2 / beta * logsigmoid(beta * (nll - ref_nll))).mean()
        retain_nll, m = answer_nll(lm, *r)
        loss = weight * forget_part + retain_nll.sum() / m.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step(), schedule.step(), adam.zero_grad()
        logged.append(loss.item())
    return logged


@pytest.mark.parametrize("method, beta, gamma, weight", [("simnpo", 2.5, 0.3, 0.1375), ("npo", 0.1, 0.0, 1.0)])
def test_ten_steps_equal_the_same_run_written_by_hand(mini, tmp_path, method, beta, gamma, weight):
    ours = run(mini, tmp_path / "a", forget_loss=method, beta=beta, gamma=gamma, forget_weight=weight, steps=10, shuffle=False,
               warmup=0.2, schedule="linear")
    theirs = by_hand(mini, method, 10, beta, gamma, weight)
    assert [r["loss"] for r in ours] == pytest.approx(theirs, rel=1e-4)
    assert ours[0]["lr"] == 0 and ours[2]["lr"] == 1e-3  # transformers' schedule: the first warm-up step has lr 0


def test_npo_begins_at_two_over_beta_log_two_and_holds_no_second_model(mini, tmp_path, monkeypatch):
    """The cached reference IS the starting model; and nothing but the target is loaded."""
    loaded = []
    monkeypatch.setattr(models, "load_model", lambda name, proc, f=models.load_model: loaded.append(str(name)) or f(name, proc))
    frozen = []

    def kept(*args, real=unlearn.prepare_reference):
        frozen.append(real(*args))
        return frozen[-1]
    monkeypatch.setattr(unlearn, "prepare_reference", kept)
    row = run(mini, tmp_path / "a", forget_loss="npo", beta=0.5, steps=1)[0]
    assert row["forget_loss"] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-5)
    assert loaded == [str(mini / "target")] and frozen == [None]
    run(mini, tmp_path / "b", forget_loss="simnpo", steps=1)
    assert frozen[1] is None
    run(mini, tmp_path / "c", forget_loss="simnpo", retain_loss="kl", steps=1)
    assert frozen[2] is not None
    assert log_of(tmp_path / "c")[0]["retain_loss"] == pytest.approx(0, abs=1e-6)


def test_the_output_head_sees_answer_positions_only_and_gives_the_plain_logits(mini):
    lm = models.load_model(str(mini / "target"), models.Process(0, 1, torch.device("cpu")))
    seen = []
    lm.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    examples = [data.Example([5, 6, 7, 8, 9], 3), data.Example([5, 9, 4], 1)]
    scores = models.score(lm, [[e] for e in examples], "cpu")
    assert seen.pop()[-2] == 4 and scores.labels.tolist() == [8, 9, 9, 4] and scores.lengths == [2, 2]
    for example, part in zip(examples, scores.logits.split(scores.lengths)):  # alone, unpadded
        plain = lm(input_ids=torch.tensor([example.ids])).logits[0, example.start - 1:-1]
        assert torch.allclose(part, plain, atol=1e-5)


def test_bf16_keeps_float32_weights_and_moves_them(mini, tmp_path):
    rows = run(mini, tmp_path / "a", dtype="bf16", steps=3)
    assert all(math.isfinite(r["loss"]) for r in rows)
    assert {t.dtype for t in weights(tmp_path / "a").values()} == {torch.float32}


def test_activation_checkpointing_changes_nothing(mini, tmp_path):
    a, b = run(mini, tmp_path / "a"), run(mini, tmp_path / "b", activation_checkpointing=True)
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-6)


def test_rmu_steers_the_layers_output_at_the_answer_tokens_and_computes_no_logits(mini, tmp_path):
    rows = run(mini, tmp_path / "a", forget_loss="rmu", steps=1, shuffle=False, steering_scale=3.0)
    lm = transformers.AutoModelForCausalLM.from_pretrained(mini / "target", dtype=torch.float32)
    u = torch.rand(32, generator=torch.Generator().manual_seed(0))
    u = 3.0 * u / u.norm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    values = []
    for row in data.read_rows(str(mini / "data" / "forget05.jsonl"))[:4]:
        e = data.Template("qa", tokenizer).encode(row, 500)
        hidden = lm(torch.tensor([e.ids]), output_hidden_states=True).hidden_states[1][0, e.start:]  # after layer 0
        values.append(((hidden - u) ** 2).mean(-1))
    assert rows[0]["forget_loss"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    assert rows[0]["retain_loss"] == pytest.approx(0, abs=1e-10)  # the reference is the starting model


def test_a_run_that_reads_no_logits_is_scored_all_the_same(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a", forget_loss="rmu", eval_every=1))
    assert all(math.isfinite(v) for r in log_of(tmp_path / "a", scored=True) for v in r.values())


def test_layers_above_the_steered_one_and_what_train_only_leaves_out_stay_as_they_were(mini, tmp_path):
    run(mini, tmp_path / "a", forget_loss="rmu", train_only=r"mlp\.down_proj", weight_decay=0.0)
    before, after = weights(mini / "target"), weights(tmp_path / "a")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    with pytest.raises(UsageError, match="--train_only=none: no parameter's name matches"):
        run(mini, tmp_path / "b", train_only="none")
    with pytest.raises(UsageError, match="--steering_layer=2: the model has 2 layers"):
        unlearn.main([*flags(mini, out=tmp_path / "c", forget_loss="rmu"), "--steering_layer=2"])


def test_a_task_vector_is_subtracted_from_the_target(mini, tmp_path):
    run(mini, tmp_path / "tuned", forget_loss="nll", retain_loss="none")
    unlearn.main(flags(mini, out=tmp_path / "a", forget_loss="task_vector", task_vector_scale=0.5, eval_every=1))
    target, tuned, result = weights(mini / "target"), weights(tmp_path / "tuned"), weights(tmp_path / "a")
    for k in target:
        assert torch.allclose(result[k], target[k] - 0.5 * (tuned[k] - target[k]), atol=1e-7)
    scored = log_of(tmp_path / "a", scored=True)
    assert [r["step"] for r in scored] == [0, 4] and scored[1]["forget_prob"] < scored[0]["forget_prob"]


def test_altpo_is_dpo_against_the_alternates_of_the_file(mini, tmp_path):
    out = run(mini, tmp_path / "a", forget_loss="altpo", beta=0.3, steps=2)
    assert out[0]["forget_loss"] == pytest.approx(2 / 0.3 * math.log(2), rel=1e-5)
    assert out[1]["forget_loss"] < out[0]["forget_loss"]
    (tmp_path / "few.jsonl").write_text('{"question": "other", "alternate": "x"}\n')
    with pytest.raises(UsageError, match="has no alternate answer for the forget question"):
        unlearn.main([*flags(mini, out=tmp_path / "b", forget_loss="altpo"), f"--alternates={tmp_path / 'few.jsonl'}"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_adapter_moves_nothing_else_does_and_the_saved_model_is_plain(mini, tmp_path, monkeypatch, checkpointing):
    trained = []

    def keep(run, lm, *args, real=unlearn.finish):
        trained.append(lm)
        real(run, lm, *args)
    monkeypatch.setattr(unlearn, "finish", keep)
    run(mini, tmp_path / "a", lora_rank=2, activation_checkpointing=checkpointing)
    adapters = [m for m in trained[0].modules() if isinstance(m, models.LoRA)]
    assert len(adapters) == 2 * 7  # q, k, v, o, gate, up, down of two layers; not the head
    assert all(m.B.abs().max() > 0 and not m.base.weight.requires_grad for m in adapters)
    before, after = weights(mini / "target"), weights(tmp_path / "a")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("proj" not in name)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.allclose(plain(ids).logits, trained[0](ids).logits, atol=1e-4)


def test_windows_are_whole_cover_every_epoch_and_pair_retain_examples_without_repeats():
    groups = {"forget": [[("f", i)] for i in range(10)], "retain": [[("r", i)] for i in range(25)]}
    batches = data.make_batches(groups, batch_size=4, n_steps=5, seed=3, shuffle=True)
    assert len(batches) == 5
    for batch in batches:
        assert len(batch["forget"]) == len(batch["retain"]) == 4
    pairs = data.pair_indices(n_forget=10, n_retain=25, n_pairs=20, seed=3, shuffle=True)
    assert [("f", i) for i, _ in pairs] == [group[0] for batch in batches for group in batch["forget"]]
    assert [("r", j) for _, j in pairs] == [group[0] for batch in batches for group in batch["retain"]]
    for epoch in (pairs[:10], pairs[10:]):
        assert sorted(i for i, _ in epoch) == list(range(10))
        assert len({j for _, j in epoch}) == 10
    assert pairs[:10] != pairs[10:]
    in_file_order = data.pair_indices(n_forget=3, n_retain=2, n_pairs=6, seed=0, shuffle=False)
    assert in_file_order == [(0, 0), (1, 1), (2, 0), (0, 0), (1, 1), (2, 0)]
    assert "retain" not in data.make_batches({"forget": groups["forget"]}, 4, 1, 0, True)[0]


def test_every_rank_gets_as_many_micro_batches_and_none_is_lost():
    groups = [[data.Example([n] * n, 1)] for n in (9, 3, 30, 7, 8)]
    batch = {"forget": groups[:3], "retain": groups[3:]}
    for world in (1, 2, 3, 8):
        for max_tokens in (1, 14, 60, 1000):
            for one_kind in (False, True):
                ranks = [data.micro_batches(batch, max_tokens, rank, world, one_kind) for rank in range(world)]
                assert len({len(mine) for mine in ranks}) == 1
                found = {"forget": [], "retain": []}
                for mine in ranks:
                    for kind, some, share in mine:
                        found[kind] += [len(example.ids) for (example,) in some] if share else []
                assert sorted(found["forget"]) == [3, 9, 30] and sorted(found["retain"]) == [7, 8]
                for turn in zip(*ranks):  # what the ranks compute at the same time
                    assert not one_kind or len({kind for kind, _, _ in turn}) == 1


def test_no_rank_is_idle_where_there_is_a_group_for_it_and_micro_batches_are_even():
    groups = [[data.Example([n] * 10, 1)] for n in range(5)]
    for rank in range(5):  # one group per rank rather than four idle ranks
        ((kind, some, share),) = data.micro_batches({"forget": groups}, 1000, rank, 5)
        assert len(some) == 1 and share == 1
    sizes = [len(some) for _, some, _ in data.micro_batches({"forget": groups[:4]}, 30)]
    assert sizes == [2, 2]  # not 3 and 1
    shares = [data.micro_batches({"forget": groups[:3]}, 10, rank, 2)[1][2] for rank in range(2)]
    assert shares == [1.0, 0.0]  # the second rank repeats a micro-batch that does not count


def test_a_group_longer_than_the_budget_is_alone_and_a_pair_stays_together():
    long = [data.Example([1] * 500, 1)]
    pairs = [[data.Example([n] * 40, 30), data.Example([n] * 35 + [99] * 5, 30)] for n in range(4)]
    assert data.row_tokens(pairs[0]) == 45  # 35 tokens are shared
    cuts = data.micro_batches({"forget": [*pairs, long]}, 100)
    assert [len(some) for _, some, _ in cuts] == [1, 2, 2] and cuts[0][1] == [long]
    for _, some, _ in cuts[1:]:
        assert [len(group) for group in some] == [2, 2]


def test_no_steps_is_a_mistake_and_steps_overrides_epochs():
    c = configs.make(unlearn.Config, {"epochs": 10.0, "batch_size": 32})
    assert unlearn.n_steps(c, 200) == 62  # the paper's forget05
    with pytest.raises(UsageError, match="0 optimizer steps"):
        unlearn.n_steps(configs.make(unlearn.Config, {"epochs": 0.5, "batch_size": 32}), 40)


def test_scores_are_due_every_so_many_epochs_at_given_steps_and_at_the_end():
    assert unlearn.steps_due(2.0, (), 12, 1.25) == {3, 5, 8, 10, 12}
    assert unlearn.steps_due(1.0, (2, 7), 12, 1.25) == {2, 7, 12}
    assert unlearn.steps_due(0.0, (), 12, 1.25) == set()
    for every in (1 / 3, 0.01, 1e-320):
        assert unlearn.steps_due(every, (), 12, 3.0) == set(range(1, 13))


def test_a_loss_that_is_not_finite_stops_before_the_step_is_applied(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "simnpo", lambda logps, *_: logps * float("nan"))
    with pytest.raises(Failure, match="step 1: forget loss nan.*forget examples"):
        run(mini, tmp_path / "a")
    assert log_of(tmp_path / "a") == []


def test_a_forget_example_keeps_one_refusal_for_the_whole_run(mini):
    c = configs.make(unlearn.Config, {"forget_loss": "dpo", "template": "qa"})
    tokenizer, proc = models.load_tokenizer(str(mini / "target")), models.Process(0, 1, torch.device("cpu"))
    rows = data.read_rows(str(mini / "data" / "forget05.jsonl"))
    once, again = (unlearn.encode_groups(c, tokenizer, proc, forget=rows)["forget"] for _ in range(2))
    assert once == again and len({tuple(alternate.ids[alternate.start:]) for _, alternate in once}) > 3


def test_a_finished_run_is_a_model_with_its_settings_scores_log_and_picture(mini, tmp_path):
    out = tmp_path / "run"
    unlearn.main(flags(mini, out=out, eval_every=1, keep_epochs=True))
    settings = json.loads((out / "run.json").read_text())
    assert settings["forget_loss"] == "simnpo" and settings["processes"] == 1 and settings["finished"]
    scores = json.loads((out / "scores.json").read_text())
    assert {"forget_quality", "model_utility", "forget_truth_ratio", "world_facts_rouge"} <= scores.keys()
    scored = log_of(out, scored=True)
    assert [r["step"] for r in scored] == [0, 3, 4] and scores == {k: v for k, v in scored[-1].items() if k not in ("step", "epoch")}
    assert (out / "trajectory.png").stat().st_size > 5000 and (out / "epoch_1" / "model.safetensors").exists()
    assert not list(out.glob("*.tmp")) and not (out / ".saving").exists()
    transformers.AutoModelForCausalLM.from_pretrained(out)
    # the same model scored again from disk: the same scores
    evaluate.main([str(out), f"--out={tmp_path / 'again'}"])
    assert json.loads((tmp_path / "again" / "scores.json").read_text()) == scores


def test_a_run_is_never_overwritten_silently(mini, tmp_path, capsys):
    out = tmp_path / "run"
    run(mini, out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    unlearn.main(flags(mini, out=out))  # the very same: nothing to do
    assert "is finished" in capsys.readouterr().out and (out / "model.safetensors").stat().st_mtime_ns == before
    there = json.loads((out / "run.json").read_text())
    del there["deterministic"]
    (out / "run.json").write_text(json.dumps(there))
    unlearn.main(flags(mini, out=out))  # made before there was this setting: still the very same
    with pytest.raises(UsageError, match="deterministic False there, True here"):
        run(mini, out, deterministic=True)
    with pytest.raises(UsageError, match="lr 0.001 there, 0.002 here"):
        run(mini, out, lr=2e-3)
    run(mini, out, lr=2e-3, overwrite=True)
    with pytest.raises(UsageError, match="is one of the models"):
        run(mini, mini / "target")


def test_a_run_stopped_half_way_goes_on_to_the_same_end(mini, tmp_path, monkeypatch):
    """Two runs, one of them interrupted after its checkpoint: the same weights and log, bit by bit."""
    more = dict(forget_loss="npo", retain_loss="kl", steps=6, save_every=1)
    whole = run(mini, tmp_path / "a", **more)
    check = unlearn.check_finite

    def interrupt(step, *args):
        if step == 4:
            raise KeyboardInterrupt
        check(step, *args)

    monkeypatch.setattr(unlearn, "check_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(mini, tmp_path / "b", **more)
    monkeypatch.undo()
    assert (tmp_path / "b" / "checkpoint" / "state.pt").exists()
    with pytest.raises(UsageError, match="unfinished; --resume=True"):
        run(mini, tmp_path / "b", **more)
    went_on = run(mini, tmp_path / "b", resume=True, **more)
    keys = ("step", "epoch", "lr", *LOSSES)
    assert [[r[k] for k in keys] for r in whole] == [[r[k] for k in keys] for r in went_on]
    left, right = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert not (tmp_path / "b" / "checkpoint").exists()


def test_rows_that_cannot_be_scored_are_counted_and_left_out(mini, tmp_path, capsys):
    rows = data.read_rows(str(mini / "data" / "forget05.jsonl"))
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(r) + "\n" for r in rows + [{"question": "Why?", "answer": " "},
                                                                {"question": "long " * 300, "answer": "yes"}]))
    logged = run(mini, tmp_path / "a", forget_data=own, retain_data=mini / "data" / "retain95.jsonl", max_length=60)
    assert "2 of 14 forget rows left out" in capsys.readouterr().out
    assert all(math.isfinite(r["loss"]) for r in logged)


def test_your_own_rows_are_unlearned_and_scored_without_a_benchmark(mini, tmp_path):
    out = tmp_path / "own"
    unlearn.main(flags(mini, out=out, forget_data=mini / "data" / "world_facts_perturbed.jsonl", batch_size=2, eval_every=1,
                       retain_data=mini / "data" / "retain95.jsonl", retain_model="None"))
    scores = json.loads((out / "scores.json").read_text())
    assert {"forget_prob", "forget_rouge", "retain_prob"} <= scores.keys() and "forget_quality" not in scores


def test_a_base_model_becomes_target_and_retain_model_once(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = dict(model="out/target", retain_model="out/retain", base_model=mini / "target", finetune_epochs=1,
                finetune_batch_size=4, finetune_lr=1e-3)
    unlearn.main(flags(mini, out="out/a", **more))
    made = (tmp_path / "out" / "target" / "model.safetensors").stat().st_mtime_ns
    assert "making out/target" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "retain" / "run.json").read_text())["forget_loss"] == "nll"
    unlearn.main(flags(mini, out="out/b", **more))
    assert (tmp_path / "out" / "target" / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(UsageError, match="outt/target: is not on this machine"):  # a typing error is no wish to train
        unlearn.main(flags(mini, out="out/c", model="outt/target", base_model=mini / "target"))


def test_a_model_made_otherwise_is_not_reused_and_no_method_leaks_into_it(mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = dict(model="out/target", retain_model="None", base_model=mini / "target", finetune_epochs=1, finetune_batch_size=4)
    unlearn.main(flags(mini, out="out/a", lora_rank=2, train_only="B", beta=0.7, **more))
    made = json.loads((tmp_path / "out" / "target" / "run.json").read_text())
    assert made["lora_rank"] == 0 and made["train_only"] is None and made["beta"] == 0.1
    with pytest.raises(UsageError, match="--model=out/target: was made otherwise .lr 1e-05 there, 0.001 here"):
        unlearn.main(flags(mini, out="out/b", **more, finetune_lr=1e-3))


@pytest.mark.parametrize("more, sentence", [
    ({"retain_model": "{mini}/target"}, "is the model itself"), ({"overwrite": True, "resume": True}, "give one of them"),
    ({"train_only": "("}, "not a regular expression"), ({"wandb": "x"}, "pip install wandb"), ({"eval_every": -1}, "must not be negative"),
    ({"forget_loss": "task_vector", "lora_rank": 2}, "no --lora_rank"), ({"retain_log": "{mini}/data/full.jsonl"}, "not a log this can read"),
    ({"retain_model": "org/typo", "eval_every": 1}, "org/typo: is not on this machine .*check the id, the network .*hf auth login")])
def test_contradictions_are_met_before_the_run_directory_is_made(mini, tmp_path, more, sentence):
    more = {k: v.format(mini=mini) if isinstance(v, str) else v for k, v in more.items()}
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(flags(mini, out=tmp_path / "run", **more))
    assert not (tmp_path / "run" / "run.json").exists()

"""The loop: pytest tests/test_unlearn.py.

A step is the same for any micro-batch, order and number of processes.
"""
import gc
import json
import math
import weakref

import pytest
import torch
import transformers
from conftest import PROC, flags, log_of, run_script
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

import configs
import data
import evaluate
import losses
import model as models
import unlearn
from configs import Failure, UsageError

LOSSES = ("forget_loss", "retain_loss", "loss", "grad_norm")
REPEATABLE = ("step", "epoch", "lr", *LOSSES)


def run(mini, out, **settings):
    unlearn.main(flags(mini, out=out, **settings))
    return log_of(out)


def columns(rows, names):
    return [[row[name] for name in names] for row in rows]


def weights(out):
    return models.load_model(str(out), PROC).state_dict()


def assert_same_weights(out_a, out_b, tolerance=0.0):
    left, right = weights(out_a), weights(out_b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], atol=tolerance, rtol=0), name


def assert_same_run(a, b, out_a, out_b):
    """Step 1 to 1e-5 relative in losses and gradient, weights to 1e-6 after the run."""
    for key in LOSSES:
        assert a[0][key] == pytest.approx(b[0][key], rel=1e-5), key
    assert_same_weights(out_a, out_b, tolerance=1e-6)


def config(**settings):
    return configs.make(unlearn.Config, settings)


def rows_in(mini, name):
    return data.read_rows(str(mini / "data" / f"{name}.jsonl"))


@pytest.mark.parametrize("method", list(unlearn.FORGET))
def test_a_step_does_not_depend_on_the_micro_batches(mini, tmp_path, method):
    settings = dict(
        forget_loss=method, retain_loss="kl" if method == "simnpo" else "nll", lr=1e-5, beta=0.5,
        steps=10 if method in ("simnpo", "npo", "dpo") else 2)
    a = run(mini, tmp_path / "a", micro_batch_tokens=1, **settings)  # one group per forward
    b = run(mini, tmp_path / "b", micro_batch_tokens=10**6, **settings)  # one forward per kind
    assert_same_run(a, b, tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("method", ["dpo", "rmu"])
def test_two_processes_take_the_same_steps_as_one(mini, tmp_path, method):
    # a batch of 3: the ranks get unequal shares
    settings = dict(forget_loss=method, steps=10, lr=1e-5, batch_size=3, micro_batch_tokens=64)
    a = run(mini, tmp_path / "a", **settings)
    argv = flags(mini, out=tmp_path / "b", **settings)
    done = run_script("unlearn.py", argv, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(a, log_of(tmp_path / "b"), tmp_path / "a", tmp_path / "b")


def test_two_runs_with_one_seed_are_bit_identical_and_scoring_does_not_change_training(
        mini, tmp_path):
    a = run(mini, tmp_path / "a")
    b = run(mini, tmp_path / "b", eval_every=0.4)
    assert columns(a, REPEATABLE) == columns(b, REPEATABLE)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_another_seed_takes_other_examples(mini, tmp_path):
    first = run(mini, tmp_path / "a")[0]
    assert first["loss"] != run(mini, tmp_path / "b", seed=1)[0]["loss"]


# ------------------------------------------------------------------------------------------------
# the same run written by hand


def padded_batch(rows, tokenizer):
    """(ids, labels, attention mask) of a right-padded batch; labels of prompts are -100."""
    ids, labels = [], []
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = tokenizer(f" {row['answer']}").input_ids + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row_ids) for row_ids in ids], True, 0)
    return pad(ids, True, tokenizer.eos_token_id), pad(labels, True, -100), mask


def answer_nll(lm, ids, labels, mask):
    """(sum of -log p, number of tokens) of each answer."""
    logits = lm(input_ids=ids, attention_mask=mask).logits[:, :-1]
    labels = labels[:, 1:]
    nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return nll.view(len(ids), -1).sum(1), (labels != -100).sum(1)


def by_hand(mini, forget_loss, steps, beta, gamma, weight):
    """The run as the paper writes it.

    Padded batches, full logits, a reference model in memory, transformers' scheduler.
    """
    auto = transformers.AutoModelForCausalLM
    lm = auto.from_pretrained(mini / "target", dtype=torch.float32)
    ref = auto.from_pretrained(mini / "target", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    decayed = [p for p in lm.parameters() if p.ndim > 1]
    others = [p for p in lm.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW([
        {"params": decayed, "weight_decay": 0.01},
        {"params": others, "weight_decay": 0.0},
    ], lr=1e-3)
    schedule = transformers.get_linear_schedule_with_warmup(adam, int(0.2 * steps), steps)

    forget, retain = rows_in(mini, "forget05"), rows_in(mini, "retain95")
    logged = []
    for step in range(steps):
        indices = [(4 * step + i) % len(forget) for i in range(4)]
        forget_batch = padded_batch([forget[i] for i in indices], tokenizer)
        retain_batch = padded_batch([retain[i] for i in indices], tokenizer)
        nll, n = answer_nll(lm, *forget_batch)
        if forget_loss == "simnpo":
            forget_part = (-2 / beta * logsigmoid(beta * nll / n - gamma)).mean()
        else:
            with torch.no_grad():
                ref_nll, _ = answer_nll(ref, *forget_batch)
            forget_part = (-2 / beta * logsigmoid(beta * (nll - ref_nll))).mean()
        retain_nll, m = answer_nll(lm, *retain_batch)
        loss = weight * forget_part + retain_nll.sum() / m.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
        logged.append(loss.item())
    return logged


@pytest.mark.parametrize("method, beta, gamma, weight", [
    ("simnpo", 2.5, 0.3, 0.1375),
    ("npo", 0.1, 0.0, 1.0),
])
def test_ten_steps_equal_the_same_run_written_by_hand(mini, tmp_path, method, beta, gamma, weight):
    ours = run(mini, tmp_path / "a", forget_loss=method, beta=beta, gamma=gamma,
               forget_weight=weight, steps=10, shuffle=False, warmup=0.2, schedule="linear")
    theirs = by_hand(mini, method, 10, beta, gamma, weight)
    assert [row["loss"] for row in ours] == pytest.approx(theirs, rel=1e-4)
    # transformers' schedule: the first warm-up step has lr 0
    assert ours[0]["lr"] == 0 and ours[2]["lr"] == 1e-3


# ------------------------------------------------------------------------------------------------
# what a step reads, and what it keeps


@pytest.fixture
def references(monkeypatch):
    """[(groups, {kind: frozen model})]: what each run kept of its model before unlearning."""
    kept = []
    prepare_references = unlearn.prepare_references

    def record(lm, groups, terms, c, proc):
        frozen = prepare_references(lm, groups, terms, c, proc)
        kept.append((groups, frozen))
        return frozen

    monkeypatch.setattr(unlearn, "prepare_references", record)
    return kept


def test_npo_begins_at_two_over_beta_log_two_and_holds_no_second_model(
        mini, tmp_path, monkeypatch, references):
    """The cached reference IS the starting model; and nothing but the target is loaded."""
    loaded = []
    load_model = models.load_model

    def record(name, proc):
        loaded.append(str(name))
        return load_model(name, proc)

    monkeypatch.setattr(models, "load_model", record)
    row = run(mini, tmp_path / "a", forget_loss="npo", beta=0.5, steps=1)[0]
    assert row["forget_loss"] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-5)
    assert loaded == [str(mini / "target")]
    groups, frozen = references[0]
    assert frozen == {}

    target = transformers.AutoModelForCausalLM.from_pretrained(
        mini / "target", dtype=torch.float32)
    for (example,) in groups["forget"]:
        logits = target(torch.tensor([example.ids])).logits[0, example.start - 1:-1]
        labels = torch.tensor(example.ids[example.start:])
        expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        assert torch.allclose(example.ref_logps, expected, atol=1e-5), example
    for (example,) in groups["retain"]:
        assert example.ref_logps is None


def test_a_method_without_a_reference_keeps_none_and_kl_keeps_one_frozen_copy(
        mini, tmp_path, references):
    run(mini, tmp_path / "a", forget_loss="simnpo", steps=1)
    groups, frozen = references[0]
    assert frozen == {}
    for (example,) in groups["forget"] + groups["retain"]:
        assert example.ref_logps is None
    run(mini, tmp_path / "b", forget_loss="simnpo", retain_loss="kl", steps=1)
    groups, frozen = references[1]
    (frozen,) = frozen.values()
    for parameter in frozen.parameters():
        assert not parameter.requires_grad
    for (example,) in groups["forget"] + groups["retain"]:
        assert example.ref_logps is None
    for name, value in weights(mini / "target").items():
        assert torch.equal(frozen.state_dict()[name], value), name
    assert log_of(tmp_path / "b")[0]["retain_loss"] == pytest.approx(0, abs=1e-6)


def head_inputs(lm):
    """A list to which every forward of the output head appends its number of tokens."""
    n_tokens = []

    def record(head, args, output):
        n_tokens.append(args[0].shape[:-1].numel())

    lm.get_output_embeddings().register_forward_hook(record)
    return n_tokens


def test_the_output_head_sees_answer_positions_only_and_gives_the_plain_logits(mini):
    lm = models.load_model(str(mini / "target"), PROC)
    n_tokens = head_inputs(lm)
    examples = [data.Example([5, 6, 7, 8, 9], 3), data.Example([5, 9, 4], 1)]
    scores = models.score(lm, [[example] for example in examples], "cpu")
    assert n_tokens == [4]
    assert scores.labels.tolist() == [8, 9, 9, 4]
    assert scores.lengths == [2, 2] and scores.n_tokens.tolist() == [2, 2]
    for example, logits in zip(examples, scores.logits.split(scores.lengths)):  # alone
        plain = lm(input_ids=torch.tensor([example.ids])).logits[0, example.start - 1:-1]
        assert torch.allclose(logits, plain, atol=1e-5), example


# what a GPU's queue has to be drained for: the host waits for a value or for a shape
WAITING = {
    torch.ops.aten._local_scalar_dense,  # .item(), bool(tensor), float(tensor)
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
    torch.ops.aten.repeat_interleave,
}


class HostSyncs(TorchDispatchMode):
    """The operations in `with HostSyncs() as syncs:` that wait for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in WAITING:
            self.names.append(str(op.overloadpacket))
        if op.overloadpacket is torch.ops.aten.index:
            for index in args[1]:
                if index is not None and index.dtype == torch.bool:
                    self.names.append("index by a mask")
        return op(*args, **(kwargs or {}))


def test_what_waits_for_the_device_is_counted():
    values = torch.tensor([1.0, 0.0])
    with HostSyncs() as syncs:
        assert not (values == 0).all()
        values[values > 0].sum().item()
    assert syncs.names == ["aten._local_scalar_dense", "index by a mask",
                           "aten._local_scalar_dense"]


@pytest.mark.parametrize("method, retain_loss", [
    ("simnpo", "nll"), ("npo", "kl"), ("dpo", "nll"), ("rmu", "rmu")])
@pytest.mark.parametrize("micro_batch_tokens", [1, 4096])  # one example per forward has no mask
def test_a_step_waits_for_the_device_once(
        mini, tmp_path, monkeypatch, method, retain_loss, micro_batch_tokens):
    syncs = HostSyncs()
    starts = []  # how many syncs there were before each step
    micro_batches = data.micro_batches
    tolist = torch.Tensor.tolist  # of a CPU tensor it reaches no dispatcher

    def record_start(*args):
        starts.append(len(syncs.names))
        return micro_batches(*args)

    def record_tolist(tensor):
        syncs.names.append("tolist")
        return tolist(tensor)

    c = config(benchmark="tofu", subset="forget05", template="qa", model=str(mini / "target"),
               forget_loss=method, retain_loss=retain_loss, steering_layer=0, batch_size=3,
               steps=4, micro_batch_tokens=micro_batch_tokens, out=str(tmp_path / "a"))
    lm, tokenizer = evaluate.load(c.model, c, PROC)
    groups = unlearn.encode_groups(c, tokenizer, PROC, forget=rows_in(mini, "forget05"),
                                   retain=rows_in(mini, "retain95"))
    monkeypatch.setattr(data, "micro_batches", record_start)
    monkeypatch.setattr(torch.Tensor, "tolist", record_tolist)
    with syncs:
        unlearn.train(c, PROC, lm, groups)
    for first, last in zip(starts, starts[1:], strict=False):
        assert syncs.names[first:last] == ["tolist"]
    assert len(starts) == 4


@pytest.mark.parametrize("work", ["score", "token_scores", "generate", "train"])
def test_a_model_is_freed_as_soon_as_nobody_names_it(mini, tmp_path, work):
    """No cycle holds it: its memory is there for the next model without a garbage collection."""
    c = config(benchmark="tofu", subset="forget05", template="qa", model=str(mini / "target"),
               forget_loss="npo", retain_loss="kl", batch_size=3, steps=2,
               out=str(tmp_path / "a"))
    lm, tokenizer = evaluate.load(c.model, c, PROC)
    groups = unlearn.encode_groups(c, tokenizer, PROC, forget=rows_in(mini, "forget05"),
                                   retain=rows_in(mini, "retain95"))
    model_alive = weakref.ref(lm)
    weight_alive = weakref.ref(lm.get_input_embeddings().weight)
    gc.collect()
    gc.disable()
    try:
        if work == "score":
            scores = models.score(lm, groups["forget"], "cpu")
            scores.logps.sum().backward()
            del scores
        elif work == "token_scores":
            models.token_scores(lm, groups["forget"], PROC, 1024)
        elif work == "generate":
            models.generate(lm, tokenizer, [[5, 6, 7], [8, 9]], 4, PROC, 1024)
        else:
            unlearn.train(c, PROC, lm, groups)
        del lm
        assert model_alive() is None
        assert weight_alive() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------
# what is trained, and in which precision


def test_bf16_keeps_float32_weights_and_moves_them(mini, tmp_path):
    rows = run(mini, tmp_path / "a", dtype="bf16", steps=3)
    for row in rows:
        assert math.isfinite(row["loss"]), row
    assert {value.dtype for value in weights(tmp_path / "a").values()} == {torch.float32}
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(weights(tmp_path / "a")[name], weights(mini / "target")[name])


def test_bf16_weights_are_trained_and_saved_in_bfloat16(mini, tmp_path):
    rows = run(mini, tmp_path / "a", dtype="bf16_weights", forget_loss="npo", retain_loss="kl",
               steps=3)
    for row in rows:
        assert math.isfinite(row["loss"]), row
    auto = transformers.AutoModelForCausalLM
    trained = auto.from_pretrained(tmp_path / "a", dtype="auto").state_dict()
    start = auto.from_pretrained(mini / "target", dtype=torch.bfloat16).state_dict()
    assert {value.dtype for value in trained.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(trained[name], start[name])


def test_activation_checkpointing_changes_nothing(mini, tmp_path):
    a = run(mini, tmp_path / "a")
    b = run(mini, tmp_path / "b", activation_checkpointing=True)
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], rel=1e-6)


def test_rmu_steers_the_layers_output_at_the_answer_tokens_and_computes_no_logits(
        mini, tmp_path, monkeypatch):
    n_tokens = []
    load_model = models.load_model

    def watched(name, proc):
        lm = load_model(name, proc)
        n_tokens.append(head_inputs(lm))
        return lm

    monkeypatch.setattr(models, "load_model", watched)
    rows = run(mini, tmp_path / "a", forget_loss="rmu", steps=1, shuffle=False, steering_scale=3.0)
    monkeypatch.undo()
    assert set(n_tokens[0]) == {0}

    lm = transformers.AutoModelForCausalLM.from_pretrained(mini / "target", dtype=torch.float32)
    u = torch.rand(32, generator=torch.Generator().manual_seed(0))
    u = 3.0 * u / u.norm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini / "target")
    values = []
    for row in rows_in(mini, "forget05")[:4]:
        example = data.Template("qa", tokenizer).encode(row, 500)
        output = lm(torch.tensor([example.ids]), output_hidden_states=True)
        hidden = output.hidden_states[1][0, example.start:]  # after layer 0
        values.append(((hidden - u) ** 2).mean(-1))
    expected = torch.cat(values).mean().item()
    assert rows[0]["forget_loss"] == pytest.approx(expected, rel=1e-5)
    # the reference is the starting model
    assert rows[0]["retain_loss"] == pytest.approx(0, abs=1e-10)


def test_a_run_that_reads_no_logits_is_scored_all_the_same(mini, tmp_path):
    unlearn.main(flags(mini, out=tmp_path / "a", forget_loss="rmu", eval_every=1))
    for row in log_of(tmp_path / "a", scored=True):
        for name, value in row.items():
            assert math.isfinite(value), name


def test_layers_above_the_steered_one_and_what_train_only_leaves_out_stay_as_they_were(
        mini, tmp_path):
    run(mini, tmp_path / "a", forget_loss="rmu", train_only=r"mlp\.down_proj", weight_decay=0.0)
    before, after = weights(mini / "target"), weights(tmp_path / "a")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    with pytest.raises(UsageError, match="--train_only=none: no parameter's name matches"):
        run(mini, tmp_path / "b", train_only="none")
    argv = [*flags(mini, out=tmp_path / "c", forget_loss="rmu"), "--steering_layer=2"]
    with pytest.raises(UsageError, match="--steering_layer=2: the model has 2 layers"):
        unlearn.main(argv)


def test_a_task_vector_is_subtracted_from_the_target(mini, tmp_path):
    run(mini, tmp_path / "tuned", forget_loss="nll", retain_loss="none")
    unlearn.main(flags(mini, out=tmp_path / "a", forget_loss="task_vector",
                       task_vector_scale=0.5, eval_every=1))
    target, tuned = weights(mini / "target"), weights(tmp_path / "tuned")
    result = weights(tmp_path / "a")
    for name in target:
        expected = target[name] - 0.5 * (tuned[name] - target[name])
        assert torch.allclose(result[name], expected, atol=1e-7), name
    scored = log_of(tmp_path / "a", scored=True)
    assert [row["step"] for row in scored] == [0, 4]
    assert scored[1]["forget_prob"] < scored[0]["forget_prob"]


def test_altpo_is_dpo_against_the_alternates_of_the_file(mini, tmp_path):
    rows = run(mini, tmp_path / "a", forget_loss="altpo", beta=0.3, steps=2)
    assert rows[0]["forget_loss"] == pytest.approx(2 / 0.3 * math.log(2), rel=1e-5)
    assert rows[1]["forget_loss"] < rows[0]["forget_loss"]
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "other", "alternate": "x"}\n')
    argv = [*flags(mini, out=tmp_path / "b", forget_loss="altpo"), f"--alternates={few}"]
    with pytest.raises(UsageError, match="has no alternate answer for the forget question"):
        unlearn.main(argv)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_adapter_moves_nothing_else_does_and_the_saved_model_is_plain(
        mini, tmp_path, monkeypatch, checkpointing):
    trained = []
    finish = unlearn.finish

    def record(run, lm, tokenizer, report=None):
        trained.append(lm)
        finish(run, lm, tokenizer, report)

    monkeypatch.setattr(unlearn, "finish", record)
    run(mini, tmp_path / "a", lora_rank=2, activation_checkpointing=checkpointing)
    adapters = [m for m in trained[0].modules() if hasattr(m, "lora_A")]
    assert len(adapters) == 2 * 7  # q, k, v, o, gate, up, down of two layers; not the head
    for adapter in adapters:
        assert adapter.lora_B.abs().max() > 0 and not adapter.weight.requires_grad
    before, after = weights(mini / "target"), weights(tmp_path / "a")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("proj" not in name), name
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.allclose(plain(ids).logits, trained[0](ids).logits, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# batches and micro-batches


def groups_of(*sizes):
    """Groups of one example with so many tokens, all of them different."""
    groups = []
    for k, n_tokens in enumerate(sizes):
        groups.append([data.Example([100 * k + i for i in range(n_tokens)], 1)])
    return groups


def test_batches_are_whole_cover_every_epoch_and_pair_retain_examples_without_repeats():
    groups = {"forget": groups_of(*[2] * 10), "retain": groups_of(*[3] * 25)}
    batches = data.make_batches(groups, batch_size=4, n_steps=5, seed=3, shuffle=True)
    assert len(batches) == 5
    forget, retain = [], []
    for batch in batches:
        assert len(batch["forget"]) == 4 and len(batch["retain"]) == 4
        forget += [groups["forget"].index(group) for group in batch["forget"]]
        retain += [groups["retain"].index(group) for group in batch["retain"]]
    pairs = list(zip(forget, retain))
    assert pairs == data.pair_indices(10, 25, 20, 3, True)
    for epoch in (pairs[:10], pairs[10:]):
        assert sorted(i for i, _ in epoch) == list(range(10))
        assert len({j for _, j in epoch}) == 10
    assert pairs[:10] != pairs[10:]
    assert data.pair_indices(3, 2, 6, 0, False) == [
        (0, 0), (1, 1), (2, 0), (0, 0), (1, 1), (2, 0)]


def test_a_run_without_retain_examples_has_batches_of_forget_examples_alone():
    groups = {"forget": groups_of(2, 3, 4)}
    batches = data.make_batches(groups, batch_size=2, n_steps=3, seed=0, shuffle=False)
    first, second, third = groups["forget"]
    assert batches == [{"forget": [first, second]}, {"forget": [third, first]},
                       {"forget": [second, third]}]


def test_sizes_are_cut_longest_first_and_what_exceeds_the_budget_is_alone():
    assert data.cut([9, 30, 7, 7, 3], 16) == [[1], [0, 2], [3, 4]]
    assert data.cut([7, 30, 7, 9], 23) == [[1], [3, 0, 2]]  # 9 + 7 + 7 = 23 fit
    assert data.cut([7, 30, 7, 9], 1) == [[1], [3], [0], [2]]
    assert data.cut([], 16) == []
    long = [500, *[100] * 8]
    assert [len(indices) for indices in data.cut(long, 256)] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("one_kind", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 14, 60, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_rank_gets_as_many_micro_batches_and_none_is_lost(world, max_tokens, one_kind):
    batch = {"forget": groups_of(9, 3, 30, 7, 7), "retain": groups_of(12, 5, 5)}
    ranks = []
    for rank in range(world):
        ranks.append(data.micro_batches(batch, max_tokens, rank, world, one_kind))
    assert {len(mine) for mine in ranks} == {len(ranks[0])}
    counted = {"forget": [], "retain": []}
    for mine in ranks:
        for kind, groups, share in mine:
            n_tokens = sum(data.row_tokens(group) for group in groups)
            assert n_tokens <= max_tokens or len(groups) == 1
            if share == 1:
                counted[kind] += groups
            else:  # an idle rank repeats a micro-batch, which counts for nothing
                assert share == 0 and groups[0] in batch[kind]
    for kind, groups in batch.items():
        assert sorted(counted[kind], key=groups.index) == groups
    if one_kind:
        for turn in zip(*ranks):
            assert len({kind for kind, _, _ in turn}) == 1


def test_no_rank_is_idle_where_there_are_groups_for_all():
    def shares(batch, max_tokens, world):
        found = []
        for rank in range(world):
            found += [share for _, _, share in data.micro_batches(batch, max_tokens, rank, world)]
        return found

    # one group per rank rather than four idle ranks
    assert shares({"forget": groups_of(9, 3, 30, 7, 7)}, 1000, 5) == [1] * 5
    eight = groups_of(*[100] * 8)
    assert shares({"forget": eight}, 4096, 8) == [1] * 8
    assert shares({"forget": eight, "retain": eight}, 4096, 8) == [1] * 8
    assert shares({"forget": eight, "retain": eight}, 4096, 1) == [1] * 2
    assert shares({"forget": groups_of(5)}, 4096, 3) == [1, 0, 0]


def test_no_micro_batch_exceeds_the_budget_because_of_a_long_group():
    batch = {"forget": groups_of(500, *[100] * 8)}
    sizes = [len(groups) for _, groups, _ in data.micro_batches(batch, 256)]
    assert sizes == [1, 2, 2, 2, 2]


def test_a_pair_stays_together():
    own, alternate = data.Example([5, 6, 7, 8], 2), data.Example([5, 6, 9], 2)
    alone = data.Example([1, 2, 3], 1)
    batch = {"forget": [[own, alternate], [alone]]}
    assert data.micro_batches(batch, 1) == [
        ("forget", [[own, alternate]], 1.0), ("forget", [[alone]], 1.0)]


def test_no_examples_make_no_micro_batches():
    assert data.micro_batches({"forget": []}, 4096) == []
    assert data.micro_batches({"forget": [], "retain": []}, 4096, rank=1, world=2) == []


def test_no_steps_is_a_usage_error_and_steps_overrides_epochs():
    c = config(epochs=10.0, batch_size=32)
    assert unlearn.n_steps(c, 200) == 62  # the paper's forget05
    assert unlearn.n_steps(config(epochs=10.0, batch_size=32, steps=7), 200) == 7
    with pytest.raises(UsageError, match="0 optimizer steps"):
        unlearn.n_steps(config(epochs=0.5, batch_size=32), 40)


def test_scores_are_due_every_so_many_epochs_at_given_steps_and_at_the_end():
    assert unlearn.steps_due(2.0, (), 12, 1.25) == {3, 5, 8, 10, 12}
    assert unlearn.steps_due(1.0, (2, 7), 12, 1.25) == {2, 7, 12}
    assert unlearn.steps_due(0.0, (), 12, 1.25) == set()
    for every in (1 / 3, 0.01, 1e-320):
        assert unlearn.steps_due(every, (), 12, 3.0) == set(range(1, 13)), every


def test_a_loss_that_is_not_finite_stops_before_the_step_is_applied(mini, tmp_path, monkeypatch):
    def broken(logps, n_tokens, beta, gamma):
        return logps * float("nan")

    monkeypatch.setattr(losses, "simnpo", broken)
    with pytest.raises(Failure, match="step 1: forget loss nan.*forget examples"):
        run(mini, tmp_path / "a")
    assert log_of(tmp_path / "a") == []


def test_a_step_that_is_not_finite_names_its_examples(mini, tmp_path, monkeypatch):
    def broken(logps, n_tokens, beta, gamma):
        return logps * float("inf")

    named = r"forget examples \[0, 1, 2, 3\], retain examples \[0, 1, 2, 3\]. This step was not"
    monkeypatch.setattr(losses, "simnpo", broken)
    with pytest.raises(Failure, match=named):
        run(mini, tmp_path / "a", shuffle=False)


def test_a_forget_example_keeps_one_refusal_for_the_whole_run(mini):
    c = config(forget_loss="dpo", template="qa")
    tokenizer = models.load_tokenizer(str(mini / "target"))
    rows = rows_in(mini, "forget05")
    once = unlearn.encode_groups(c, tokenizer, PROC, forget=rows, retain=[])["forget"]
    again = unlearn.encode_groups(c, tokenizer, PROC, forget=rows, retain=[])["forget"]
    assert once == again
    refusals = {tuple(alternate.ids[alternate.start:]) for _, alternate in once}
    assert len(refusals) > 3


# ------------------------------------------------------------------------------------------------
# a run and its directory


def test_a_finished_run_is_a_model_with_its_settings_scores_log_and_picture(mini, tmp_path):
    out = tmp_path / "run"
    unlearn.main(flags(mini, out=out, eval_every=1, keep_epochs=True))
    settings = json.loads((out / "run.json").read_text())
    assert settings["forget_loss"] == "simnpo" and settings["processes"] == 1
    assert settings["finished"]
    scores = json.loads((out / "scores.json").read_text())
    expected = {"forget_quality", "model_utility", "forget_truth_ratio", "world_facts_rouge"}
    assert expected <= scores.keys()
    scored = log_of(out, scored=True)
    assert [row["step"] for row in scored] == [0, 3, 4]
    last = scored[-1]
    assert scores == {name: last[name] for name in last if name not in ("step", "epoch")}
    assert (out / "trajectory.png").stat().st_size > 5000
    assert (out / "epoch_1" / "model.safetensors").exists()
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
    assert "is finished" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    saved = json.loads((out / "run.json").read_text())
    del saved["deterministic"]
    (out / "run.json").write_text(json.dumps(saved))
    unlearn.main(flags(mini, out=out))  # made before there was this setting: still the very same
    with pytest.raises(UsageError, match="deterministic False there, True here"):
        run(mini, out, deterministic=True)
    with pytest.raises(UsageError, match="lr 0.001 there, 0.002 here"):
        run(mini, out, lr=2e-3)
    run(mini, out, lr=2e-3, overwrite=True)
    with pytest.raises(UsageError, match="is one of the models"):
        run(mini, mini / "target")


def test_a_run_stopped_half_way_goes_on_to_the_same_end(mini, tmp_path, monkeypatch):
    """Two runs, one interrupted after its checkpoint: the same weights and log, bit by bit."""
    settings = dict(forget_loss="npo", retain_loss="kl", steps=6, save_every=1)
    whole = run(mini, tmp_path / "a", **settings)
    clip_grad_norm = torch.nn.utils.clip_grad_norm_
    calls = []

    def interrupt(parameters, largest):
        calls.append(largest)
        if len(calls) == 5:  # in the middle of the fifth step; the checkpoint is of the third
            raise KeyboardInterrupt
        return clip_grad_norm(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(mini, tmp_path / "b", **settings)
    monkeypatch.undo()
    assert len(log_of(tmp_path / "b")) == 4
    assert (tmp_path / "b" / "checkpoint" / "state.pt").exists()
    with pytest.raises(UsageError, match="unfinished; --resume=True"):
        run(mini, tmp_path / "b", **settings)
    resumed = run(mini, tmp_path / "b", resume=True, **settings)
    assert columns(whole, REPEATABLE) == columns(resumed, REPEATABLE)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "checkpoint").exists()


def test_rows_that_cannot_be_scored_are_counted_and_left_out(mini, tmp_path, capsys):
    rows = rows_in(mini, "forget05")
    rows.append({"question": "Why?", "answer": " "})
    rows.append({"question": "long " * 300, "answer": "yes"})
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logged = run(mini, tmp_path / "a", forget_data=own, max_length=60,
                 retain_data=mini / "data" / "retain95.jsonl")
    assert "2 of 14 forget rows left out" in capsys.readouterr().out
    for row in logged:
        assert math.isfinite(row["loss"]), row


def test_your_own_rows_are_unlearned_and_scored_without_a_benchmark(mini, tmp_path):
    out = tmp_path / "own"
    unlearn.main(flags(
        mini, out=out, forget_data=mini / "data" / "world_facts_perturbed.jsonl",
        retain_data=mini / "data" / "retain95.jsonl", retain_model="None", batch_size=2,
        eval_every=1))
    scores = json.loads((out / "scores.json").read_text())
    assert {"forget_prob", "forget_rouge", "retain_prob"} <= scores.keys()
    assert "forget_quality" not in scores


def test_a_base_model_becomes_target_and_retain_model_once(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = dict(
        model="out/target", retain_model="out/retain", base_model=mini / "target",
        finetune_epochs=1, finetune_batch_size=4, finetune_lr=1e-3)
    unlearn.main(flags(mini, out="out/a", **settings))
    target = tmp_path / "out" / "target" / "model.safetensors"
    made = target.stat().st_mtime_ns
    assert "making out/target" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "out" / "retain" / "run.json").read_text())
    assert recipe["forget_loss"] == "nll"
    unlearn.main(flags(mini, out="out/b", **settings))
    assert target.stat().st_mtime_ns == made
    argv = flags(mini, out="out/c", model="outt/target", base_model=mini / "target")
    # a typing error is no wish to train
    with pytest.raises(UsageError, match="outt/target: is not on this machine"):
        unlearn.main(argv)


def test_a_model_made_otherwise_is_not_reused_and_no_method_leaks_into_it(
        mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = dict(model="out/target", retain_model="None", base_model=mini / "target",
                    finetune_epochs=1, finetune_batch_size=4)
    unlearn.main(flags(mini, out="out/a", lora_rank=2, train_only="B", beta=0.7, **settings))
    made = json.loads((tmp_path / "out" / "target" / "run.json").read_text())
    assert made["lora_rank"] == 0 and made["train_only"] is None and made["beta"] == 0.1
    sentence = "--model=out/target: was made otherwise .lr 1e-05 there, 0.001 here"
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(flags(mini, out="out/b", finetune_lr=1e-3, **settings))


@pytest.mark.parametrize("settings, sentence", [
    ({"retain_model": "{mini}/target"}, "is the model itself"),
    ({"overwrite": True, "resume": True}, "give one of them"),
    ({"train_only": "("}, "not a regular expression"),
    ({"wandb": "x"}, "pip install wandb"),
    ({"eval_every": -1}, "must not be negative"),
    ({"forget_loss": "task_vector", "lora_rank": 2}, "no --lora_rank"),
    ({"retain_log": "{mini}/data/full.jsonl"}, "not a log this can read"),
    ({"retain_model": "org/typo", "eval_every": 1},
     "org/typo: is not on this machine .*check the id, the network .*hf auth login"),
])
def test_contradictions_are_met_before_the_run_directory_is_made(
        mini, tmp_path, settings, sentence):
    filled = {}
    for name, value in settings.items():
        filled[name] = value.format(mini=mini) if isinstance(value, str) else value
    with pytest.raises(UsageError, match=sentence):
        unlearn.main(flags(mini, out=tmp_path / "run", **filled))
    assert not (tmp_path / "run" / "run.json").exists()

#!/usr/bin/env bash
# Every method on the demo: the same data, epochs, learning rate and batch, published hyper-parameters, three seeds.
# From the project's root: bash configs/results/demo_methods/run.sh [PYTHON]. About 20 minutes of one CPU core; skips what is done.
set -u
python=${1:-.venv/bin/python}
alternates=out/methods/alternates.jsonl
mkdir -p out/methods
$python - > $alternates <<'P'
import json, data
for row in data.demo().forget:  # AltPO's alternates: the five other values of each answer
    print(json.dumps({"question": row["question"], "alternate": row["perturbed_answer"]}))
P
for seed in 0 1 2; do
  while read -r name flags; do
    $python unlearn.py --seed=$seed --model=out/methods/target$seed --retain_model=out/methods/retain$seed --eval_every=10 \
      --out=out/methods/${name}_s$seed $flags || exit 1
  done <<'M'
simnpo --forget_loss=simnpo --beta=2.5
npo --forget_loss=npo --beta=0.1
npo_kl --forget_loss=npo --beta=0.1 --retain_loss=kl
ga --forget_loss=ga --retain_loss=none
graddiff --forget_loss=ga
idk --forget_loss=idk
dpo --forget_loss=dpo --beta=0.1
altpo --forget_loss=altpo --beta=0.1 --alternates=out/methods/alternates.jsonl
wga --forget_loss=wga --beta=5
satimp --forget_loss=satimp --beta1=5 --beta2=1 --forget_weight=0.1
tnpo --forget_loss=tnpo --beta=4
wtnpo --forget_loss=wtnpo --beta=4 --alpha=1.5
ceu --forget_loss=ceu --retain_loss=none
undial --forget_loss=undial --beta=10 --retain_loss=none
me_gd --forget_loss=max_entropy --forget_weight=0.1
logit_margin --forget_loss=logit_margin
rmu --forget_loss=rmu --retain_loss=rmu --steering_layer=1 --steering_scale=6.5 --retain_weight=1200
task_vector --forget_loss=task_vector --retain_loss=none --task_vector_scale=1
M
done
$python evaluate.py out/methods/*_s[0-9] --out=out/methods/scores

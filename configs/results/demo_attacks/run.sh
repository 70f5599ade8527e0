#!/usr/bin/env bash
# What survives an unlearned model, on the demo: five methods, three seeds, every attack, sampled answers; then SimNPO against NPO from the same start.
# From the project's root: bash configs/results/demo_attacks/run.sh [PYTHON]. About twelve minutes of one CPU core; skips what is done.
set -u
python=${1:-.venv/bin/python}
here=configs/results/demo_attacks
out=out/attacks
export OMP_NUM_THREADS=1
for seed in 0 1 2; do
  while read -r name flags; do
    $python unlearn.py --seed=$seed --model=$out/target_s$seed --retain_model=$out/retain_s$seed --eval_every=10 \
      --out=$out/${name}_s$seed $flags || exit 1
  done <<'M'
simnpo --forget_loss=simnpo --beta=2.5
npo --forget_loss=npo --beta=0.1
graddiff --forget_loss=ga
ga --forget_loss=ga --retain_loss=none
idk --forget_loss=idk
npo_slow --forget_loss=npo --beta=0.1 --forget_weight=0.125 --keep_epochs=True --eval_at=15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
M
done
# NPO where its forget probability is nearest to the one that SimNPO ends with, seed by seed
$python - $out <<'P' || exit 1
import glob, json, os, shutil, sys
out = sys.argv[1]
for seed in range(3):
    goal = json.load(open(f"{out}/simnpo_s{seed}/scores.json"))["forget_prob"]
    rows = [r for r in map(json.loads, open(f"{out}/npo_slow_s{seed}/log.jsonl")) if "loss" not in r and 0 < r["step"] < 50]
    best = min(rows, key=lambda r: abs(r["forget_prob"] - goal))
    path = f"{out}/npo_matched_s{seed}"
    if not os.path.isdir(path):
        shutil.copytree(f"{out}/npo_slow_s{seed}/epoch_{best['epoch']:g}", path)
        run = json.load(open(f"{out}/npo_slow_s{seed}/run.json"))
        del run["sha256"]  # of the weights at the end, not of these
        json.dump(run, open(f"{path}/run.json", "w"))
        json.dump(best, open(f"{path}/scores.json", "w"))
    print(f"seed {seed}: SimNPO ends at {goal:.4f}, NPO is at {best['forget_prob']:.4f} after step {best['step']}")
P
suite=relearn_random,relearn_shortest,relearn_longest,int8,int4,nf4,fp4,paraphrase,audits
[ -f $out/suite/relearn.csv ] || $python relearn.py $out/{simnpo,npo,graddiff,ga,idk}_s[0-2] --attacks=$suite --eval_every=5 \
  --out=$out/suite || exit 1
[ -f $out/matched/relearn.csv ] || $python relearn.py $out/{simnpo,npo_matched}_s[0-2] --attacks=relearn_random,relearn_shortest \
  --seeds=0,1,2 --out=$out/matched || exit 1
# what 64 sampled answers and two other prompts give away: leak@k and the worst case
[ -f $out/samples/relearn.csv ] || $python relearn.py $out/{simnpo,npo,graddiff,ga,idk}_s[0-2] --attacks=sample,worst_case \
  --out=$out/samples || exit 1
for seed in 0 1 2; do  # what the targets, before unlearning, say when asked otherwise, and how well they betray their members
  [ -f $out/targets/target_s$seed/relearn.json ] || $python relearn.py $out/target_s$seed --model=$out/target_s$seed \
    --retain_model=$out/retain_s$seed --attacks=paraphrase,audits --control=False --out=$out/targets/target_s$seed || exit 1
done
$python $here/plot.py $out && cat $out/suite/relearn.md $out/matched/relearn.md

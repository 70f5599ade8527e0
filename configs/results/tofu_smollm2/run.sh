#!/usr/bin/env bash
# The study of configs/results/tofu_smollm2: from the project's root, bash configs/results/tofu_smollm2/run.sh
# Skips what is done; several shells may share the sweep, each with its own METHODS. Then once, without METHODS, for the rest.
#   AUTHORS=20   CPU, about three hours of one core: the last 20 authors of TOFU, forget01 the last two, two rates, one seed
#   AUTHORS=all  one GPU: the whole of TOFU, forget10, three rates, three seeds of the chosen one
set -eu
python=${PYTHON:-.venv/bin/python} base=${BASE:-HuggingFaceTB/SmolLM2-135M-Instruct} tofu=${TOFU:-locuslab/TOFU}
here=$(dirname "$0") methods=${METHODS:-simnpo npo graddiff idk ga dpo}
if [ "${AUTHORS:-20}" = all ]; then
  study=out/tofu; data=$tofu; subset=forget10; rates="2e-5 5e-5 1.5e-4"; seeds="0 1 2"; rows=None; also=
else
  study=out/tofu20; data=out/tofu20; subset=forget01; rates="5e-5 1.5e-4"; seeds="0"; rows=40
  also=out/tofu20_simnpo_1.5e-4_s0  # of all points the nearest to the chosen NPO in forget probability
  TOFU_FROM=$tofu TO=$data $python - <<'P'
import json, os, data
columns, source, to = ("question", "answer"), os.environ["TOFU_FROM"], os.environ["TO"]
os.makedirs(to, exist_ok=True)
read = lambda name: data.read_config(source, name, columns)
last20, perturbed = read("forget10"), read("forget10_perturbed")  # 400 rows, the last 20 authors
for name, rows in {"full": last20, "retain99": last20[:-40], "retain_perturbed": perturbed[:-40], "forget01": last20[-40:],
                   "forget01_perturbed": perturbed[-40:], "holdout01": read("retain90")[-40:],  # two authors no model here has seen
                   "real_authors_perturbed": read("real_authors_perturbed"), "world_facts_perturbed": read("world_facts_perturbed")}.items():
    with open(f"{to}/{name}.jsonl", "w", encoding="utf8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
P
fi
common="--data=$data --subset=$subset --dtype=bf16 --max_new_tokens=96 --eval_rows=$rows --retain_model=${study}_retain"
unlearn() {  # method, rate, seed, [epochs between scores], [name]
  case $1 in
    simnpo) flags="--forget_loss=simnpo --beta=2.5" ;;
    npo) flags="--forget_loss=npo --beta=0.1" ;;
    graddiff) flags="--forget_loss=ga" ;;
    idk) flags="--forget_loss=idk" ;;
    ga) flags="--forget_loss=ga --retain_loss=none" ;;
    dpo) flags="--forget_loss=dpo --beta=0.1" ;;
  esac
  $python unlearn.py configs/tofu_smollm2.py $common --base_model=$base --model=${study}_target $flags --forget_weight=1 \
    --lr=$2 --seed=$3 --epochs=5 --batch_size=8 --warmup=0.2 --schedule=constant --eval_every=${4:-5} --out=${5:-${study}_$1_$2_s$3}
}
for rate in $rates; do
  for method in $methods; do unlearn $method $rate 0; done
done
[ -n "${METHODS:-}" ] && exit
[ -d ${study}_ends ] || $python evaluate.py ${study}_target ${study}_retain $common --out=${study}_ends
chosen=$($python $here/table.py choose $study)  # lines of: method rate
while read -r method rate; do
  for seed in $seeds; do unlearn $method $rate $seed < /dev/null; done
done <<< "$chosen"
names=$(while read -r method rate; do for seed in $seeds; do echo ${study}_${method}_${rate}_s$seed; done; done <<< "$chosen")
# one rate for every attack, so that none is attacked harder; the retain model is attacked alike
[ -f ${study}_attacks/relearn.md ] || $python relearn.py $names $also --attacks=relearn_random,relearn_shortest,int4,audits --lr=5e-5 \
  --fraction=0.2 --epochs=10 --batch_size=4 --eval_at=10,20 --out=${study}_attacks
for method in simnpo npo; do  # two of them once more, scored at each epoch: the same steps, the same weights at the end
  unlearn $method 1.5e-4 0 1 ${study}_trajectory_$method
done
$python $here/table.py collect $study && $python $here/table.py

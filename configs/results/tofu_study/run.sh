#!/usr/bin/env bash
# The study that README.md beside this file describes. From the project's root:
#     bash configs/results/tofu_study/run.sh
# What is done is skipped and a killed run goes on. Several shells may share the work, each with
# METHODS="simnpo npo" of its own. STAGE="sweep seeds" does these stages only; there are
# sweep, seeds, samples, shortest, random, weights and added (README: added after the sweep).
#   SIZE=small  ten authors of TOFU; CPU, about seventeen hours of one core
#   SIZE=all    the whole of TOFU, with SUBSET=forget10 or forget05; one GPU
set -euo pipefail
shopt -s inherit_errexit  # what fails in $(...) ends the script
python=${PYTHON:-.venv/bin/python}
here=$(dirname "$0")
export PYTHONPATH=.
base=${BASE:-HuggingFaceTB/SmolLM2-135M-Instruct}
tofu=${TOFU:-locuslab/TOFU}
methods=${METHODS:-simnpo simnpo_readme npo graddiff idk dpo retain}
rates="1.5e-4 5e-5"

if [ "${SIZE:-small}" = all ]; then
  study=out/study_all data=$tofu subset=${SUBSET:-forget10} epochs=5 dtype=bf16
else
  study=out/study data=out/study_data subset=forget05 epochs=2 dtype=fp32
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  [ -d $data ] || $python $here/study.py data "$tofu" $data
fi
task="--benchmark=tofu --data=$data --subset=$subset --template=qa --max_new_tokens=96"
task="$task --dtype=$dtype"
models="--model=${study}_target --retain_model=${study}_retain"

flags_of() {
  case $1 in
    simnpo) echo --forget_loss=simnpo --beta=2.5 --forget_weight=1 --retain_weight=0.1375 ;;
    simnpo_readme) echo --forget_loss=simnpo --beta=2.5 --forget_weight=0.1375 --retain_weight=1 ;;
    npo) echo --forget_loss=npo --beta=0.1 --forget_weight=1 ;;
    graddiff) echo --forget_loss=ga --forget_weight=1 ;;
    idk) echo --forget_loss=idk --forget_weight=1 ;;
    dpo) echo --forget_loss=dpo --beta=0.1 --forget_weight=1 ;;
  esac
}

unlearn() {  # method, rate, seed
  $python unlearn.py configs/tofu_smollm2.py $task $models --base_model="$base" $(flags_of "$1") \
    --lr="$2" --seed="$3" --epochs=$epochs --batch_size=8 --warmup=0.2 --schedule=constant \
    --eval_every=$epochs --resume=True --out="${study}_$1_$2_s$3"
}

chosen() {  # method: the rate that the rule takes; the sentence that says so is kept
  local choice="${study}_$1.choice" logs=""
  for rate in $rates; do logs="$logs ${study}_$1_${rate}_s0/examples.jsonl"; done
  # --out=out: beside the runs, whose scores of target and retain model are read again
  [ -s "$choice" ] || $python evaluate.py $logs $task $models --select=forget_quality --out=out |
    grep -- "--select=" > "$choice"
  $python $here/study.py rate "$choice" $rates
}

runs_of() {  # method: its chosen runs; the retain model is the control
  local rate
  if [ $1 = retain ]; then
    echo ${study}_retain
  else
    rate=$(chosen $1)
    echo ${study}_$1_${rate}_s[0-9]
  fi
}

attack() {  # run directory, name of the attack, flags
  local out="${study}_attacks/${1##*/}_$2" run=$1
  shift 2
  [ -f "$out/relearn.csv" ] || $python relearn.py "$run" $task --control=False --lr=5e-5 \
    --fraction=0.2 --batch_size=4 --epochs=4 --eval_at=20 --eval_rows=40 --out="$out" "$@"
}

sample() {  # run directory; large batches: memory for speed, the same texts
  attack $1 samples --attacks=sample --samples=16 --micro_batch_tokens=2048
}

relearn_shortest() {  # run directory
  attack $1 shortest --attacks=relearn_shortest
}

for stage in ${STAGE:-sweep seeds samples shortest random weights added}; do
  for method in $methods; do
    case $stage,$method in
      sweep,retain)
        [ -f ${study}_ends/comparison.md ] || $python evaluate.py ${study}_target \
          ${study}_retain $task $models --out=${study}_ends ;;
      sweep,*) for rate in $rates; do unlearn $method "$rate" 0; done ;;
      seeds,retain) ;;
      seeds,*)
        rate=$(chosen $method)
        for seed in 0 1 2; do unlearn $method $rate $seed; done ;;
      samples,*)
        runs=$(runs_of $method)
        for run in $runs; do sample $run; done ;;
      shortest,*)
        runs=$(runs_of $method)
        for run in $runs; do relearn_shortest $run; done ;;
      random,*)
        runs=$(runs_of $method)
        attack ${runs%% *} random --attacks=relearn_random --seeds=0,1,2,3,4 ;;
      weights,*)
        runs=$(runs_of $method)
        attack ${runs%% *} weights --attacks=int4,nf4,audits ;;
      added,simnpo|added,npo)
        for seed in 0 1 2; do
          unlearn $method 1.5e-4 $seed
          sample ${study}_${method}_1.5e-4_s$seed
          relearn_shortest ${study}_${method}_1.5e-4_s$seed
        done ;;
      added,*) ;;
      *) echo "STAGE=$stage: no such stage" >&2; exit 2 ;;
    esac
  done
done
[ -n "${METHODS:-}${STAGE:-}" ] || $python $here/study.py collect $study

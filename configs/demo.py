# The demo: 40 fictitious authors, the last 4 forgotten.
# python unlearn.py
# 2 CPU cores, no network, one minute of CPU time.
# Scores of seeds 0 to 5, epoch by epoch: configs/results/demo/seeds.jsonl, from
#   for s in 0 1 2 3 4 5; do
#     python unlearn.py --seed=$s --model=out/t${s} --retain_model=out/r${s} --out=out/s$s
#   done
benchmark = "demo"
template = "qa"
base_model = "tiny_llama"         # configs/tiny_llama: 0.2 M random parameters
model = "out/demo_target"         # ... fine-tuned on all authors; made on the first run and kept
retain_model = "out/demo_retain"  # ... on the 36 authors that are to be kept
out = "out/demo"

forget_loss = "simnpo"
retain_loss = "nll"
beta = 2.5  # the paper's for TOFU forget05
# Both weights are 1: the paper's 0.1375 on retain belongs to a 7B model.
# configs/results/demo_methods has three ratios.

lr = 7e-4
epochs = 10
batch_size = 8
warmup = 0.1  # one epoch, as in the paper
weight_decay = 0.01
adam_beta2 = 0.98
eval_every = 1
max_length = 64
max_new_tokens = 32

finetune_lr = 5e-3
finetune_epochs = 30
finetune_batch_size = 32
finetune_warmup = 0.05
finetune_schedule = "cosine"

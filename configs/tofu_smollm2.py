# SmolLM2-135M-Instruct on TOFU, from the base model to scores.
# python unlearn.py configs/tofu_smollm2.py
# No gated model, one small GPU or a patient CPU.
# Target (on `full`) and retain model (on retainNN) are made on the first run and kept in out/.
# Values of the method: the better of two rates in configs/results/tofu_smollm2 (last 20 authors
# only, seed 0, CPU): forget probability 0.99 to 0.07 (retain model 0.11), forget quality 0.014 to
# 1.0, retain probability 0.98 to 0.95. On the whole of TOFU they have not been tried.
benchmark = "tofu"
subset = "forget01"
template = "qa"  # its chat template would add 30 tokens to every question

base_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = "out/smollm2_target"
retain_model = "out/smollm2_retain"  # of the subset: give another one with another subset
finetune_lr = 3e-4
finetune_epochs = 5
finetune_batch_size = 8
finetune_warmup = 0.1
finetune_schedule = "linear"

forget_loss = "simnpo"
retain_loss = "nll"
beta = 2.5
forget_weight = 1.0
lr = 1.5e-4
epochs = 5
batch_size = 8
warmup = 0.2
schedule = "constant"
weight_decay = 0.01
dtype = "fp32"  # bf16 on a GPU, or a CPU with bfloat16 instructions; others are far slower with it
eval_every = 5

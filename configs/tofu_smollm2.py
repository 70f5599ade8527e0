# SmolLM2-135M-Instruct on TOFU, from the base model to scores: no gated model, one small GPU or a patient CPU.
# python unlearn.py configs/tofu_smollm2.py
# The target (on `full`) and the retain model (on retainNN) are made on the first run and kept in out/.
# Measured on the last 10 authors only (200 rows, 20 scored a set, 6 epochs, weights from a 4-bit file): target forget ROUGE 0.98, retain model 0.44,
# SimNPO as below 0.80 at unchanged utility. It forgets too little: the values of the method below are a start, not a recommendation.
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
forget_weight = 0.5
lr = 3e-5
epochs = 10
batch_size = 8
warmup = 0.1
schedule = "linear"
weight_decay = 0.01
dtype = "fp32"  # bf16 on a GPU; a CPU without bfloat16 instructions is twenty times slower with it
eval_every = 5

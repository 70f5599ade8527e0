# TOFU forget10 on open-unlearning's Llama-3.2-1B-Instruct models, SimNPO.
# python unlearn.py configs/tofu_1b.py      (one GPU of 40 GB: about 31 GB, by --plan=True)
# forget05: --subset=forget05 --retain_model=open-unlearning/tofu_Llama-3.2-1B-Instruct_retain95
# Not run by us yet: no expected score.
benchmark = "tofu"
subset = "forget10"
# system prompt and date: our defaults are its configs/model/Llama-3.2-1B-Instruct.yaml
template = "chat"
model = "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
# goes with the subset: retain99, retain95, retain90
retain_model = "open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90"

# open-unlearning configs/trainer/SimNPO.yaml: beta 4.5, gamma 0.125, alpha 1, delta 0.
# gamma is its name for the forget weight, alpha for the retain weight.
# The ratio of the two came there from the README of SimNPO's authors.
# Their released runs have the inverse ratio, forget 1 and retain 0.125: configs/tofu_7b.py.
# The SimNPO rows of open-unlearning's paper are at the ratio that stands here.
forget_loss = "simnpo"
retain_loss = "nll"
beta = 4.5
gamma = 0.0
forget_weight = 0.125
retain_weight = 1.0

# open-unlearning configs/experiment/unlearn/tofu/default.yaml and its scripts
lr = 1e-5
epochs = 10
batch_size = 32
warmup = 0.1  # one epoch
schedule = "linear"
weight_decay = 0.01
grad_clip = 0.0  # its DeepSpeed configs name no gradient clipping
dtype = "bf16"
micro_batch_tokens = 4096  # the default, 512, is a CPU's best
max_length = 512
eval_every = 2

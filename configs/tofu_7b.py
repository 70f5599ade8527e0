# TOFU forget05 on the SimNPO paper's Llama-2-7B-chat.
# torchrun --nproc_per_node=8 unlearn.py configs/tofu_7b.py
# Memory, by --plan=True: 19 GB a GPU on eight (weights, gradients and AdamW state are shared), 125 GB on one H200 alone.
# Not run by us: no expected score. The paper reports forget quality 0.99 and utility 0.58 (forget05), 0.45 and 0.62 (forget10).
benchmark = "tofu"
subset = "forget05"
template = "llama2"
model = "OPTML-Group/TOFU-origin-Llama-2-7b-chat"
# The paper's retain models are not public. Give yours with --retain_model=, or a log of one with --retain_log=.

# OPTML-Group/Unlearn-Simple TOFU/README: npo_coeff is the weight of the FORGET term, grad_diff_coeff of retain
forget_loss = "simnpo"
retain_loss = "nll"
beta = 2.5              # forget10: --subset=forget10 --beta=4.5 --forget_weight=0.125
gamma = 0.0
forget_weight = 0.1375
retain_weight = 1.0

# its config/forget.yaml and forget.py
lr = 1e-5
epochs = 10             # 62 steps for forget05
batch_size = 32         # 1 x 4 accumulated x 8 GPUs there
warmup = 0.097          # warm-up there is one epoch of steps, 6 of 62; forget10: 0.097 gives 12 of 125
schedule = "linear"
weight_decay = 0.01
grad_clip = 0.0         # its DeepSpeed config names no gradient clipping
seed = 1001
dtype = "bf16"
parallel = "fsdp"        # on one GPU nothing is shared
activation_checkpointing = True
max_length = 500        # its scores cut at 200, which no TOFU answer reaches
eval_every = 2

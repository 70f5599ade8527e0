# MUSE News, SimNPO as the paper defines it, Llama-2-7b.
# torchrun --nproc_per_node=8 unlearn.py configs/muse_news.py
#
# The published values disagree. Model card, as here: retain weight (lambda) 1, gamma 3.
# Paper, appendix: lambda at most 0.25, gamma at most 2.
# Authors' README: retain weight 0.1, no gamma.
# All of them belong to a loss on raw logits (configs/muse_books_published.py).
# For SimNPO on log-probs, which this file runs, no value and no score is published.
#
# Memory, by --plan=True: 29 GB a GPU on eight, which share weights, gradients and AdamW state;
# on one H200 alone 136 GB, or 124 with --activation_checkpointing=True, a third more time.
# While it loads, one process per node holds 27 GB of CPU memory.
#
# Sustainability, request after request, each from the model before.
# Scalability: scal/forget_$i, always from the target.
#   model=muse-bench/MUSE-News_target
#   for i in 1 2 3 4; do
#     torchrun --nproc_per_node=8 unlearn.py configs/muse_news.py --split=sust/forget_$i \
#       --model=$model --out=out/sust_$i
#     model=out/sust_$i
#   done
#   python evaluate.py out/sust_1 out/sust_2 out/sust_3 out/sust_4 --out=out/sust
# With text of your own: --forget_data=FILE (and --retain_data=FILE) instead of --split.
benchmark = "muse"
subset = "news"
model = "muse-bench/MUSE-News_target"
tokenizer = "meta-llama/Llama-2-7b-hf"  # the authors' (gated; any copy of Llama-2's serves)

forget_loss = "simnpo"
retain_loss = "nll"
beta = 0.7           # model card
gamma = 3.0          # model card: outside beta, as in the paper
forget_weight = 1.0  # model card: loss = SimNPO + lambda * retain loss
retain_weight = 1.0  # model card: lambda

max_length = 2048  # muse_bench, as all below: tokens of a chunk
lr = 1e-5
schedule = "constant"
weight_decay = 0.0
grad_clip = 1.0    # transformers' default
epochs = 10        # the epoch that the authors report
batch_size = 4     # 4 forget and 4 retain chunks: one per GPU on eight; 102 steps per epoch

dtype = "bf16"
parallel = "fsdp"   # on one GPU nothing is shared
micro_batch_tokens = 2048  # one chunk at a time
eval_every = 10

# MUSE Books with the loss that published SimNPO rows were made with, on raw logits: losses.muse_simnpo.
# torchrun --nproc_per_node=8 unlearn.py configs/muse_books_published.py
#
# News: --subset=news --model=muse-bench/MUSE-News_target --beta=0.7.
# NPO's row: --forget_loss=muse_npo --beta=0.1, with --retain_loss=nll or muse_kl; it keeps a second model, 4 GB more a GPU on eight.
# What still differs from the authors' run: float32 master weights where theirs are bfloat16, whole windows of 4 only, retain
# partners drawn anew each epoch where theirs is chunk i mod N, no loss at a chunk's last position, which predicts nothing.
from configs.muse_books import *

forget_loss = "muse_simnpo"
retain_loss = "nll"
beta = 0.75          # the authors' README, as the weights: --beta 0.75 --npo_coeff 1.0 --coeff 0.1
gamma = 0.1          # inside beta; their command's default, for the README gives none (model card: 0)
forget_weight = 1.0
retain_weight = 0.1

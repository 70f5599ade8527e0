# MUSE Books with the loss that published SimNPO rows were made with: losses.muse_simnpo.
# torchrun --nproc_per_node=8 unlearn.py configs/muse_books_published.py
#
# News: --subset=news --model=muse-bench/MUSE-News_target --beta=0.7.
# NPO's rows keep a second model, 2 GB more a GPU on eight:
#   --forget_loss=muse_npo --beta=0.1 --retain_loss=nll --retain_weight=1
#   --forget_loss=muse_npo --beta=0.1 --retain_loss=muse_kl --retain_weight=2048  (a chunk's tokens)
# Memory, by --plan=True: 22 GB a GPU on eight, 67 GB on one.
# What still differs from the authors' run:
#   whole batches of 4 only;
#   retain partners are drawn anew each epoch, theirs is chunk i mod N;
#   no loss at a chunk's last position, which predicts nothing.
from configs.muse_books import *  # noqa: F403

forget_loss = "muse_simnpo"
retain_loss = "nll"
beta = 0.75          # the authors' README, as the weights: --beta 0.75 --npo_coeff 1.0 --coeff 0.1
gamma = 0.1          # inside beta; their command's default (model card: 0)
forget_weight = 1.0
retain_weight = 0.1

# The authors train bfloat16 weights as they are. At lr 1e-5 that leaves 97 % of them unchanged.
# Float32 master weights (--dtype=bf16) go about five times further at the same rate.
dtype = "bf16_weights"

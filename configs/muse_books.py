# MUSE Books, SimNPO as the paper defines it, Llama-2-7b.
# torchrun --nproc_per_node=8 unlearn.py configs/muse_books.py
#
# Memory: as configs/muse_news.py says, 18 GB a GPU on eight, 124 GB on one alone.
from configs.muse_news import *  # what is not said here

subset = "books"
model = "muse-bench/MUSE-Books_target"

beta = 0.7   # model card (the authors' README: 0.75)
gamma = 0.0  # model card
# 139 steps an epoch

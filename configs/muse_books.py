# MUSE Books, SimNPO as the paper defines it. The target was made from ICLM-7B, a Llama, with Llama-2's tokenizer.
# torchrun --nproc_per_node=8 unlearn.py configs/muse_books.py
#
# The published values disagree: the model card has retain weight (lambda) 1 and gamma 0, the paper's appendix lambda of at most
# 0.25, the authors' README a retain weight of 0.1. For this loss, on log-probs, no published value exists: configs/muse_news.py.
#
# Memory: as configs/muse_news.py says, 18 GB a GPU on eight, 124 GB on one alone.
from configs.muse_news import *  # what is not said here

subset = "books"
model = "muse-bench/MUSE-Books_target"

beta = 0.7   # model card (the authors' README: 0.75)
gamma = 0.0  # model card
# 139 steps an epoch

# MUSE Books, SimNPO as the paper defines it.
# torchrun --nproc_per_node=8 unlearn.py configs/muse_books.py
#
# The target was made from ICLM-7B, a Llama, with Llama-2's tokenizer.
# The published values disagree. Model card: retain weight (lambda) 1, gamma 0.
# Paper, appendix: lambda at most 0.25. Authors' README: retain weight 0.1.
# For this loss, on log-probs, no published value exists: configs/muse_news.py.
#
# Memory: as configs/muse_news.py says, 29 GB a GPU on eight, 136 GB on one alone.
from configs.muse_news import *  # noqa: F403  # what is not said here

subset = "books"
model = "muse-bench/MUSE-Books_target"

beta = 0.7   # model card (the authors' README: 0.75)
gamma = 0.0  # model card
# 139 steps an epoch

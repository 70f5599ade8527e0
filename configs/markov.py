# SimNPO's analysis by mixtures of Markov chains (arXiv 2410.07163): what does forgetting cost the
# chain that is kept?
# python unlearn.py configs/markov.py
# One run, no download; minutes on a CPU core, nearly all of them for the target.
# Five seeds, both methods, both subsets, their picture, and a table beside the paper's:
#   for seed in 0 1 2 3 4; do
#     for subset in short unseen; do
#       for method in "npo --beta=1" "simnpo --beta=4"; do
#         python unlearn.py configs/markov.py --seed=$seed --subset=$subset --forget_loss=$method \
#           --model=out/markov_${subset}_target_$seed --retain_model=None \
#           --out=out/markov_${subset}_${method%% *}_$seed
#       done
#     done
#   done
#   python configs/results/markov/plot.py out/markov_{short,unseen}_{npo,simnpo}_?
benchmark = "markov"
# short: forget2 is 5 states long, all else 20; unseen: all 20, the target never saw forget2
subset = "short"
template = "qa"                       # has no effect: rows are plain text
# configs/tiny_gpt2: 0.4 M random parameters, one head, a narrow ReLU MLP, like SimNPO's. Theirs
# normalises after each block instead of before and has no projection after attention.
base_model = "tiny_gpt2"
model = "out/markov_short_target"     # of this subset and seed: name another one for others
retain_model = "out/markov_retain"    # trained on the retain chain only; no score needs it

forget_loss = "simnpo"
retain_loss = "none"
beta = 4.0

lr = 5e-4
steps = 50
batch_size = 4
weight_decay = 0.0
grad_clip = 0.0
eval_at = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50)

finetune_lr = 5e-4
finetune_epochs = 5
finetune_batch_size = 128
finetune_warmup = 0.0
finetune_schedule = "constant"

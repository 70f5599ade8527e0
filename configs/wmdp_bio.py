# WMDP bio on zephyr-7b-beta, SimNPO: text rows in, a model for lm-evaluation-harness out.
# data="--forget_data=bio_remove_dataset.jsonl --retain_data=wikitext.jsonl"
# torchrun --nproc_per_node=8 unlearn.py configs/wmdp_bio.py $data
# lm_eval --model hf --model_args pretrained=out/wmdp_bio,dtype=bfloat16 --tasks wmdp_bio,mmlu
#
# lm_eval 0.4.13 loads the run directory as it is: tried with text rows, a tiny Llama, a local task.
# Both files hold rows with a column text.
# The authors' forget set: bio_remove_dataset.jsonl of cais/wmdp-corpora (gated: ask there).
# Their retain set: the test split of wikitext-2-raw-v1, the lines of more than 50 characters.
# Without the two files the run stops: nothing of WMDP comes with this project.
# Memory, by --plan=True: 13 GB a GPU on eight, 73 GB on one.
# Not run by us: no expected score. Published ones: configs/results/published.md.
benchmark = "tofu"  # the rows are the two files'; this only says how they are scored
template = "qa"     # has no effect: rows are plain text
model = "HuggingFaceH4/zephyr-7b-beta"
out = "out/wmdp_bio"

# The card of the released model: beta 5.5, gamma 0, lambda 5 on retain, lr 4e-6.
# Unlearn-Simple WMDP/configs/unlearn/wmdp/SimNPO.json differs: beta 0.1, retain weight 1,
# lr 9.5e-6, 500 steps.
forget_loss = "simnpo"
retain_loss = "nll_mean"  # micro-batch 1 there: a mean over texts
beta = 5.5
gamma = 0.0
forget_weight = 1.0
retain_weight = 5.0

lr = 4e-6
steps = 125          # the paper's appendix
batch_size = 4       # Unlearn-Simple WMDP/src/model/unlearn.py, as all below: 1 x 4 accumulated
warmup = 0.1
schedule = "linear"
weight_decay = 0.0
grad_clip = 1.0      # transformers' default
max_length = 512     # tokens of a text, the rest is cut off; padding to 512 is trained on too there
dtype = "bf16_weights"  # as theirs
parallel = "fsdp"       # on one GPU nothing is shared
micro_batch_tokens = 2048
eval_every = 0.0     # lm_eval scores; above 0: probabilities of the first eval_rows texts
eval_rows = 20

"""Unlearning losses, one function each: tensors and floats in, unreduced values out; torch only.

n answer tokens in the batch, B answers, V vocabulary entries, D hidden width. The caller gathers
the model's scores at the answer tokens first, so padding and prompts never arrive here, and
minimises the mean over the whole batch (over all GPUs): of n values where a loss has one per token,
of B where it has one per answer.

    logits (n, V), labels (n,), token_logps (n,) = log p(label), logps (B,) = their sums

ref_ marks the scores of the frozen model from before unlearning, computed without gradient.
Everything is computed in float32, or in the input's own precision if that is higher. beta > 0
unless said otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# From logits to log-probabilities


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label), already aligned: logits (..., V), labels (...) -> (...). 0 where the label is
    -100."""
    rows = _float(logits).reshape(-1, logits.shape[-1])
    return -F.cross_entropy(rows, labels.reshape(-1), reduction="none").view(labels.shape)


def answer_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each answer of log p(label), and the counts: logits (B, T, V), labels (B, T) ->
    (B,), (B,).

    logits[:, t] predict labels[:, t + 1]; a label of -100 is not scored. Only scored rows are
    copied.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != -100  # (B, T - 1)
    logps = token_logps(logits[scored], labels[scored])  # (n,)
    logps = logps.new_zeros(scored.shape).masked_scatter(scored, logps)  # (B, T - 1)
    return logps.sum(-1), scored.sum(-1)  # (B,), (B,)


# Usual on the retain set


def nll(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood, -log p: (n,) -> (n,). Plain training, on retain answers or refusals
    (IDK)."""
    return -_float(token_logps)


def kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(ref || model) = sum_v p_ref (log p_ref - log p): (n, V), (n, V) -> (n,).

    Maini et al. 2024 (TOFU), arxiv.org/abs/2401.06121. Departure: TOFU and open-unlearning average
    over all B x T positions. Prompts and padding (TOFU: to T = 500) contribute most of it: no
    factor.
    """
    logps, ref_logps = _float(logits).log_softmax(-1), _float(ref_logits).log_softmax(-1)
    return F.kl_div(logps, ref_logps, reduction="none", log_target=True).sum(-1)  # (n,)


# One value per answer


def npo(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Negative Preference Optimization, Zhang et al. 2024, arxiv.org/abs/2404.05868.

        -(2 / beta) log sigma(-beta (logps - ref_logps)): (B,), (B,) -> (B,)

    beta 0.05 to 0.5, published with 0.1; beta -> 0 is gradient ascent on the sums. Sums, as in the
    original: on 2048-token chunks a tiny change per token saturates the sigmoid.
    """
    return -2 / beta * F.logsigmoid(beta * (_float(ref_logps) - _float(logps)))


def simnpo(logps: Tensor, n_tokens: Tensor, beta: float, gamma: float) -> Tensor:
    """SimNPO, without reference and divided by length, Fan et al. 2024, arxiv.org/abs/2410.07163.

        -(2 / beta) log sigma(-beta logps / n_tokens - gamma): (B,), (B,) -> (B,)

    beta 2.5 to 4.5; gamma >= 0, published on TOFU with 0. gamma is the paper's, outside beta. The
    original code and open-unlearning (which calls it delta) have it inside: gamma_paper = beta *
    gamma_code. The paper's lambda, 0.05 to 0.25 on TOFU, weighs the retain loss. The README of the
    original code and open-unlearning put it on this loss instead.
    """
    return -2 / beta * F.logsigmoid(-beta * _float(logps) / n_tokens - gamma)


def dpo(win_logps: Tensor, ref_win_logps: Tensor, lose_logps: Tensor, ref_lose_logps: Tensor,
        beta: float) -> Tensor:
    """Direct Preference Optimization, Rafailov et al. 2023, arxiv.org/abs/2305.18290.

        -(2 / beta) log sigma(beta ((win_logps - ref_win_logps) - (lose_logps - ref_lose_logps)))

    Four (B,) -> (B,). lose is the answer to forget; win a refusal (TOFU) or an alternate answer
    (AltPO, Mekala et al. 2024, arxiv.org/abs/2409.13474). beta 0.05 to 0.5. Departure: the paper
    and TOFU's code have no 2 / beta; their weight times beta / 2 is ours.
    """
    win = _float(win_logps) - _float(ref_win_logps)
    lose = _float(lose_logps) - _float(ref_lose_logps)
    return -2 / beta * F.logsigmoid(beta * (win - lose))


# One value per token: gradient ascent, plain and with weights that carry no gradient


def ga(token_logps: Tensor) -> Tensor:
    """Gradient ascent, log p: (n,) -> (n,). Jang et al. 2022, arxiv.org/abs/2210.01504.

    With nll on retain it is GradDiff (TOFU).
    """
    return _float(token_logps)


def wga(token_logps: Tensor, beta: float) -> Tensor:
    """Weighted gradient ascent, p^beta log p: (n,) -> (n,). Wang et al. 2025,
    arxiv.org/abs/2502.19301.

    beta >= 0, 5 in the original code and 1 in open-unlearning; 0 is gradient ascent.
    """
    logps = _float(token_logps)
    return (beta * logps.detach()).exp() * logps


def satimp(token_logps: Tensor, beta1: float, beta2: float) -> Tensor:
    """SatImp, p^beta1 (1 - p)^beta2 log p: (n,) -> (n,). Yang et al. 2025,
    arxiv.org/abs/2505.11953.

    beta1 (saturation) and beta2 (importance) >= 0, published with 5 and 1; both 0 is gradient
    ascent.
    """
    logps = _float(token_logps)
    one_minus_p = (-logps.detach().expm1()).clamp(min=0)  # exact where p is near 1
    return (beta1 * logps.detach()).exp() * one_minus_p**beta2 * logps


def tnpo(token_logps: Tensor, ref_token_logps: Tensor, beta: float) -> Tensor:
    """Token-wise NPO, w log p, w = 2 p^beta / (p^beta + p_ref^beta): (n,), (n,) -> (n,).

    Wang et al. 2025, arxiv.org/abs/2502.19301, with beta 4. The gradient is NPO's for each single
    token. Departure: the original adds 1e-5 to the denominator, so w tends to 0 where p and p_ref
    are both far below 1e-5^(1 / beta), 0.06 at beta 4. Here w is 1 at the reference, whatever p.
    """
    logps = _float(token_logps)
    return 2 * torch.sigmoid(beta * (logps - _float(ref_token_logps)).detach()) * logps


def wtnpo(token_logps: Tensor, ref_token_logps: Tensor, beta: float, alpha: float) -> Tensor:
    """Weighted token-wise NPO, w log p, w = 2 p^(beta + alpha) / (p^beta + p_ref^beta): (n,), (n,)
    -> (n,).

    Wang et al. 2025, arxiv.org/abs/2502.19301, with beta 4, alpha 1.5. alpha >= 0; 0 is tnpo. Same
    departure.
    """
    return (alpha * _float(token_logps).detach()).exp() * tnpo(token_logps, ref_token_logps, beta)


# One value per token, from the whole distribution or the hidden state


def ceu(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy unlearning, -sum_v q log p: (n, V), (n,) -> (n,). Yang 2025,
    arxiv.org/abs/2503.01224.

    q is the softmax of the model's own detached logits with the label removed. No hyper-parameter.
    Departure: open-unlearning skips the first token of each answer; here skipping is the caller's.
    """
    logits = _float(logits)
    q = logits.detach().scatter(-1, labels[:, None], float("-inf")).softmax(-1)  # (n, V)
    return F.cross_entropy(logits, q, reduction="none")


def undial(logits: Tensor, ref_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """UNDIAL, distillation with the label's logit lowered, Dong et al. 2024,
    arxiv.org/abs/2402.10052.

        -sum_v q log p, q = softmax(ref_logits - beta onehot(label)): (n, V), (n, V), (n,) -> (n,)

    beta >= 0, published with 10. Departure: open-unlearning averages over prompts and padding too,
    where its label of -100 lowers vocabulary entry V - 100. No constant factor converts one mean
    into the other.
    """
    target, at = _float(ref_logits).detach(), labels[:, None]
    q = target.scatter(-1, at, target.gather(-1, at) - beta).softmax(-1)  # (n, V)
    return F.cross_entropy(_float(logits), q, reduction="none")


def max_entropy(logits: Tensor) -> Tensor:
    """Maximum entropy, KL(uniform || model) = -log V - mean_v log p: (n, V) -> (n,).

    Yuan et al. 2024, arxiv.org/abs/2410.08109, with weight 0.1 beside nll on retain. Departure: the
    original adds 1e-12 to p, so entries far below get no push up, and averages over question and
    padding (to 500) too.
    """
    logits = _float(logits)
    return logits.logsumexp(-1) - logits.mean(-1) - logits.new_full((), logits.shape[-1]).log()


def logit_margin(logits: Tensor) -> Tensor:
    """PDU's forget term, (max_v z - mean_v z)^2 on raw logits z: (n, V) -> (n,).

    Entesari et al. 2025, arxiv.org/abs/2506.05314. Departure: the original masks with unshifted
    labels, so it reads the logits after an answer's last token and misses those that predict its
    first. No factor.
    """
    logits = _float(logits)
    return (logits.max(-1).values - logits.mean(-1)).square()


def rmu(hidden: Tensor, steering: Tensor) -> Tensor:
    """RMU, mean_d (hidden - steering)^2: (n, D), (D,) or (n, D) -> (n,).

    Li et al. 2024 (WMDP), arxiv.org/abs/2403.03218. hidden is one layer's output. On forget,
    steering is c times a fixed random unit vector (zephyr-7b, layer 7: c = 6.5); on retain, the
    reference's hidden states (weight 1200). Departure: open-unlearning averages each answer's n_b
    tokens, then the answers, so a token weighs n / (B n_b) of ours; and it divides sums [B] by
    counts [B, 1], which broadcasts to every sum over every count, right only where answers are
    equally long. Where its pad token is EOS, no token attends to an answer's EOS. Its clip norm
    counts the gradients of frozen parameters too.
    """
    return (_float(hidden) - _float(steering)).square().mean(-1)


# MUSE as published: muse_bench (Shi et al. 2024, arxiv.org/abs/2407.06460) and SimNPO's copy of it
# read raw logits z and no label. There every position of a chunk counts, also the last, which
# predicts nothing.


def muse_npo(logits: Tensor, ref_logits: Tensor, beta: float) -> Tensor:
    """NPO in the MUSE tables, -(2 / beta) mean_v log sigma(beta (z_ref - z)): (n, V), (n, V) ->
    (n,).

    beta 0.1. Lowers all V logits alike, not the answer's. The original's value is the mean over n:
    no factor.
    """
    return -2 / beta * F.logsigmoid(beta * (_float(ref_logits) - _float(logits))).mean(-1)


def muse_simnpo(logits: Tensor, beta: float, gamma: float) -> Tensor:
    """SimNPO in its paper's MUSE tables, -(2 / beta) mean_v log sigma(beta (-z - gamma)): (n, V) ->
    (n,).

    beta 0.7 (News), 0.75 (Books). gamma is inside beta, unlike simnpo's: 3 (News), 0 (Books) on the
    model cards, 0.1 by the code's default. The original's value is the mean over n: no factor.
    """
    return -2 / beta * F.logsigmoid(beta * (-_float(logits) - gamma)).mean(-1)


def muse_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KLR in the MUSE tables, sum_v exp(z_ref) (z_ref - z): (n, V), (n, V) -> (n,).

    Not a divergence: it can be negative, and exp overflows float32 at z_ref > 88. Departure:
    published is the sum over tokens divided by chunks; their weight times the tokens of a chunk
    (2048) is ours.
    """
    return F.kl_div(_float(logits), _float(ref_logits), reduction="none", log_target=True).sum(-1)

"""The losses of CF-CLIP and of the methods before it, as pure functions.

All embeddings are unit vectors. N rows, E the embedding width, T prompt templates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def direction(x: Tensor) -> Tensor:
    """``x / |x|`` over the last dim. A vector that is zero up to rounding stays zero, with zero gradient."""
    size = x.square().sum(-1, keepdim=True)
    known = size > 1e-12
    return torch.where(known, x, 0.0) / torch.where(known, size, 1.0).sqrt()


class Directions(NamedTuple):
    """The directions in CLIP space that CLIP-NCE compares (section 3.3 of the paper); unit vectors."""

    q: Tensor  # query [N, E]: how each augmented edited image differs from its source
    p1: Tensor  # positive 1 [1, E]: target text - source text
    p2: Tensor  # positive 2 [N, E]: target text - source image
    n_k: Tensor | None  # negatives [T, E], or [N, T, E]: source text under template k - source image


QUERIES = ("difference", "image")
"""What q is: ``norm(q_img - s)``, as published, or ``norm(q_img)``, an ablation."""
NEGATIVES = ("first", "per_image", "none")
"""``norm(S_k - s)``, s from the batch's first source (s_0), as published, or each image's own; or none."""
POSITIVES = ("text", "target")
"""Names of p1 and p2."""


def nce_directions(
    edited: Tensor,
    source: Tensor,
    target_text: Tensor,
    source_text: Tensor,
    *,
    negatives: str = "first",
    query: str = "difference",
    negative_templates: int | None = None,
    first: Tensor | None = None,
) -> Directions:
    """The directions that :func:`clip_nce` compares. Raises ValueError.

    Args:
        edited: features of the views of the edited images [N, E], draw-major (view 1 of all images first).
        source: features of the source images [N, E], or [B, E] with N a multiple of B.
        target_text, source_text: features of the target and source prompt under each template [T, E].
        negatives: one of :data:`NEGATIVES`.
        query: one of :data:`QUERIES`.
        negative_templates: how many S_k, from the first on, are negatives (default: all). Positives use all.
        first: s_0 [1, E], if ``source`` is only a part of a batch (default: the first row of ``source``).
    """
    if negative_templates is not None and not 1 <= negative_templates <= len(source_text):
        raise ValueError(
            f"negative_templates must be from 1 to {len(source_text)}, not {negative_templates!r}; "
            'negatives="none" leaves all out'
        )
    for name, value, known in (("query", query, QUERIES), ("negatives", negatives, NEGATIVES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    s, described = per_view(source, edited), source_text[:negative_templates]
    if negatives == "none":
        n_k = None
    elif negatives == "per_image":
        n_k = direction(described[None] - s[:, None])
    else:
        n_k = direction(described - (s[:1] if first is None else first))
    return Directions(
        q=direction(edited - s if query == "difference" else edited),
        p1=direction((target_text - source_text).mean(0, keepdim=True)),
        p2=direction(target_text.mean(0, keepdim=True) - s),
        n_k=n_k,
    )


def info_nce(
    directions: Directions, positives: Sequence[str] = POSITIVES, temperature: float = 0.1
) -> Tensor:
    """``-log( e^{q p / tau} / (e^{q p / tau} + sum_k e^{q n_k / tau}) )``, mean over rows and positives.

    positives: some of "text" (p1) and "target" (p2). Without negatives the loss is ``-q p / tau``: the
    positives of other rows are not negatives either.
    """
    if not positives or set(positives) - set(POSITIVES):
        raise ValueError(f"positives must be some of {', '.join(POSITIVES)}, not {tuple(positives)}")
    q, p1, p2, n_k = directions
    chosen = [{"text": p1, "target": p2}[name] for name in positives]
    if n_k is None:
        return -torch.stack([(q * p).sum(-1).mean() for p in chosen]).mean() / temperature
    pushed = q @ n_k.t() if n_k.ndim == 2 else (q[:, None] * n_k).sum(-1)  # [N, T]
    rows = []
    for p in chosen:
        logits = torch.cat([(q * p).sum(-1, keepdim=True), pushed], 1) / temperature
        rows.append(-F.log_softmax(logits, 1)[:, 0])
    return torch.cat(rows).mean()


def clip_nce(
    edited: Tensor,
    source: Tensor,
    target_text: Tensor,
    source_text: Tensor,
    temperature: float = 0.1,
    *,
    positives: Sequence[str] = POSITIVES,
    **variant,
) -> Tensor:
    """CLIP-NCE (eq. 5-8): pulls the edit towards the target text, pushes it away from the source text.

    The features and ``variant`` are the arguments of :func:`nce_directions`, the others those of
    :func:`info_nce`. Returns a scalar. The loss and its gradients are finite even where an edited image
    equals its source. Raises ValueError.
    """
    directions = nce_directions(edited, source, target_text, source_text, **variant)
    return info_nce(directions, positives, temperature)


def clip_distance(edited: Tensor, text: Tensor) -> Tensor:
    """StyleCLIP's loss (Patashnik et al. 2021): ``1 - mean cos(E_I(x'), E_T(t))``.

    edited: [N, E]; text: the plain target prompt [1, E]. The published ``1 - logit / 100`` is the same
    number.
    """
    return 1 - (edited * text).sum(-1).mean()


def directional(edited: Tensor, source: Tensor, target_text: Tensor, source_text: Tensor) -> Tensor:
    """StyleGAN-NADA's loss (Gal et al. 2021, eq. 3): ``1 - mean cos(dI, dT)``.

    ``dI = q_img - s``, ``dT = mean_k T_k - S_k``; arguments as in :func:`clip_nce`. Where an edited image
    equals its source, the loss is 1 and its gradient that of ``-dI dT / |dT|``. Fine-tuning needs this: it
    starts from the source generator itself, where the cosine has no gradient.
    """
    moved = edited - per_view(source, edited)
    size = moved.square().sum(-1, keepdim=True)
    moved = moved / torch.where(size > 1e-12, size, 1.0).sqrt()
    return 1 - (moved * direction((target_text - source_text).mean(0, keepdim=True))).sum(-1).mean()


def per_view(source: Tensor, edited: Tensor) -> Tensor:
    """Source features [B, E] for each row of ``edited`` [N, E]. ValueError if N is not a multiple of B."""
    if len(edited) % len(source):
        raise ValueError(f"{len(edited)} edited features are not a multiple of {len(source)} source features")
    return source.repeat(len(edited) // len(source), 1)


def latent_l2(w_edited: Tensor, w: Tensor) -> Tensor:
    """``mean (w' - w)^2``."""
    return F.mse_loss(w_edited, w)


def identity_loss(edited: Tensor, source: Tensor) -> Tensor:
    """``1 - mean cos(R(x'), R(x))`` from the unit features [N, D] that the identity network R gives."""
    return 1 - (edited * source).sum(1).mean()


def perceptual_loss(edited: Tensor, source: Tensor, limit: float | None = None) -> Tensor:
    """``mean d`` with ``d = |f(x') - f(x)|`` from features f [B, C, H, W]; a scalar.

    f: VGG19's at conv5_2, as published, or toonfaces' pixels. With a ``limit`` c it is
    ``mean d / (1 + d / c)``, where d is the mean over the channels: a small change costs as much as without a
    limit, and a large change nearly c.
    """
    if limit is None:
        return F.l1_loss(edited, source)
    d = (edited - source).abs().mean(1)
    return (d / (1 + d / limit)).mean()

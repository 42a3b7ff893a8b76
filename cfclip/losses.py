"""The losses of CF-CLIP and of the methods before it, as pure functions. Embeddings are unit vectors; N rows, D wide; T templates."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import RandomPerspective

POSITIVES = ("text", "target")
NEGATIVES = ("first", "per_image", "none")
QUERIES = ("difference", "image")


def direction(x: Tensor) -> Tensor:
    """``x / |x|`` over the last dim; a vector that is zero up to rounding stays zero, with zero gradient."""
    size = x.square().sum(-1, keepdim=True)
    known = size > 1e-12
    return torch.where(known, x, 0.0) / torch.where(known, size, 1.0).sqrt()


def clip_nce(edited: Tensor, source: Tensor, target_text: Tensor, source_text: Tensor, temperature: float = 0.1, *,
             positives: Sequence[str] = POSITIVES, negatives: str = "first", query: str = "difference",
             negative_templates: int | None = None, first: Tensor | None = None) -> Tensor:
    """CLIP-NCE (eq. 5-8 of the paper): pulls the edit's direction to the text's, pushes it from the source description.

    Args:
        edited: features of the augmented edited images [N, D], draw-major (all images of draw 1, then of draw 2, …).
        source: features of the source images [N, D], or [B, D] with N a multiple of B.
        target_text, source_text: features of the target and source prompt under each template [T, D].
        positives: any of "text" (``mean_k T_k - S_k``) and "target" (``mean_k T_k - s``).
        negatives: "first" (``S_k - s_0``, the published one), "per_image" (``S_k - s``), "none" (no S_k, and then each
            positive of the other rows is not a negative either: the loss is ``-q p / tau``).
        query: "difference" (``q_img - s``) or "image" (``q_img``).
        negative_templates: how many S_k are negatives, the first ones of ``source_text`` (default: all T). The positives keep all.
        first: s_0 [1, D], where ``source`` is a part of a batch only (default: its first).

    Returns the mean over rows and positives. Finite, with zero gradient, where an edited image equals its source.
    """
    if len(edited) % len(source):
        raise ValueError(f"{len(edited)} edited features are not a multiple of {len(source)} source features")
    if not positives or set(positives) - set(POSITIVES):
        raise ValueError(f"positives must be some of {POSITIVES}, not {tuple(positives)}")
    if query not in QUERIES:
        raise ValueError(f"query must be 'difference' or 'image', not {query!r}")
    if negative_templates is not None and not 1 <= negative_templates <= len(source_text):
        raise ValueError(f"negative_templates must be from 1 to {len(source_text)}, not {negative_templates!r}; negatives=\"none\" leaves all out")
    s = source.repeat(len(edited) // len(source), 1)
    q = direction(edited - s) if query == "difference" else direction(edited)
    target = target_text.mean(0, keepdim=True)
    p = {"text": direction((target_text - source_text).mean(0, keepdim=True)), "target": direction(target - s)}
    described = source_text[:negative_templates]
    if negatives == "first":
        against = q @ direction(described - (s[:1] if first is None else first)).t()                                      # [N, T]
    elif negatives == "per_image":
        against = (q[:, None] * direction(described[None] - s[:, None])).sum(-1)
    elif negatives == "none":
        return -torch.stack([(q * p[name]).sum(-1).mean() for name in positives]).mean() / temperature
    else:
        raise ValueError(f"negatives must be 'first', 'per_image' or 'none', not {negatives!r}")
    rows = []
    for name in positives:
        logits = torch.cat([(q * p[name]).sum(-1, keepdim=True), against], 1) / temperature
        rows.append(-F.log_softmax(logits, 1)[:, 0])
    return torch.cat(rows).mean()


def clip_distance(edited: Tensor, text: Tensor) -> Tensor:
    """StyleCLIP's loss (Patashnik et al. 2021): ``1 - mean cos(E_I(x'), E_T(t))``.

    edited: [N, D]; text: the plain target prompt [1, D]. The published ``1 - logit / 100`` is the same number.
    """
    return 1 - (edited * text).sum(-1).mean()


def directional(edited: Tensor, source: Tensor, target_text: Tensor, source_text: Tensor) -> Tensor:
    """StyleGAN-NADA's loss (Gal et al. 2021, eq. 3): ``1 - mean cos(dI, dT)``, ``dI = q_img - s``, ``dT = mean_k T_k - S_k``.

    Arguments as of :func:`clip_nce`. Where an edited image equals its source the loss is 1 and its gradient that of
    ``-dI dT / |dT|``: fine-tuning starts from the source generator itself, where the cosine has no gradient.
    """
    if len(edited) % len(source):
        raise ValueError(f"{len(edited)} edited features are not a multiple of {len(source)} source features")
    moved = edited - source.repeat(len(edited) // len(source), 1)
    size = moved.square().sum(-1, keepdim=True)
    moved = moved / torch.where(size > 1e-12, size, 1.0).sqrt()
    return 1 - (moved * direction((target_text - source_text).mean(0, keepdim=True))).sum(-1).mean()


def latent_l2(w_edited: Tensor, w: Tensor) -> Tensor:
    """``mean (w' - w)^2``."""
    return F.mse_loss(w_edited, w)


def identity_loss(facenet: Callable[[Tensor], Tensor], edited_images: Tensor, source_images: Tensor) -> Tensor:
    """``1 - mean cos(R(x'), R(x))``; ``facenet`` maps images [N, 3, H, W] in [-1, 1] to unit features [N, D]."""
    with torch.no_grad():
        source = facenet(source_images)
    return identity_loss_from_features(facenet(edited_images), source)


def identity_loss_from_features(edited: Tensor, source: Tensor) -> Tensor:
    """:func:`identity_loss` from unit features [N, D], for sources that were encoded before."""
    return 1 - (edited * source).sum(1).mean()


def perspective_views(images: Tensor, draws: int = 8, distortion: float = 0.5, then: Callable[[Tensor], Tensor] = lambda view: view) -> Tensor:
    """The published augmentation: ``draws`` random perspectives, each one warp for the whole batch, mid-grey outside.

    [N, 3, H, W] -> [draws * N, 3, H, W], draw-major; the images themselves for ``draws=0``. Consumes torch's random
    numbers exactly as torchvision's ``RandomPerspective(distortion, p=1)`` does. ``then`` is done to every view before they are put
    together: eight of 1024² are better made small one by one.
    """
    if not draws:
        return then(images)
    height, width = images.shape[-2:]
    views = []
    for _ in range(draws):
        torch.rand(1)                                              # torchvision's draw against p
        start, end = RandomPerspective.get_params(width, height, distortion)
        grid = perspective_grid(start, end, height, width, images.device).to(images)
        views.append(then(F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)))
    return torch.cat(views)


def perspective_grid(start: Sequence[Sequence[float]], end: Sequence[Sequence[float]], height: int, width: int,
                     device: str | torch.device = "cpu") -> Tensor:
    """Where a picture is read so that its points ``start`` (four, in pixels) come to lie at ``end``; [1, H, W, 2] as ``F.grid_sample`` has it.

    ``u = (a x + b y + c) / (g x + h y + 1)``, ``v = (d x + e y + f) / (g x + h y + 1)``. torchvision makes it by a matrix product of a row a
    pixel: 14 ms instead of 6 at 1024², eight times a step.
    """
    rows = [row for (x, y), (u, v) in zip(end, start, strict=True)
            for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y])]
    solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(start, dtype=torch.float64).flatten())
    a, b, c, d, e, f, g, h = solved.tolist()
    x, y = torch.arange(width, device=device) + 0.5, torch.arange(height, device=device)[:, None] + 0.5
    below = g * x + (h * y + 1)
    u, v = (a * x + (b * y + c)) / below, (d * x + (e * y + f)) / below
    return torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], -1)[None]

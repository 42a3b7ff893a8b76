"""The frames of a table: reference edits that show how bad and how good a method can be."""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

from cfclip.domain import Claim, Domain, GroundTruth
from cfclip.evaluation.metrics import over_strengths

FRAMES = ("do nothing", "composite", "ceiling")
"""The source; the source with its part recoloured; the generator's closest picture to the true edit."""


@torch.no_grad()
def recolour(truth: GroundTruth, images: Tensor, claim: Claim) -> Tensor:
    """``images`` [N, 3, R, R] with the part recoloured as ``claim`` says, without generator and CLIP.

    ``x' = x + m (c - c_x)``, so shades stay: m is the part's share of each pixel in the ground truth's
    segmentation, c_x the part's mean colour in this picture, c its mean colour in 64 renders that show the
    claim. The means weight pixels by m^2. A picture without the part is unchanged.
    """
    part = truth.parts.index(claim[0])

    def seen(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares m [N, 1, R, R], the sums of m^2 [N, 1, 1, 1] and of m^2 times colour [N, 3, 1, 1]."""
        shares = torch.cat([truth.masks(batch)[:, [part]] for batch in pictures.split(64)])
        pure = shares.square()
        return shares, pure.sum((2, 3), keepdim=True), (pure * pictures).sum((2, 3), keepdim=True)

    _, much, sums = seen(truth.renders(64, claim))
    wanted = sums.sum(0) / much.sum(0)
    shares, much, sums = seen(images)
    return (images + shares * (wanted - sums / much.clamp_min(1e-6)) * (much > 1)).clamp(-1, 1)


def frames(
    domain: Domain, prompts: Iterable[str], seeds: Sequence[int], n: int, ceiling: Sequence[dict] = ()
) -> pd.DataFrame:
    """Rows of the :data:`FRAMES` at strength 1, with columns as in :func:`cfclip.experiments.gather`.

    The first two are measured on the ``n`` test faces of each seed, the same faces that the methods edit. A
    prompt that does not name the colour of a part has no composite. ``ceiling``: rows of the world's ceiling,
    one per prompt, measured on renders; for toonfaces :func:`cfclip.toonfaces.ceiling.ceiling`.
    """
    rows, g = [], domain.generator
    for prompt in prompts:
        claim = domain.truth and domain.truth.claim(prompt)
        editors = {"do nothing": lambda w, strength: g.synthesis(w)}
        if claim:
            editors["composite"] = lambda w, strength, to=claim: recolour(domain.truth, g.synthesis(w), to)
        for method, edit in editors.items():
            for seed in seeds:
                measured = over_strengths(domain, prompt, edit, domain.latents(n, "test", seed), [1.0])
                rows += [{"method": method, "prompt": prompt, "seed": seed} | row for row in measured]
    limits = [{"method": "ceiling", "seed": 0, "index": 0, "strength": 1.0} | row for row in ceiling]
    return pd.DataFrame(rows + limits)

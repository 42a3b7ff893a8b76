"""The losses of the embedded CLIPs' training. N pictures or texts, F facts, see ``captions``."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cfclip.toonfaces.captions import COLOUR_NAMES, FACTS, GROUPS
from cfclip.toonfaces.factors import HELD_OUT, PARTS, colours, to_lab


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor, false: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE in which every true pair of the batch is a positive (UniCL, Yang et al. 2022).

    A pair that is neither ``true`` nor ``false`` is left out; so is a picture or a text with no true pair.

    image, text: unit [N, D]; true, false: bool [N, N]: text m is true of image n; it is surely false.
    """
    logits = (scale * image @ text.t()).masked_fill(~(true | false), -1e4)
    target = true.float()

    def one_way(dim: int) -> Tensor:
        count = target.sum(dim)
        each = -(F.log_softmax(logits, dim) * target).sum(dim) / count.clamp_min(1)
        return each.sum() / (count > 0).sum().clamp_min(1)

    return (one_way(1) + one_way(0)) / 2


def colour_codes() -> Tensor:
    """Unit codes [C, K] of the C colour facts in FACTS: how near each is to the K named colours.

    Nearness is a Gaussian in CIELAB. Similar colours have similar codes, whatever their parts are.
    """
    rgb = [colours(key)[value] for key, value in FACTS if key in PARTS]
    lab = torch.from_numpy(to_lab(np.array(rgb, np.float64))).float()
    names = [value for key, value in FACTS if key in PARTS]
    centres = torch.stack([lab[names.index(name)] for name in COLOUR_NAMES])
    codes = torch.exp(-0.5 * (torch.cdist(lab, centres) / 25).square())
    return codes / codes.norm(dim=1, keepdim=True)


class FactHead(nn.Module):
    """Predicts facts from unit embeddings of images and texts with one linear layer; used in training only.

    A caption names one or two of the eight colours of a face, so the contrastive loss alone learns lips and
    irises very late. Of a group of facts, such as the colours of the lips, at most one is true. The loss is
    the cross-entropy over the groups in which a fact is known to be true, or is claimed. Colours are read by
    their :func:`colour_codes`, so all colours of a part share one set of weights; ``linear`` is used only for
    the other facts.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(embed_dim, len(FACTS))
        codes = colour_codes()  # [C, K] of all colours of all parts
        self.of_colours = nn.Linear(embed_dim, len(PARTS) * codes.shape[1], bias=False)
        self.register_buffer("codes", codes, persistent=False)
        owners = torch.tensor([PARTS.index(key) if key in PARTS else -1 for key, _ in FACTS])
        self.register_buffer("coloured", (owners >= 0).nonzero()[:, 0], persistent=False)
        self.register_buffer("owners", owners[owners >= 0], persistent=False)
        # without the held-out pairs: they never occur, so the head would learn that they are impossible
        groups = [
            torch.tensor([FACTS.index((key, value)) for value in values if (key, value) not in HELD_OUT])
            for key, values in GROUPS.items()
        ]
        padded = pad_sequence(groups, batch_first=True, padding_value=len(FACTS))
        self.register_buffer("groups", padded, persistent=False)  # [13, K]

    def logits(self, embedding: Tensor) -> Tensor:
        """The logit of each fact [N, F]."""
        found = self.of_colours(embedding * 10).unflatten(1, (len(PARTS), -1))  # [N, 8, K]
        named = torch.einsum("nck,ck->nc", found[:, self.owners], self.codes)
        return self.linear(embedding * 10).index_copy(1, self.coloured, named)

    def forward(self, embedding: Tensor, facts: Tensor) -> Tensor:
        """Mean loss over groups. embedding [N, D]; facts: bool [N, F], true and known, or claimed."""
        logits = F.pad(self.logits(embedding), (0, 1), value=-1e4)[:, self.groups]  # [N, 13, K]
        target = F.pad(facts, (0, 1))[:, self.groups].float()
        each = -(logits.log_softmax(2) * target).sum(2)
        count = target.sum((0, 2))
        return (each.sum(0) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


class MentionHead(nn.Module):
    """Predicts which parts and which colours a text mentions, each separately, with one linear layer.

    Parts and colours that are read separately can be read in unseen pairs too: text features compose.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(embed_dim, len(PARTS) + len(COLOUR_NAMES))
        of = {"style": "hair", "beard?": "beard", "glasses?": "glasses"}
        parts = [[of.get(key, key) == part for part in PARTS] for key, _ in FACTS]
        named = [[key in PARTS and value == name for name in COLOUR_NAMES] for key, value in FACTS]
        mentioned = torch.cat([torch.tensor(parts), torch.tensor(named)], 1).float()
        self.register_buffer("mentioned", mentioned, persistent=False)  # [F, 8 + colours]

    def forward(self, text: Tensor, claims: Tensor) -> Tensor:
        """Mean loss of texts, a sum over parts and colours, / 8. text: unit [N, D]; claims: bool [N, F]."""
        target = (claims.float() @ self.mentioned).clamp(max=1)
        logits = self.linear(text * 10)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return each.sum(1).mean() / len(PARTS)

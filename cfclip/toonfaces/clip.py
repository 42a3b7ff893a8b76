"""The embedded CLIP: an ``open_clip`` model of our own configuration that knows the words of our captions."""

from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.toonfaces.captions import vocabulary

CONFIGS = Path(__file__).parent / "clip_configs"


class KnownWords(nn.Module):
    """The embedding of the few tokens that captions hold, and one row for all others.

    In place of open_clip's table, whose 49 408 rows would be most of the file, and noise but for these.
    """

    def __init__(self, tokens: Tensor, width: int):
        super().__init__()
        self.register_buffer("tokens", tokens)  # [V], sorted
        self.weight = nn.Parameter(0.02 * torch.randn(len(tokens) + 1, width))

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> row of ``weight``; V for a token that training never saw."""
        row = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        return torch.where(self.tokens[row] == tokens, row, len(self.tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        row = self.rows(tokens)
        if self.training:  # a word in fifty goes unread, or the last row would stay noise
            row = torch.where(
                (torch.rand(row.shape) < 0.02) & (tokens < self.tokens[-2]), len(self.tokens), row
            )
        return F.embedding(row, self.weight)


def build(name: str = "toonfaces-rn") -> nn.Module:
    """The untrained ``open_clip`` model of ``clip_configs/<name>.json``, reading the words of our captions (:class:`KnownWords`)."""
    if name not in open_clip.list_models():
        open_clip.add_model_config(CONFIGS)
    model = open_clip.CLIP(
        **open_clip.get_model_config(name)
    )  # create_model warns that there are no weights yet
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    known = {token for text in vocabulary() for token in tokenizer.encode(text)}
    ends = {
        0,
        tokenizer.sot_token_id,
        tokenizer.eot_token_id,
    }  # padding, start, end: the two largest ids are the last two
    model.token_embedding = KnownWords(
        torch.tensor(sorted(known | ends)), model.token_embedding.embedding_dim
    )
    return model

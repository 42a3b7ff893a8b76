"""The embedded CLIP: an ``open_clip`` model of our own configuration that knows the words of our captions."""

import re
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.toonfaces.captions import vocabulary

CONFIGS = Path(__file__).parent / "clip_configs"
MODELS = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))


class KnownWords(nn.Module):
    """Token embedding with one row per token of our captions, and one row for all other tokens.

    open_clip's table has 49 408 rows; it would be most of the file, and untrained except for these few rows.
    ``words``: the words of our captions; a similar one can be suggested for an unknown word.
    """

    def __init__(self, tokens: Tensor, width: int, words: Sequence[str] = ()):
        super().__init__()
        self.words = tuple(words)
        self.register_buffer("tokens", tokens)  # [V], sorted
        self.weight = nn.Parameter(0.02 * torch.randn(len(tokens) + 1, width))

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> rows of ``weight`` [...]; V for a token that is not in our captions."""
        row = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        return torch.where(self.tokens[row] == tokens, row, len(self.tokens))

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether all of ``tokens`` occur in our captions."""
        return set(tokens) <= set(self.tokens.tolist())

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(self.rows(tokens), self.weight)


def build(name: str = "toonfaces-rn") -> nn.Module:
    """The untrained ``open_clip`` model of ``clip_configs/<name>.json``, with :class:`KnownWords`."""
    if name not in open_clip.list_models():
        open_clip.add_model_config(CONFIGS)
    # not create_model, which warns that there are no weights yet
    model = open_clip.CLIP(**open_clip.get_model_config(name))
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    words = sorted({word for text in vocabulary() for word in re.findall(r"[a-z]+", text.lower())})
    known = {token for text in vocabulary() for token in tokenizer.encode(text)}
    # padding, start and end; start and end are the two largest ids, so they are the last two known tokens
    known |= {0, tokenizer.sot_token_id, tokenizer.eot_token_id}
    width = model.token_embedding.embedding_dim
    model.token_embedding = KnownWords(torch.tensor(sorted(known)), width, words)
    return model

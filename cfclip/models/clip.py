"""The CLIP guide: an ``open_clip`` model behind differentiable preprocessing and cached text features.

Features are returned *raw* (not normalised) unless said otherwise; D is the embedding width, T = 79 templates.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TEMPLATES = tuple(t for t in OPENAI_IMAGENET_TEMPLATES if t("X") != "a photo of many X.")
"""The paper's 79 prompt templates: OpenAI's 80 without "a photo of many {}."."""


MAX_TEXTS = 16_384
"""Text features that are kept."""


class ClipGuide(nn.Module):
    """A frozen CLIP.

    Args:
        model: an ``open_clip`` CLIP.
        antialias: low-pass when the picture is shrunk to CLIP's input. The published code ran on a torchvision that
            ignored it for tensors; ``False`` reproduces that to the digit.
    """

    def __init__(self, model: nn.Module, antialias: bool = True):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        if isinstance(model.visual, VisionTransformer):
            tokens_first(model.visual)
        size = model.visual.image_size
        self.image_size: int = size[0] if isinstance(size, tuple) else size
        self.context_length: int = model.context_length
        self.antialias = antialias
        self.tokenizer = SimpleTokenizer(context_length=self.context_length)
        self.register_buffer("mean", torch.tensor(OPENAI_DATASET_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_DATASET_STD).reshape(1, 3, 1, 1), persistent=False)
        self._texts: tuple[tuple, dict[str, Tensor]] = ((), {})

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.model.text_projection.shape[1]

    def preprocess(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] -> CLIP's input [N, 3, S, S]: bicubic resize, to [0, 1], mean/std. (Resizing is linear: it may come first.)"""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images,
                (self.image_size, self.image_size),
                mode="bicubic",
                align_corners=False,
                antialias=self.antialias,
            )
        return (images + (1 - 2 * self.mean)) / (2 * self.std)

    def encode_image(self, images: Tensor, preprocessed: bool = False) -> Tensor:
        """[N, 3, H, W] in [-1, 1], or what :meth:`preprocess` makes of them -> raw image features [N, D], differentiable."""
        return self.model.encode_image(images if preprocessed else self.preprocess(images))

    def in_dtype(self, dtype: torch.dtype) -> "ClipGuide":
        """This guide with an image tower made for autocast to ``dtype``: batch norms folded, weights cast once and not at every call.

        Itself where that changes nothing. All but the image tower is shared: move the guide it is made of, not this one.
        """
        if dtype == torch.float32 and not any(
            isinstance(module, nn.BatchNorm2d) for module in self.model.visual.modules()
        ):
            return self
        guide, model = copy.copy(self), copy.copy(self.model)  # shallow: only the image tower is another
        guide._modules, model._modules = self._modules | {"model": model}, dict(self.model._modules)
        model.visual = fold_batch_norms(copy.deepcopy(self.model.visual))
        for module in model.visual.modules():
            if dtype != torch.float32 and isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
                module.to(dtype).to(memory_format=torch.channels_last)
        return guide

    def tokenize(self, text: str) -> Tensor:
        """One text -> tokens [1, context]. ValueError for an empty text or one longer than the context."""
        if not text.strip():
            raise ValueError("the prompt is empty: say what you want to see, e.g. 'green lipstick'")
        count = len(self.tokenizer.encode(text)) + 2
        if count > self.context_length:
            raise ValueError(
                f"the prompt {text!r} has {count} tokens, but this CLIP reads at most {self.context_length} "
                "(start and end included): shorten it"
            )
        return self.tokenizer([text])

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Text(s) -> raw text features [N, D], without gradient. Cached until the text tower changes or moves."""
        known = self._known_texts()
        with torch.no_grad():
            for text in (texts := [texts] if isinstance(texts, str) else texts):
                if text not in known:  # one at a time: a feature does not depend on its neighbours' rounding
                    known[text] = self.model.encode_text(self.tokenize(text).to(self.mean.device))
        return torch.cat([known[text] for text in texts])

    def _known_texts(self) -> dict[str, Tensor]:
        """text -> feature, emptied when a weight of the text tower is another one, was written to, or is elsewhere."""
        tower = (p for name, p in self.model.named_parameters() if not name.startswith("visual."))
        state = tuple((p.data_ptr(), None if p.is_inference() else p._version, p.device) for p in tower)
        if self._texts[0] != state or len(self._texts[1]) > MAX_TEXTS:
            self._texts = (state, {})
        return self._texts[1]

    def template_features(self, prompt: str) -> Tensor:
        """Unit text features of ``prompt`` under the T templates, [T, D]."""
        self.tokenize(prompt)  # the error should quote the prompt, not a template
        return F.normalize(self.encode_text([template(prompt) for template in TEMPLATES]), dim=-1)


def tokens_first(tower: VisionTransformer) -> None:
    """Let its blocks pass [tokens, N, D] on, as OpenAI's do: torch's attention turns [N, tokens, D] into a view of that, whose product with the
    weights then copies these for every token, most of a training step's time and memory."""
    tower.transformer.batch_first = False
    for block in tower.transformer.resblocks:
        block.attn.batch_first = False


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Replace, in place, every frozen batch norm that follows a convolution by that convolution's weights (in order of registration)."""
    for parent in list(module.modules()):
        before = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and before is not None:
                setattr(
                    parent, before, fuse_conv_bn_eval(getattr(parent, before), child).requires_grad_(False)
                )
                setattr(parent, name, nn.Identity())
            before = name if isinstance(child, nn.Conv2d) else None
    return module

"""The CLIP guide: an ``open_clip`` model with differentiable preprocessing and cached text features.

"Learning Transferable Visual Models From Natural Language Supervision", Radford et al. 2021. Features are
*raw* (not normalised) unless stated otherwise. D is the embedding width, T = 79 the number of templates.
"""

import copy
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from itertools import accumulate

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_eval

TEMPLATES = tuple(t for t in OPENAI_IMAGENET_TEMPLATES if t("X") != "a photo of many X.")
"""The paper's 79 prompt templates: OpenAI's 80 without "a photo of many {}."."""

MAX_TEXTS = 16_384
"""The cache of text features is emptied when it holds more texts than this."""
MAX_CHARACTERS = 64
"""Most characters of a text per token of the context, checked before tokenizing; the longest token has 32."""


class ClipGuide(nn.Module):
    """A frozen CLIP.

    Args:
        model: an ``open_clip`` CLIP.
        antialias: low-pass filter images that shrink to CLIP's input. ``False`` reproduces the published
            code, whose torchvision ignored this option for tensors.
    """

    def __init__(self, model: nn.Module, antialias: bool = True):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        if isinstance(model.visual, VisionTransformer):
            tokens_first(model.visual)
            model.visual.conv1 = Patches.of(model.visual.conv1)
        size = model.visual.image_size
        self.image_size: int = size[0] if isinstance(size, tuple) else size
        self.context_length: int = model.context_length
        self.antialias = antialias
        self.tokenizer = SimpleTokenizer(context_length=self.context_length)
        for name, values in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        self._clear_cache()
        self._warned: set[str] = set()  # texts whose unknown words were reported

    @property
    def embed_dim(self) -> int:
        """The embedding width D."""
        return self.model.text_projection.shape[1]

    @property
    def word_dim(self) -> int:
        """The width of a row of :meth:`encode_words`."""
        return 2 * self.model.token_embedding.weight.shape[1]

    def preprocess(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] -> CLIP's input [N, 3, S, S]: resized, mapped to [0, 1], normalised.

        Resizing (bicubic) is linear, so it may come before the mapping to [0, 1].
        """
        if images.shape[-2:] != (size := (self.image_size, self.image_size)):
            how = {"mode": "bicubic", "align_corners": False, "antialias": self.antialias}
            images = F.interpolate(images, size, **how)
        return (images + (1 - 2 * self.mean)) / (2 * self.std)

    def encode_image(self, images: Tensor, preprocessed: bool = False) -> Tensor:
        """Images, or the output of :meth:`preprocess` -> raw features [N, D]. Differentiable."""
        return self.model.encode_image(images if preprocessed else self.preprocess(images))

    def in_dtype(self, dtype: torch.dtype) -> "ClipGuide":
        """A guide for autocast to ``dtype``: its image tower has batch norms folded and weights already cast.

        Returns this guide itself if nothing changes. The new guide shares everything except the image tower:
        to move it to another device, move the original and call this again.
        """
        has_norms = any(isinstance(module, nn.BatchNorm2d) for module in self.model.visual.modules())
        if dtype == torch.float32 and not has_norms:
            return self
        guide, model = copy.copy(self), copy.copy(self.model)  # shallow: only the image tower is replaced
        guide._modules, model._modules = self._modules | {"model": model}, dict(self.model._modules)
        model.visual = fold_batch_norms(copy.deepcopy(self.model.visual))
        for module in model.visual.modules():
            if dtype != torch.float32 and isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
                module.to(dtype).to(memory_format=torch.channels_last)
        return guide

    def tokenize(self, text: str) -> Tensor:
        """One text -> tokens [1, context]. ValueError if it is empty, too long, or not a text."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be a text, e.g. 'green lipstick', not {reprlib.repr(text)}")
        if not text.strip():
            raise ValueError("the prompt is empty: say what you want to see, e.g. 'green lipstick'")
        if len(text) > (most := MAX_CHARACTERS * self.context_length):
            raise ValueError(
                f"the prompt {reprlib.repr(text)} has {len(text)} characters, but this CLIP reads at most "
                f"{most}: shorten it"
            )
        count = len(self.tokenizer.encode(text)) + 2
        if count > self.context_length:
            raise ValueError(
                f"the prompt {text!r} has {count} tokens, but this CLIP reads at most {self.context_length} "
                "(start and end included): shorten it"
            )
        return self.tokenizer([text])

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Text(s) -> raw features [N, D], without gradient. Cached until the text tower changes or moves.

        Warns once for each text that has :meth:`unknown_words`.
        """
        texts = [texts] if isinstance(texts, str) else texts
        features = self._encode(texts)
        self._warn_of_unknown(texts)
        return features

    def _encode(self, texts: Sequence[str]) -> Tensor:
        known = self._known_texts()
        with torch.no_grad():
            for text in texts:
                if text not in known:  # one at a time: rounding in a batch would depend on the other texts
                    known[text] = self.model.encode_text(self.tokenize(text).to(self.mean.device))
        return torch.cat([known[text] for text in texts])

    def template_features(self, prompt: str) -> Tensor:
        """Unit text features of ``prompt`` under the T templates, [T, D]. Warns like :meth:`encode_text`."""
        self.tokenize(prompt)  # the error should quote the prompt, not a template
        self._warn_of_unknown([prompt])  # and so should the warning
        return F.normalize(self._encode([template(prompt) for template in TEMPLATES]), dim=-1)

    @torch.no_grad()
    def encode_words(self, texts: str | Sequence[str]) -> Tensor:
        """Text(s) -> the meaning and the context of each token, [N, tokens of the longest text, word_dim].

        The first half of a row is the token's embedding e_t, or 0 if this CLIP does not know the token. The
        second half is its context c_t = e_(t-1) + c_(t-1) / 2, in which the word just before a noun, such as
        its colour, counts most. Embeddings are divided by the standard deviation of the embedding table.
        Shorter texts are padded with rows of zeros. Warns like :meth:`encode_text`.
        """
        texts = [texts] if isinstance(texts, str) else texts
        self._warn_of_unknown(texts)
        rows, spread = [], self.model.token_embedding.weight.float().std()
        for text in texts:
            tokens = self.tokenize(text)[0]
            tokens = tokens[1 : int(tokens.argmax())]
            known = torch.tensor([[float(self._knows([token]))] for token in tokens.tolist()])
            words = self.model.token_embedding(tokens.to(self.mean.device)).float() / spread
            words = words * known.reshape(-1, 1).to(words)
            before = torch.cat([torch.zeros_like(words[:1]), words[:-1]])
            said = [*accumulate(before, lambda said, word: word + said / 2)]
            rows.append(torch.cat([words, torch.stack(said) if said else words], -1))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def unknown_words(self, text: str) -> list[str]:
        """The words of ``text``, in lower case, that this CLIP cannot distinguish from other unknown words.

        [] if there are none, and always for an open vocabulary such as OpenAI's.
        """
        words = self.tokenizer.pat.findall(self.tokenizer.clean_fn(text))
        return [word for word in dict.fromkeys(words) if not self._knows(self.tokenizer.encode(word))]

    def _knows(self, tokens: Sequence[int]) -> bool:
        knows = getattr(self.model.token_embedding, "knows", None)
        return knows is None or knows(tokens)

    def describe_unknown(self, text: str) -> str:
        """A sentence with the :meth:`unknown_words` of ``text`` and similar known words; "" if none."""
        if not (unknown := self.unknown_words(text)):
            return ""
        known = self.model.token_embedding.words
        near = dict.fromkeys(word for one in unknown for word in get_close_matches(one, known, n=2))
        instead = f" (near words that it knows: {', '.join(near)})" if near else ""
        return (
            f"this CLIP does not know {', '.join(map(repr, unknown))}{instead}: it reads every word that it "
            f"does not know as the same one, so {text!r} will not mean what it says"
        )

    def _warn_of_unknown(self, texts: Sequence[str]) -> None:
        for text in texts:
            if text not in self._warned and (words := self.describe_unknown(text)):
                self._warned.add(text)
                warnings.warn(words, stacklevel=3)

    def _known_texts(self) -> dict[str, Tensor]:
        """The cache, text -> feature.

        It is emptied if it is full, or if a weight of the text tower was replaced, moved, or changed in
        place. A change through ``weight.data`` is not noticed and leaves the cache stale.
        """
        tower = (p for name, p in self.model.named_parameters() if not name.startswith("visual."))
        state = tuple((p.data_ptr(), None if p.is_inference() else p._version, p.device) for p in tower)
        if self._texts[0] != state or len(self._texts[1]) > MAX_TEXTS:
            self._texts = (state, {})
        return self._texts[1]

    def _clear_cache(self) -> None:
        self._texts: tuple[tuple, dict[str, Tensor]] = ((), {})

    def _apply(self, *args, **kwargs) -> "ClipGuide":
        self._clear_cache()  # a converted weight may get the address of a freed one, as in .half().float()
        return super()._apply(*args, **kwargs)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute convolutions and matrix products in ``dtype``; float32 changes nothing.

    In half precision on a CPU, attention is computed with plain matrix products: the backward pass of torch's
    fused attention takes three times as long in bfloat16.
    """
    half = dtype != torch.float32
    attention = sdpa_kernel(SDPBackend.MATH) if half and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype, enabled=half), attention:
        yield


def tokens_first(tower: VisionTransformer) -> None:
    """Make a tower's blocks pass on [tokens, N, D], as OpenAI's do.

    Given [N, tokens, D], torch's attention would make a [tokens, N, D] view of it. Products of this view with
    the weights copy the weights for every token, which takes most of a training step's time and memory.
    """
    tower.transformer.batch_first = False
    for block in tower.transformer.resblocks:
        block.attn.batch_first = False


class Patches(nn.Conv2d):
    """A convolution whose stride is its kernel size, computed as one matrix product.

    torch's convolution takes six times as long, mainly in the backward pass.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> nn.Conv2d:
        """``conv`` as :class:`Patches`; ``conv`` itself if it is not such a convolution."""
        if conv.kernel_size != conv.stride or any(conv.padding) or conv.groups > 1 or max(conv.dilation) > 1:
            return conv
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
        patches = cls(*sizes, bias=conv.bias is not None, device="meta")
        patches.weight, patches.bias = conv.weight, conv.bias
        return patches.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H // k, W // k]."""
        (high, wide), (h, w) = self.kernel_size, x.shape[2:]
        x = x[:, :, : h // high * high, : w // wide * wide]
        x = x.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [N, H // k, W // k, C k k]
        return F.linear(x, self.weight.flatten(1), self.bias).movedim(-1, 1)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold each frozen batch norm into the convolution registered directly before it, in place."""
    for parent in list(module.modules()):
        before = None  # name of the child before, if it is a convolution
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and before is not None:
                folded = fuse_conv_bn_eval(getattr(parent, before), child)
                setattr(parent, before, folded.requires_grad_(False))
                setattr(parent, name, nn.Identity())
            before = name if isinstance(child, nn.Conv2d) else None
    return module

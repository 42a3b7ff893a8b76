"""Pictures that the generator draws from moved codes, and the facts that the readout is sure of in them.

Half of the codes are moved at random. This seldom makes a colour that the generator never saw, so the other
half is moved by an optimiser that paints a part. CF-CLIP's optimiser shows CLIP such pictures, clean or not.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from cfclip.models.stylegan2 import Generator
from cfclip.toonfaces.captions import FACTS
from cfclip.toonfaces.domain import COLOURING
from cfclip.toonfaces.factors import HAIR_STYLES, HELD_OUT, PARTS, colours
from cfclip.toonfaces.readout import VISIBLE, Measurement, Readout
from cfclip.toonfaces.render import MASKS

NEAR, APART = 20.0, 8.0
"""A colour is clear if the nearest name is within NEAR, and the next at least APART farther (CIELAB)."""
FAR = 35.0
"""A name is surely wrong if it is farther than this, and farther than the nearest name by more than NEAR."""


@torch.no_grad()
def random_moves(generator: Generator, n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """W+ codes [n, L, D] at psi = 1, and the same codes, each moved a little or wildly.

    A move goes along noise, equal in all layers or drawn for each layer, or towards another code and beyond.
    It affects all layers, those from COLOURING on, or one layer. ``random`` is on the generator's device.
    """
    device, layers = generator.w_avg.device, generator.num_ws
    draw, normal = (partial(one, generator=random, device=device) for one in (torch.rand, torch.randn))
    w, other = (generator.map_one(normal(n, generator.z_dim))[:, None] for _ in range(2))
    spread = generator.map_one(normal(1000, generator.z_dim)).std(0)
    noise = torch.where(draw(n, 1, 1) < 0.5, normal(n, 1, w.shape[-1]), normal(n, layers, w.shape[-1]))
    scale = 0.1 * 30 ** draw(n, 1, 1)  # 0.1 … 3
    direction = torch.where(draw(n, 1, 1) < 0.5, noise * spread, 0.7 * (other - w))
    layer, kind = torch.arange(layers, device=device)[None, :, None], draw(n, 1, 1)
    one = layer == (layers * draw(n, 1, 1)).long()
    where = torch.where(kind < 0.4, layer >= 0, torch.where(kind < 0.8, layer >= COLOURING, one))
    return w.expand(-1, layers, -1), w + where * scale * direction


AIMED_STEPS, TAKEN = 24, 4
"""Steps of the optimiser of :func:`aimed_moves`, and how many codes are taken from each run."""


@torch.enable_grad()
def aimed_moves(generator: Generator, readout: Readout, n: int, random: torch.Generator) -> Tensor:
    """W+ codes [n, L, D]: samples at psi = 1 on their way to a named colour of one part; TAKEN of each run.

    The colour is one of the part's first 12. Adam minimises the squared distance of the part's pixels from
    the colour, plus a random weight from 0 (free to change) to 4 times that of all other pixels from the
    source. It moves the layers from COLOURING on; in a fifth of the samples it moves all layers.
    """
    device, layers, wanted = generator.w_avg.device, generator.num_ws, n
    n = -(-wanted // TAKEN)
    draw, normal = (partial(one, generator=random, device=device) for one in (torch.rand, torch.randn))
    w = generator.map_one(normal(n, generator.z_dim))[:, None]
    spread = generator.map_one(normal(1000, generator.z_dim)).std(0)
    w = w.expand(-1, layers, -1)
    with torch.no_grad():
        source = generator.synthesis(w).clamp(-1, 1)
        masks = readout(source)[0].softmax(1)
    parts = masks[:, [MASKS.index(part) for part in PARTS]]
    there = parts.sum((2, 3)) > VISIBLE
    part = torch.where(there, draw(n, len(PARTS)), -1.0).argmax(1)
    mask = parts[torch.arange(n, device=device), part][:, None]  # [n, 1, R, R]
    rgb = torch.stack([torch.tensor(list(colours(one).values())[:12]) for one in PARTS]).to(device)
    colour = rgb[part, (draw(n) * 12).long().clamp_max(11)][:, :, None, None] / 127.5 - 1
    keep = 4 * draw(n, 1, 1, 1)
    free = (torch.arange(layers, device=device)[None, :, None] >= COLOURING) | (draw(n, 1, 1) < 0.2)
    moved = torch.zeros_like(w, requires_grad=True)
    optimizer, way = torch.optim.Adam([moved], lr=0.12), []
    for _ in range(AIMED_STEPS):
        images = generator.synthesis(w + free * spread * moved)
        painted = ((images - colour).square() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)
        others = ((images - source).square() * (1 - mask) * keep).mean((1, 2, 3))
        (moved.grad,) = torch.autograd.grad((painted + others).sum(), moved)
        optimizer.step()
        way.append((w + free * spread * moved).detach())
    taken = draw(AIMED_STEPS, n).argsort(0)[:TAKEN]
    return torch.stack(way)[taken, torch.arange(n, device=device)].flatten(0, 1)[:wanted]


def sure_facts(measured: Measurement, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(true, known): the facts that a measurement is sure of, bool [N, len(FACTS)] each.

    Nothing is known about the smile, about man or woman, or about pictures that show no face.

    held_out: whether pairs held out from CLIP may be true; otherwise the colour of that part is unknown.
    """
    true = np.zeros((len(measured.lab), len(FACTS)), bool)
    known = np.zeros_like(true)
    rows = np.arange(len(true))
    for part in PARTS:
        names = list(colours(part))
        columns = np.array([FACTS.index((part, name)) for name in names])
        far = np.stack([measured.distance(part, name) for name in names], 1)
        has, visible = measured.has(part), ~np.isnan(far).any(1)
        far = np.where(visible[:, None], far, np.inf)
        nearest = far.argmin(1)
        least, second = np.sort(far, 1)[:, :2].T
        gap = np.where(visible, second, 0) - np.where(visible, least, 0)
        clear = has & visible & (least <= NEAR) & (gap >= APART)
        surely_not = far > np.maximum(np.where(visible, least, 0) + NEAR, FAR)[:, None]
        known[:, columns] = clear[:, None] | (visible[:, None] & surely_not) | ~has[:, None]
        true[rows[clear], columns[nearest[clear]]] = True
        if not held_out:
            for name in names:
                if (part, name) in HELD_OUT:
                    secret = clear & (nearest == names.index(name))
                    true[np.ix_(secret, columns)] = known[np.ix_(secret, columns)] = False
    for part in ("beard", "glasses"):
        yes, no = (FACTS.index((f"{part}?", answer)) for answer in ("yes", "no"))
        true[:, yes], true[:, no] = measured.has(part), ~measured.has(part)
        known[:, [yes, no]] = True
    styles = np.array([FACTS.index(("style", style)) for style in HAIR_STYLES])
    sure = (measured.hair_style != HAIR_STYLES.index("bald")) == measured.has("hair")
    true[rows[sure], styles[measured.hair_style[sure]]] = True
    known[:, styles] = sure[:, None]
    face = measured.is_face[:, None]
    return true & face, known & face


@torch.no_grad()
def moved_samples(
    generator: Generator, readout: Readout, n: int, seed: int, held_out: bool = False
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """``n`` pictures, uint8 [n, 3, R, R] on the generator's device, and their :func:`sure_facts`.

    The first half comes from :func:`random_moves`, the second from :func:`aimed_moves`.
    """
    batch, random = 256, torch.Generator(generator.w_avg.device).manual_seed(seed)
    codes = list(random_moves(generator, n - n // 2, random)[1].split(batch))
    sizes = [min(batch, n // 2 - k) for k in range(0, n // 2, batch)]
    pictures, facts = [], []
    for w in [*codes, *(aimed_moves(generator, readout, size, random) for size in sizes)]:
        images = generator.synthesis(w).clamp(-1, 1)
        facts.append(sure_facts(readout.measure(images), held_out))
        pictures.append(images.mul(127.5).add(127.5).round().to(torch.uint8))
    true, known = (np.concatenate(one) for one in zip(*facts, strict=True))
    return torch.cat(pictures), true, known

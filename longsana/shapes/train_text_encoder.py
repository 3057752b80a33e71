"""Training of a small Gemma 2 on the captions of the shapes world; afterwards it is frozen.

It learns to know, at the end of a caption, all that the caption promises. The heads that ask for it are thrown away.
What stays tells "a red circle and a blue square" from "a blue circle and a red square".
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longsana.config import TextEncoderConfig
from longsana.encoders.text import GemmaTextEncoder, with_motion
from longsana.shapes.rate import warm_cosine
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import BACKGROUNDS, COLOURS, KINDS, MOTIONS, SIZES, SPEEDS, Promise
from longsana.shapes.snapshot import Snapshot

log = logging.getLogger(__name__)

MOTION_SCORES = (None, 5, 10, 20, 30)
SUMMARY = 4  # tokens at the end of a caption that know it all
NONE = ""
TRAVELS = "travels"
WORDS = tuple((NONE, *words) for words in (SIZES, COLOURS, KINDS, MOTIONS, SPEEDS, (TRAVELS,)))
"""What there is to know of an actor; nothing of a second one where there is one."""


@dataclass(frozen=True)
class TextTrainingConfig:
    """world: whose captions it is trained on and tested with."""

    world: WorldName = "shapes"
    shape: str = "asset/shapes/text_encoder"  # folder with tokenizer and config.json
    seed: int = 0
    steps: int = 1500
    batch: int = 128
    lr: float = 2e-3
    caption_length: int = 48
    caption_channels: int = 64
    test_captions: int = 512  # held-out


def train_text_encoder(config: TextTrainingConfig, folder: Path, device: torch.device) -> float:
    """Train and write a transformers folder; returns the share of held-out captions that it understands in full.

    Raises:
        Stopped: it was asked to stop; what it has is in the folder, and the same call goes on.
    """
    shape = Path(config.shape)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        encoder = GemmaTextEncoder.load(
            TextEncoderConfig(text_encoder_name=f"seeded:{shape}", chi_prompt="none", softcap=True),
            caption_length=config.caption_length,
            caption_channels=config.caption_channels,
            device=device,
            dtype=torch.float32,
        )
        heads = _Heads(config.caption_channels).to(device)
    model: nn.Module = encoder.model.requires_grad_(True)
    weights = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
    networks = {"encoder": model, "heads": heads}
    snapshot = Snapshot(folder, config, networks, optimiser, lambda step: warm_cosine(step, config.steps))
    for step in snapshot.steps(config.steps):
        first = step * config.batch
        captions, promises = _captions(config.world, config.seed + 1, first, config.batch, held_out=False)
        logits = heads(_summary(encoder, captions))
        loss = sum(
            F.cross_entropy(values.flatten(0, 1), answer.to(device).repeat_interleave(SUMMARY))
            for values, answer in zip(logits, _answers(promises), strict=True)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            log.info("text encoder: step %d of %d, loss %.4f", step + 1, config.steps, loss.item())
    understood = _understood(encoder, heads, config)
    log.info("text encoder: understands %.1f %% of held-out captions in full", 100 * understood)
    folder.mkdir(parents=True, exist_ok=True)
    encoder.model.save_pretrained(folder)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shape / name, folder / name)
    snapshot.remove()
    return understood


class _Heads(nn.Module):
    """Hidden states (B, S, C) to logits (B, S, classes): of the background, then of each word for either actor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = (len(BACKGROUNDS), *(len(words) for _ in range(2) for words in WORDS))
        self.heads = nn.ModuleList(nn.Linear(channels, size) for size in sizes)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return [head(hidden) for head in self.heads]


def _captions(
    world: WorldName, seed: int, first: int, count: int, *, held_out: bool
) -> tuple[list[str], list[Promise]]:
    scenes = [WORLDS[world](seed, index, held_out=held_out) for index in range(first, first + count)]
    captions = [
        with_motion(scene.caption, MOTION_SCORES[index % len(MOTION_SCORES)]) for index, scene in enumerate(scenes)
    ]
    return captions, [scene.promise for scene in scenes]


def _summary(encoder: GemmaTextEncoder, captions: Sequence[str]) -> Tensor:
    """Hidden states (B, SUMMARY, C) of each caption's last tokens."""
    tokenised = encoder.tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=encoder.caption_length, return_tensors="pt"
    ).to(encoder.model.device)
    hidden: Tensor = encoder.model(**tokenised, use_cache=False).last_hidden_state
    last = tokenised["attention_mask"].sum(dim=1, keepdim=True)
    where = last - torch.arange(SUMMARY, 0, -1, dtype=torch.int64, device=last.device)
    return hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))


def _answers(promises: Sequence[Promise]) -> list[Tensor]:
    """The right classes (B,) for each head."""
    answers = [[tuple(BACKGROUNDS).index(promise.background) for promise in promises]]
    for number in range(2):
        actors = [promise.actors[number] if number < len(promise.actors) else None for promise in promises]
        said = [
            (actor.size, actor.colour, actor.kind, actor.motion, actor.speed, TRAVELS if actor.travels else NONE)
            if actor
            else (NONE,) * len(WORDS)
            for actor in actors
        ]
        answers += [[words.index(answer[place]) for answer in said] for place, words in enumerate(WORDS)]
    return [torch.tensor(answer, dtype=torch.int64, device="cpu") for answer in answers]


@torch.no_grad()
def _understood(encoder: GemmaTextEncoder, heads: _Heads, config: TextTrainingConfig) -> float:
    captions, promises = _captions(config.world, 0, 0, config.test_captions, held_out=True)
    right = torch.ones(len(captions), dtype=torch.bool, device="cpu")
    for values, answer in zip(heads(_summary(encoder, captions)), _answers(promises), strict=True):
        right &= values[:, -1].argmax(dim=-1).cpu() == answer
    return right.float().mean().item()

"""ODE trajectories for the first stage: what the teacher passes through from noise to video (method.md 7.5).

Every shard is a function of the settings and its prompts alone: any number of processes, stopped at any moment, write
the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longsana.chunks import ChunkPlan
from longsana.data.prompts import Prompt
from longsana.data.shards import DTYPES, Contents, ShardWriter
from longsana.data.trajectories import KIND, SIGMAS
from longsana.encoders.text import instruction_text, negative_text, text_sha256
from longsana.flow.schedule import uniform_sigmas
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.finite import require_finite
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.checks import check_weights, source_digest
from longsana.sampling.engine import CaptionedNetwork, Engine, guided_texts
from longsana.sampling.sampler import trajectory
from longsana.training.config import OdePairsConfig
from longsana.training.pairs import USED, kept_steps, teacher_config
from longsana.weights.build import resolve_dtype


def generate_pairs(config: OdePairsConfig, prompts: Sequence[Prompt], *, world: World, device: torch.device) -> None:
    """Write the trajectories of distinct prompts to `pairs.out`; every process calls this.

    Raises:
        InputError: the folder holds something else, or weights are missing or do not fit.
    """
    maker = _Maker(config, prompts, world, device)
    maker.run()


class _Maker:
    """One process's share of the trajectories."""

    def __init__(self, config: OdePairsConfig, prompts: Sequence[Prompt], world: World, device: torch.device) -> None:
        self.engine = Engine(teacher_config(config), device)
        self.config, self.prompts, self.world, self.device = config, prompts, world, device
        # tqdm's None: no bar where there is no terminal.
        self.no_bar = None if world.is_main else True
        self.keep = kept_steps(config)
        self.grid = uniform_sigmas(config.pairs.shift, config.pairs.num_steps).tolist()
        self.plan: ChunkPlan = self.engine.plan
        height, width = self.engine.geometry.latent_size(config.sampling.height, config.sampling.width)
        self.shape = (self.engine.geometry.channels, height, width)

    def run(self) -> None:
        config = self.config
        digests = self.world.broadcast(self.world.on_main(self._digests) or {})
        channels, height, width = self.shape
        contents = Contents(
            kind=KIND,
            made_by=self._made_by(digests),
            shape=(len(self.keep), channels, self.plan.frames, height, width),
            dtype=config.pairs.dtype,
            count=len(self.prompts),
            shard_size=config.pairs.shard_size,
        )
        writer = ShardWriter(Path(config.pairs.out), contents, self.world, "--out")
        if writer.mine:
            self._write(writer)
        writer.finish()

    def _write(self, writer: ShardWriter) -> None:
        shards = {number: [self.prompts[row] for row in writer.contents.rows(number)] for number in writer.mine}
        prompts = [prompt for shard in shards.values() for prompt in shard]
        captions = self._encode(prompts)
        network = self.engine.load_network()
        size = self.config.sampling.bs
        with tqdm(total=len(prompts), desc="trajectories", unit="clip", disable=self.no_bar) as bar:
            for number, shard in shards.items():
                parts = []
                for batch in (shard[i : i + size] for i in range(0, len(shard), size)):
                    parts.append(self._sample(network, batch, [captions[prompt.text] for prompt in batch]))
                    bar.update(len(batch))
                writer.write(number, torch.cat(parts), [prompt.text for prompt in shard])

    def _encode(self, prompts: Sequence[Prompt]) -> dict[str, Caption]:
        """Captions by text. A method of its own: the encoder is gone when it returns."""
        with caption_encoder(self.engine.config, self.device) as encode:
            return {
                prompt.text: encode(prompt)
                for prompt in tqdm(prompts, desc="captions", unit="prompt", disable=self.no_bar, leave=False)
            }

    def _sample(self, network: CaptionedNetwork, batch: Sequence[Prompt], captions: Sequence[Caption]) -> Tensor:
        """(B, S, C, T, H, W), on the host, in pairs.dtype."""
        try:
            videos = self.engine.videos(batch)
            chunks = trajectory(
                network,
                guided_texts(network, captions, videos),
                self.plan,
                sigmas=self.grid,
                keep=self.keep,
                cfg_scale=self.config.pairs.cfg_scale,
                shape=self.shape,
                rng=videos.noise,
                device=self.device,
            )
            states = torch.cat(list(chunks), dim=3).to(DTYPES[self.config.pairs.dtype]).cpu()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{len(batch)} clips at a time do not fit in memory; lower sampling.bs, or sampling.num_frames, height "
                "and width"
            ) from error
        require_finite(f"line {batch[0].line}", {f"states in {self.config.pairs.dtype}": states})
        return states

    def _digests(self) -> dict[str, str]:
        check_weights(teacher_config(self.config), fetch=True, sections=USED)
        return {section: source_digest(self.config, section) for section in USED}

    def _made_by(self, digests: dict[str, str]) -> dict[str, Any]:
        """List all that decides the states, by the settings' names; where files lie and who makes them is no part."""
        config, pairs, sampling = self.config, self.config.pairs, self.config.sampling
        model, text = dataclasses.asdict(config.model), dataclasses.asdict(config.text_encoder)
        model |= dataclasses.asdict(config.model.architecture())
        model |= {"load_from": digests["model"], "dtype": _name(resolve_dtype(config.model.dtype, self.device))}
        text |= {"text_encoder_name": digests["text_encoder"]}
        text |= {"dtype": _name(resolve_dtype(config.text_encoder.dtype, self.device))}
        text |= {"chi_prompt": text_sha256(instruction_text(config.text_encoder.chi_prompt))}
        made_by: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
        made_by |= {f"text_encoder.{name}": value for name, value in text.items()}
        made_by |= {f"pairs.{name}": getattr(pairs, name) for name in ("num_steps", "shift", "cfg_scale", "causal")}
        names = ["num_frames", "height", "width", "seed", "motion_score", "high_motion", "unified_noise"]
        if pairs.cfg_scale != 1:
            names += ["null_caption"]
            if sampling.null_caption != "learned":
                made_by |= {"sampling.negative_prompt": negative_text(sampling.negative_prompt)}
        made_by |= {f"sampling.{name}": getattr(sampling, name) for name in names}
        texts = json.dumps([prompt.text for prompt in self.prompts])
        return made_by | {
            "chunks": self.plan.lengths,
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "steps": self.keep,
            SIGMAS: [self.grid[step] for step in self.keep],
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

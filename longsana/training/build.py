"""The stage that a config names, with its data and networks: data first, then captions, then what is large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longsana.config import ModelConfig, VAEConfig
from longsana.data.clips import GENERATED, ClipSource, open_clips
from longsana.data.prompts import training_pictures, training_prompts
from longsana.data.trajectories import Trajectories, check_grid, open_trajectories
from longsana.encoders.loading import load_vae
from longsana.encoders.tiny_layouts import FULL
from longsana.encoders.vae import VideoVAE
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding, null_embedding
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.hub import SEEDED, locate
from longsana.training.captions import Captions
from longsana.training.checks import DISTILLING, clip_shape, student_sigmas, switch_prompts
from longsana.training.config import TrainingConfig
from longsana.training.graphs import replay_passes
from longsana.training.learner import Learner, compute_dtype
from longsana.training.lora import base_of, put_on
from longsana.training.parallel import device_mesh, parallelise
from longsana.training.pictures import Pictures
from longsana.training.run_folder import CAPTIONS
from longsana.training.stages.consistency import Consistency
from longsana.training.stages.flow_matching import FlowMatching
from longsana.training.stages.longsana import LongSana
from longsana.training.stages.ode import OdeInitialisation
from longsana.training.stages.self_forcing import SelfForcing
from longsana.training.stages.stage import MicroBatches, Stage
from longsana.weights.build import build_model, empty_model, resolve_dtype
from longsana.weights.files import check_digests
from longsana.weights.what_is import PIPELINE_PART

DROPPED = "flow_matching.dropped_caption=masked_null (null_caption takes what sampling.null_caption names)"


class StageBuilder:
    """Loads what a checked config names. folder: of the run; captions that are encoded ahead go there."""

    def __init__(
        self, config: TrainingConfig, *, micro_batches: MicroBatches, world: World, device: torch.device, folder: Path
    ) -> None:
        self.config, self.micro_batches, self.world, self.device = config, micro_batches, world, device
        self.folder = folder
        channels, _, height, width = clip_shape(config)
        self.latent_shape = (channels, height, width)
        self._bases: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        """Frozen weights by what decides them, which networks share."""

    def stage(self) -> Stage:
        """
        Raises:
            InputError: the data or a checkpoint do not fit.
        """
        self.world.on_main(self.check_checkpoints)  # before captions, which may take hours
        return {
            "flow_matching": self._flow_matching,
            "ode": self._ode,
            "consistency": self._consistency,
            "self_forcing": self._self_forcing,
            "longsana": self._longsana,
        }[self.config.trainer]()

    def check_checkpoints(self) -> None:
        """Compare the checkpoints of runs that networks start from with their digests."""
        for network in self.config.networks.values():
            if not network.load_from.startswith(SEEDED):
                check_digests(locate(network.load_from, "load_from", PIPELINE_PART))

    @cached_property
    def captions(self) -> Captions:
        train = self.config.train
        return Captions(
            self.config,
            self.device,
            self.world,
            train.text_encoder,
            self.folder / CAPTIONS,
            together=train.captions_together,
        )

    @cached_property
    def vae(self) -> VideoVAE:
        """The VAE itself, of which losses and clips are, whoever decodes validation's videos."""
        return self._load(replace(self.config.vae, decoder=FULL, decoder_pretrained=None))

    @cached_property
    def decoder(self) -> VideoVAE:
        """The VAE that decodes validation's videos."""
        return self.vae if self.config.vae.decoder == FULL else self._load(self.config.vae)

    def _load(self, config: VAEConfig) -> VideoVAE:
        return load_vae(config, self.device, resolve_dtype(config.weight_dtype, self.device))

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return device_mesh(self.config.train.sharding_strategy, self.world, self.device)

    def clips(self) -> ClipSource:
        """The clips that flow matching and consistency learn from."""
        config, path = self.config, self.config.data.data_path
        return open_clips(
            path if path.startswith(GENERATED) else str(locate(path, "data.data_path")),
            shape=clip_shape(config),
            seed=config.train.seed,
            count=config.data.num_clips,
            encoder=lambda: self.vae,
            digests=self.world.is_main,
        )

    def trajectories(self) -> Trajectories:
        """The trajectories that ODE initialisation learns from, at the noise levels of the student's steps."""
        path = locate(self.config.data.data_path, "data.data_path")
        trajectories = open_trajectories(path, shape=clip_shape(self.config), digests=self.world.is_main)
        check_grid(trajectories.sigmas, student_sigmas(self.config))
        return trajectories

    def prompts(self) -> Sequence[str]:
        """The prompts of distillation's videos."""
        return training_prompts(self.config.data.data_path, pictures=self.config.train.image_probability > 0)

    def pictures(self) -> Pictures | None:
        """The pictures that distillation's videos may begin with, one for each of `prompts`; None: none begins so."""
        config = self.config
        if not config.train.image_probability:
            return None
        paths = [picture.path for picture in training_pictures(config.data.data_path)]
        return Pictures(paths, self.vae, config.sampling.height, config.sampling.width, config.sampling.image_fit)

    def switch_prompts(self) -> Sequence[str]:
        """The prompts that streams switch to, one for each of `prompts`; none without a switch file."""
        return switch_prompts(self.config)

    def network(self, role: str) -> LongSanaDiT:
        """A network that learns, with weights in float32, or the frozen teacher, in the dtype that it computes in.

        Small steps vanish in bfloat16. Over all processes; or, where there is one GPU and one is enough, into graphs.
        Under a LoRA factors are what learns, and all else is frozen as the teacher is, whole on each process.
        """
        train, settings, trained = self.config.train, self.config.networks[role], role != "teacher"
        lora = train.lora.rank is not None
        compute = compute_dtype(self.config) if trained else resolve_dtype(settings.dtype, self.device)
        blocks = {}
        if trained:
            blocks = {"checkpointing": train.gradient_checkpointing, "compile_blocks": train.compile}
        if lora:
            model = self._with_lora(role, self._frozen(settings, compute))
        else:
            model = build_model(settings, device=self.device, dtype=torch.float32 if trained else compute)
            model.requires_grad_(trained)
        if train.cuda_graphs and self.device.type == "cuda":
            return replay_passes(model, compute, **blocks)
        if lora and not trained:
            return model
        return parallelise(model, self._mesh, compute=compute, strategy=train.sharding_strategy, **blocks)

    def _with_lora(self, role: str, model: LongSanaDiT) -> LongSanaDiT:
        """Put factors on a network that learns; the teacher stays as it is."""
        train = self.config.train
        return model if role == "teacher" else put_on(model, train.lora, train.seed, "lora", role)

    def _frozen(self, settings: ModelConfig, dtype: torch.dtype) -> LongSanaDiT:
        """A network none of whose weights learns; it shares them with those before that have the same."""
        held = self._bases.setdefault(base_of(settings, dtype), {})
        if held:
            model = empty_model(settings).to(dtype).eval()
            model.load_state_dict(held, assign=True)
        else:
            model = build_model(settings, device=self.device, dtype=dtype)
            held.update(model.state_dict(keep_vars=True))
        return model.requires_grad_(False)

    def _flow_matching(self) -> Stage:
        config, frames = self.config, self.config.rollout.num_training_frames
        clips = self.clips()
        self.captions.prepare(clips.prompts())
        generator, flow = self._generator(), config.flow_matching
        masked = flow.class_dropout_prob > 0 and flow.dropped_caption == "masked_null"
        null = self._learned_null(generator.model, DROPPED) if masked else self._null(generator.model)
        return FlowMatching(config, generator, embed=self.captions.embed, null=null, clips=clips, frames=frames)

    def _ode(self) -> Stage:
        config, frames = self.config, self.config.rollout.num_training_frames
        trajectories = self.trajectories()
        self.captions.prepare(trajectories.prompts())
        return OdeInitialisation(
            config, self._generator(), embed=self.captions.embed, trajectories=trajectories, frames=frames
        )

    def _consistency(self) -> Stage:
        clips = self.clips()
        self.captions.prepare(clips.prompts())
        return Consistency(
            self.config,
            self._generator(),
            self._teacher,
            embed=self.captions.embed,
            negative=self._null(self._teacher),
            clips=clips,
            frames=self.config.rollout.num_training_frames,
        )

    def _self_forcing(self) -> Stage:
        prompts = self.prompts()
        self.captions.prepare(prompts)
        return SelfForcing(self.config, *self._networks(), prompts=prompts, **self._distillation_parts())

    def _longsana(self) -> Stage:
        prompts, switch = self.prompts(), self.switch_prompts()
        self.captions.prepare([*prompts, *switch])
        return LongSana(
            self.config,
            *self._networks(),
            prompts=prompts,
            switch_prompts=switch,
            micro_batches=self.micro_batches,
            any_process=lambda here: any(self.world.gather(here)),
            **self._distillation_parts(),
        )

    def _networks(self) -> tuple[Learner, Learner, LongSanaDiT]:
        """Generator, critic and teacher."""
        return self._generator(), self._critic(), self._teacher

    def _distillation_parts(self) -> dict[str, Any]:
        return {
            "embed": self.captions.embed,
            "negative": self._null(self._teacher),
            "vae": self.vae,
            "latent_shape": self.latent_shape,
            "pictures": self.pictures(),
        }

    def _generator(self) -> Learner:
        train, ratio = self.config.train, self.config.distillation.dfake_gen_update_ratio
        return Learner(
            "generator",
            self.network("generator"),
            self.config.optimizer.generator,
            every=ratio if self.config.trainer in DISTILLING else 1,
            ema_weight=train.ema_weight,
            ema_start=train.ema_start_step,
            ema_relative_width=train.ema_relative_width,
        )

    def _critic(self) -> Learner:
        return Learner("critic", self.network("critic"), self.config.optimizer.critic)

    @cached_property
    def _teacher(self) -> LongSanaDiT:
        return self.network("teacher")

    def _null(self, model: LongSanaDiT) -> TextEmbedding:
        """(1, L, C), what guidance moves away from: a caption that `model` was trained with for none."""
        if self.config.sampling.null_caption != "learned":
            return self.captions.negative()
        return self._learned_null(model, "sampling.null_caption=learned")

    def _learned_null(self, model: LongSanaDiT, setting: str) -> TextEmbedding:
        """The checkpoint's own null caption, (1, L, C), which `setting` asks for."""
        try:
            return null_embedding(model, 1)
        except ValueError as error:
            raise InputError(f"{setting}: {error}") from error

"""Weights from one layout to another, a network's or a Wan 2.1 VAE's: the body of `longsana convert` and `export`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from longsana.config import ARCHITECTURES, InferenceConfig, ModelConfig, load_config
from longsana.models.past import LEARNED
from longsana.runtime.errors import InputError
from longsana.runtime.hub import locate
from longsana.weights.build import empty_model
from longsana.weights.checkpoint_folder import PROGRESS, check_content, read_progress
from longsana.weights.files import NETWORKS, networks_in, open_checkpoint
from longsana.weights.names import (
    BASE_CLASS,
    CAUSAL_CLASS,
    DECAY_LOGIT,
    OPTIONAL,
    chosen_past,
    diffusers_config,
    from_diffusers_config,
)
from longsana.weights.network import Layout, read_weights, save_checkpoint
from longsana.weights.what_is import Weights, what_is
from longsana.weights.writing import check_target, write_weights

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # in a checkpoint folder
CLASSES = (BASE_CLASS, CAUSAL_CLASS)
VAE_CLASS = "AutoencoderKLWan"
VAE_LAYOUTS = ("upstream", "diffusers")
MODEL_CARD = """\
# {title}

{what}, {layout} layout: {count:,} parameters, {dtypes}.

Converted from `{source}` by `longsana convert`: every tensor that this layout has a place for, as it was.
Licence and use are those of the source.
"""


@dataclass(frozen=True)
class Conversion:
    """Weights that are to be written in a layout.

    source, option: what the user calls where they come from, and where they go to. path: where they are.
    out, layout: where they go to, and as what; out is a folder for diffusers, else a file.
    key: the network of a training checkpoint; None means the generator, and all that a run has for the layout trainer.
    dtype: what tensors become; None keeps each tensor's own.
    config: YAML of the network, if it is not the published one at 480p.
    causal: to diffusers, a network that samples chunk by chunk.
    force: replace what is there. card: write a model card beside the weights.
    """

    source: str
    path: Path
    out: Path
    layout: Layout
    option: str
    key: str | None = None
    dtype: torch.dtype | None = None
    config: str | None = None
    causal: bool = False
    force: bool = False
    card: bool = False

    def check(self) -> None:
        """Refuse what cannot be converted, or has no place to go to; nothing is written, and no tensor is read.

        Raises:
            InputError: what is wrong.
        """
        found = what_is(self.path)
        if self._is_vae(found):
            self._check_vae()
        else:
            self._check_network(found)
        check_target(self.out, self.layout, self.option, force=self.force, card=self.card)
        source, out = found.file.resolve(), self.out.resolve()
        inside = found.kind == "checkpoint" and source in out.parents
        if out in (self.path.resolve(), source, source.parent) or inside:
            raise InputError(f"{self.option} {self.out}: is {self.source}, or where it lies")
        if self.layout == "trainer" and found.kind != "checkpoint":
            log.warning("a trainer's file with one network, the %s; a run's checkpoint has the others too", self._first)

    def _check_vae(self) -> None:
        if self.layout not in VAE_LAYOUTS:
            raise InputError(f"--to {self.layout}: this is a VAE, for which there are {' and '.join(VAE_LAYOUTS)}")
        given = {"--config": self.config, "--key": self.key, "--causal": self.causal, "--dtype": self.dtype}
        if ignored := [option for option, value in given.items() if value]:
            raise InputError(f"{ignored[0]}: has no meaning for a VAE, as {self.source} is; leave it out")

    def _check_network(self, found: Weights) -> None:
        if self.causal and self.layout != "diffusers":
            raise InputError(f"--causal: only the layout diffusers says how a network samples, not {self.layout}")
        if self.key not in (None, NETWORKS[0]) and found.kind in ("safetensors", "shards"):
            raise InputError(f"--key {self.key}: {self.source} holds one network; leave it out")
        if found.kind == "checkpoint":
            _step(found.file)
        # Without --config a run's checkpoint is first compared with its digest.
        if found.headers_tell and (self.config or found.kind != "checkpoint"):
            self._config(found, self._first)

    def run(self) -> None:
        """Write the weights, whole or not at all.

        Raises:
            InputError: they cannot be read, or do not fit the network.
            OSError: the disk is full or broken.
        """
        found = what_is(self.path)
        if self._is_vae(found):
            self._convert_vae(found)
        else:
            if found.kind == "checkpoint":
                log.info("%s: reading all of it, to compare its files with their digests", found.file)
                check_content(found.file)
            self._convert_network(found)

    @property
    def _first(self) -> str:
        return self.key or NETWORKS[0]

    def _is_vae(self, found: Weights) -> bool:
        """Tell a Wan VAE's weights, by the config.json beside them or by the names in a file.

        Raises:
            InputError: they are of a VAE that has one layout alone.
        """
        if found.kind == "checkpoint":
            return False
        class_name = str(found.config.get("_class_name", "")) if self.path.is_dir() else ""
        if class_name.startswith("Autoencoder") and class_name != VAE_CLASS:
            raise InputError(f"{self.source}: an {class_name}, which has no other layout; {VAE_CLASS} has")
        if class_name:
            return class_name == VAE_CLASS
        return any(name.startswith("encoder.") for name in open_checkpoint(found.file, self._first, digests=False))

    def _convert_network(self, found: Weights) -> None:
        keys, step = [self._first], 0
        if found.kind == "checkpoint":
            step = _step(found.file)
            if self.layout == "trainer" and self.key is None:
                keys += [key for key in networks_in(found.file) if key not in keys]
        configs = {key: self._config(found, key) for key in keys}
        for key in keys[1:]:
            _check_same(configs[keys[0]], configs[key], key)
        first, *others = [self._read(found, configs[key], key) for key in keys]
        config, causal = configs[keys[0]], self.causal or found.config.get("_class_name") == CAUSAL_CLASS
        count = sum(tensor.numel() for network in (first, *others) for tensor in network.values())
        dtypes = {str(tensor.dtype)[6:] for network in (first, *others) for tensor in network.values()}
        write_weights(
            self.out.absolute(),
            self.layout,
            lambda to: save_checkpoint(
                first,
                to,
                self.layout,
                config,
                others=dict(zip(keys[1:], others, strict=True)),
                step=step,
                causal=causal,
                consume=True,
            ),
            self._card(_named(config, keys), count, dtypes),
        )
        log.info("%s: %s, %s, from %s", self.out, ", ".join(keys), self.layout, self.source)

    def _convert_vae(self, found: Weights) -> None:
        from longsana.config import VAEConfig
        from longsana.encoders.geometry import geometry
        from longsana.encoders.vae_files import convert_model  # brings diffusers, which takes seconds

        entries = open_checkpoint(found.file, NETWORKS[0]).values()
        count = sum(torch.Size(entry.shape).numel() for entry in entries)
        card = self._card("Wan 2.1 VAE", count, {entry.dtype for entry in entries})
        shape = geometry(VAEConfig())
        source, out = str(self.path), self.out.absolute()
        write_weights(out, self.layout, lambda to: convert_model(source, shape, to, self.layout), card)
        log.info("%s: %s, from %s", self.out, self.layout, self.source)

    def _read(self, found: Weights, config: ModelConfig, key: str) -> dict[str, Tensor]:
        try:
            tensors = read_weights(found.file, config, key=key)
        except InputError as error:
            own = self.config or found.kind == "checkpoint" or found.config.get("_class_name") in CLASSES
            remedy = "" if own else "a network of another size than the published one needs its YAML (--config): "
            raise InputError(f"{remedy}{error}") from error
        return {name: tensor.to(self.dtype or tensor.dtype) for name, tensor in tensors.items()}

    def _config(self, found: Weights, key: str) -> ModelConfig:
        """Describe a network by the YAML that the user names, else by the config beside it, else as the published one;
        in any case with learned factors of its past if they are there."""
        config, written = ModelConfig(), found.config
        if self.config is not None:
            given: InferenceConfig = load_config(locate(self.config, "--config"))
            config = given.model
        elif found.kind == "checkpoint":
            config = _configs_of_run(found.file)[key]
        elif written.get("_class_name") in CLASSES:
            config = from_diffusers_config(diffusers_config(ModelConfig()) | written)
        learned = DECAY_LOGIT in open_checkpoint(found.file, key, digests=False)
        return replace(config, state_decay=LEARNED) if learned else config

    def _card(self, what: str, count: int, dtypes: set[str]) -> str:
        if not self.card:
            return ""
        return MODEL_CARD.format(
            title=self.out.absolute().name,
            what=what,
            layout=self.layout,
            count=count,
            dtypes=", ".join(sorted(dtypes)),
            source=self.source,
        )


def _step(folder: Path) -> int:
    """Read the iteration of a run's checkpoint folder.

    Raises:
        InputError: its progress is damaged.
    """
    step = read_progress(folder).get("step")
    if type(step) is not int:
        raise InputError(f"{folder / PROGRESS}: damaged: its step is {step!r}; use another checkpoint")
    return step


def _configs_of_run(folder: Path) -> dict[str, ModelConfig]:
    """Read the configs of the networks in a checkpoint folder, by the networks' names."""
    from longsana.training.config import TrainingConfig

    config = load_config(folder / CONFIG, schema=TrainingConfig)
    return {"generator": config.model, "generator_ema": config.model, "critic": config.fake_score}


def _check_same(config: ModelConfig, other: ModelConfig, name: str) -> None:
    """Refuse (InputError) networks that a trainer's file has no place for: all are of one shape, but scores, which have
    no past, may lack the factors of it."""
    own, others = ({key: value.shape for key, value in empty_model(it).state_dict().items()} for it in (config, other))
    if {key: shape for key, shape in own.items() if key in others or key not in OPTIONAL} != others:
        raise InputError(
            f"the {name} has another shape than the generator ({other.model}, {config.model}): "
            "write each by itself, in another layout"
        )


def _named(config: ModelConfig, keys: list[str]) -> str:
    """Name a network by its size, as `model` may be the name of a larger one whose sizes a YAML changed."""
    size = config.architecture()
    name = config.model if ARCHITECTURES[config.model] == size else "LongSANA"
    past = "".join(f", {setting} {value}" for setting, value in chosen_past(config).items())
    what = f"Network {name} ({', '.join(keys)})"
    return f"{what}, {size.depth} blocks of width {size.hidden_size}, patch {size.patch_size}{past}"

"""Weights from one layout to another, a network's or a Wan 2.1 VAE's, and with a LoRA in them: the body of `longsana
convert` and `export`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from longsana.config import ARCHITECTURES, Architecture, InferenceConfig, ModelConfig, load_config
from longsana.models.past import LEARNED
from longsana.pipelines.lora import fused_adapter, read_base, read_lora
from longsana.runtime.errors import InputError
from longsana.runtime.hub import SEEDED, file_sha256, locate
from longsana.weights.build import empty_model
from longsana.weights.checkpoint_folder import PROGRESS, check_content, is_checkpoint, open_tensors, read_progress
from longsana.weights.files import (
    NETWORKS,
    holds_factors,
    networks_in,
    open_checkpoint,
    open_factors,
    write_safetensors,
)
from longsana.weights.lora import BASE, Base, fuse, plain_trained, targeted
from longsana.weights.names import (
    BASE_CLASS,
    CAUSAL_CLASS,
    DECAY_LOGIT,
    OPTIONAL,
    chosen_past,
    diffusers_config,
    from_diffusers_config,
)
from longsana.weights.network import Layout, check_fit, read_weights, save_checkpoint
from longsana.weights.what_is import PIPELINE_PART, Weights, what_is
from longsana.weights.writing import cast, check_target, write_weights

if TYPE_CHECKING:
    from longsana.training.config import TrainingConfig

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # in a checkpoint folder
DTYPES = ("float32", "bfloat16", "float16")
CLASSES = (BASE_CLASS, CAUSAL_CLASS)
VAE_CLASS = "AutoencoderKLWan"
VAE_LAYOUTS = ("upstream", "diffusers")
LORA: Final = "lora"
"""A layout of a LoRA alone: factors by diffusers' names, for `load_lora_weights`."""
MODEL_CARD = """\
# {title}

{what}, {layout} layout: {count:,} parameters, {dtypes}.

Converted from `{source}` by `longsana convert`: every tensor that this layout has a place for, as it was{but}.
Licence and use are those of the source.
"""
LORA_CARD = """\
# {title}

LoRA of rank {rank} on {count} layers of {what}, {dtypes}, for `load_lora_weights` and `longsana convert --fuse`.

Trained on `{base}`; taken from `{source}` by `longsana convert`. Licence and use are those of the base.
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
    fuse: a LoRA that is added to the weights: its file or folder, or a checkpoint folder of its training, of which
        `key` then names the network; of a run's networks, the one that the LoRA was trained on gets it.
    """

    source: str
    path: Path
    out: Path
    layout: Layout | Literal["lora"]
    option: str
    key: str | None = None
    dtype: torch.dtype | None = None
    config: str | None = None
    causal: bool = False
    force: bool = False
    card: bool = False
    fuse: str | None = None

    def check(self) -> None:
        """Refuse what cannot be converted, or has no place to go to; nothing is written, and no tensor is read.

        Raises:
            InputError: what is wrong.
        """
        found = what_is(self.path)
        if self.layout == LORA:
            self._check_lora(found)
        elif self._is_vae(found):
            self._check_vae()
        else:
            self._check_network(found)
        layout = "safetensors" if self.layout == LORA else self._layout
        check_target(self.out, layout, self.option, force=self.force, card=self.card)
        source, out = found.file.resolve(), self.out.resolve()
        inside = found.kind == "checkpoint" and source in out.parents
        if out in (self.path.resolve(), source, source.parent) or inside:
            raise InputError(f"{self.option} {self.out}: is {self.source}, or where it lies")
        if self._lora is not None:
            lora = self._lora.resolve()
            if out in (lora, lora.parent) or lora in out.parents:
                raise InputError(f"{self.option} {self.out}: is --fuse {self.fuse}, or where it lies, or within it")
        if self.layout == "trainer" and (found.kind != "checkpoint" or self.fuse is not None):
            others = "has the others too" if found.kind != "checkpoint" else "has others, to which no LoRA is added"
            log.warning("a trainer's file with one network, the %s; a run's checkpoint %s", self._first, others)

    def _check_vae(self) -> None:
        if self.layout not in VAE_LAYOUTS:
            raise InputError(f"--to {self.layout}: this is a VAE, for which there are {' and '.join(VAE_LAYOUTS)}")
        given = {"--config": self.config, "--key": self.key, "--causal": self.causal, "--dtype": self.dtype}
        given["--fuse"] = self.fuse
        if ignored := [option for option, value in given.items() if value]:
            raise InputError(f"{ignored[0]}: has no meaning for a VAE, as {self.source} is; leave it out")

    def _check_network(self, found: Weights) -> None:
        if self.causal and self.layout != "diffusers":
            raise InputError(f"--causal: only the layout diffusers says how a network samples, not {self.layout}")
        if self._lora_run is None and self.key not in (None, NETWORKS[0]) and found.kind in ("safetensors", "shards"):
            raise InputError(f"--key {self.key}: {self.source} holds one network; leave it out")
        if found.kind == "checkpoint" and not self.fuse and holds_factors(open_tensors(found.file)):
            exported = self.option == "--out"  # by `export`, which adds nothing to weights
            writes = f"--layout {LORA}" if exported else f"--to {LORA}"
            fuses = f"longsana convert ... --fuse {self.source}" if exported else f"--fuse {self.source}"
            raise InputError(
                f"{self.source}: holds the factors of a LoRA alone; {writes} writes them, and {fuses} puts them into "
                "the weights that they were trained on, which are then SRC"
            )
        if self._lora_run and found.kind == "checkpoint" and self._first not in (there := networks_in(found.file)):
            raise InputError(
                f"--fuse {self.fuse}: trained on the {self._first} of a run, and {self.source} has {', '.join(there)}; "
                f"write it to a file first (--to {LORA}): with that, --key names the network that gets it"
            )
        if self.fuse is not None and found.headers_tell:
            config = self._config(found, self._first)
            with self._hinted(found):
                check_fit(found.file, config, key=self._first)
            self._change(config)
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
        if self.layout == LORA:
            self._write_lora(found)
        elif self._is_vae(found):
            self._convert_vae(found)
        else:
            if found.kind == "checkpoint":
                log.info("%s: reading all of it, to compare its files with their digests", found.file)
                check_content(found.file)
            self._convert_network(found)

    @property
    def _layout(self) -> Layout:
        """The layout, of whole weights."""
        assert self.layout != LORA
        return self.layout

    @property
    def _first(self) -> str:
        """The network that is converted, where there are several to take it from."""
        own = self.key if self._lora_run is None else None
        return own or (self._base and self._base.key) or NETWORKS[0]

    @cached_property
    def _lora(self) -> Path | None:
        """The path of the LoRA that is added."""
        return None if self.fuse is None else locate(self.fuse, "--fuse")

    @cached_property
    def _lora_run(self) -> Path | None:
        """The checkpoint folder of the LoRA that is added, where it is in one; `_lora_key` is its network there."""
        return self._lora if self._lora is not None and is_checkpoint(self._lora) else None

    @property
    def _lora_key(self) -> str:
        return self.key or NETWORKS[0]

    @cached_property
    def _base(self) -> Base | None:
        """The network that the LoRA was trained on; None where its file does not say.

        Raises:
            InputError: the LoRA cannot be read.
        """
        if self._lora is None:
            return None
        if self._lora_run is None:
            return read_base(self._lora, "name its file")
        open_factors(self._lora_run, self._lora_key)  # says which networks there are
        return _base_of(self._lora_run, self._lora_key)

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

    def _check_lora(self, found: Weights) -> None:
        if found.kind != "checkpoint":
            raise InputError(f"--to {LORA}: {self.source} is no checkpoint folder of training with train.lora.rank")
        given = {"--config": self.config, "--causal": self.causal, "--fuse": self.fuse}
        if ignored := [option for option, value in given.items() if value]:
            raise InputError(f"{ignored[0]}: has no meaning with --to {LORA}; leave it out")
        if self.out.suffix != ".safetensors":
            raise InputError(f"{self.option} {self.out}: the layout {LORA} is a file, NAME.safetensors")
        open_factors(found.file, self._first)

    def _write_lora(self, found: Weights) -> None:
        check_content(found.file)
        run, factors = _training_config(found.file), _trained(found.file, self._first)
        named = cast({f"{PIPELINE_PART}.{name}": it for name, it in factors.items()}, self.dtype, self.source)
        base = _base_of(found.file, self._first)
        network = _configs_of_run(found.file)[self._first]
        card = LORA_CARD.format(
            title=self.out.absolute().name,
            rank=run.train.lora.rank,
            count=len(named) // 2,
            what=_named(network, [self._first]),
            dtypes=", ".join(sorted({str(tensor.dtype)[6:] for tensor in named.values()})),
            base=network.load_from,
            source=self.source,
        )
        write_weights(
            self.out.absolute(),
            "safetensors",
            lambda to: write_safetensors(
                named, to, sum(tensor.nbytes for tensor in named.values()), {BASE: base.text()}
            ),
            card if self.card else "",
        )
        log.info("%s: the LoRA of the %s, from %s", self.out, self._first, self.source)

    def _change(self, config: ModelConfig) -> dict[str, Tensor]:
        """The factors of the LoRA that is added, by our layers' names, with its scale in them.

        Raises:
            InputError: it cannot be read, or is for another network.
        """
        assert self._lora is not None
        metadata: dict[str, Any] | None
        if self._lora_run is None:
            factors, metadata = read_lora(self._lora, remedy="name its file")
        else:
            check_content(self._lora_run, remembered=True)
            trained = _trained(self._lora_run, self._lora_key)
            factors = {f"{PIPELINE_PART}.{name}": it for name, it in trained.items()}
            metadata = None if self._base is None else {BASE: self._base._asdict()}
        try:
            return fused_adapter(factors, empty_model(config), prefix=PIPELINE_PART, metadata=metadata)[0]
        except InputError as error:
            raise InputError(f"--fuse {self.fuse}: {error}") from error

    def _convert_network(self, found: Weights) -> None:
        keys, step = [self._first], 0
        if found.kind == "checkpoint":
            step = _step(found.file)
            if self.layout == "trainer" and self.key is None and self.fuse is None:
                keys += [key for key in networks_in(found.file) if key not in keys]
        configs = {key: self._config(found, key) for key in keys}
        for key in keys[1:]:
            _check_same(configs[keys[0]], configs[key], key)
        first, *others = [self._read(found, configs[key], key) for key in keys]
        if self.fuse is not None:
            fuse(first, self._change(configs[keys[0]]), f"--fuse {self.fuse}", self.dtype)
            first = cast(first, self.dtype, self.source)
        if other_base := self._other_base(found):
            log.warning("--fuse %s: %s; what it does to these is not known", self.fuse, other_base)
        config, causal = configs[keys[0]], self.causal or found.config.get("_class_name") == CAUSAL_CLASS
        count = sum(tensor.numel() for network in (first, *others) for tensor in network.values())
        dtypes = {str(tensor.dtype)[6:] for network in (first, *others) for tensor in network.values()}
        write_weights(
            self.out.absolute(),
            self._layout,
            lambda to: save_checkpoint(
                first,
                to,
                self._layout,
                config,
                others=dict(zip(keys[1:], others, strict=True)),
                step=step,
                causal=causal,
                consume=True,
            ),
            self._card(_named(config, keys), count, dtypes, other_base),
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
        write_weights(out, self._layout, lambda to: convert_model(source, shape, to, self._layout), card)
        log.info("%s: %s, from %s", self.out, self.layout, self.source)

    def _read(self, found: Weights, config: ModelConfig, key: str) -> dict[str, Tensor]:
        with self._hinted(found):
            tensors = read_weights(found.file, config, key=key)
        return tensors if self.fuse is not None else cast(tensors, self.dtype, self.source)

    @contextmanager
    def _hinted(self, found: Weights) -> Iterator[None]:
        """Say of weights that do not fit where the network's description comes from, unless it is their own."""
        try:
            yield
        except InputError as error:
            if self.config or found.kind == "checkpoint" or found.config.get("_class_name") in CLASSES:
                raise
            remedy = "a network of another size than the published one needs its YAML (--config): "
            if self._lora_run is not None:
                size = _configs_of_run(self._lora_run)[self._lora_key].architecture()
                remedy = f"--fuse {self.fuse}: trained on a network of {_size(size)}: "
            raise InputError(f"{remedy}{error}") from error

    def _other_base(self, found: Weights) -> str:
        """Say that the LoRA was trained on other weights than these, as digests tell; nothing ("") if it was not."""
        if self._base is None or self._base.sha256 is None:
            return ""
        trained, here = f"SHA-256 {self._base.sha256[:8]}", f"SHA-256 {file_sha256(self.path)[:8]}"
        if found.kind not in ("safetensors", "shards"):  # which may hold several networks
            trained, here = f"{trained}, {self._base.key or NETWORKS[0]}", f"{here}, {self._first}"
        told = f"was trained on other weights, or on the same in another file ({trained}, and here {here})"
        return "" if trained == here else told

    def _config(self, found: Weights, key: str) -> ModelConfig:
        """Describe a network by the YAML that the user names, else by the config beside it, else as the run did whose
        LoRA is added, else as the published one; in any case with learned factors of its past if they are there."""
        config, written = ModelConfig(), found.config
        if self.config is not None:
            given: InferenceConfig = load_config(locate(self.config, "--config"))
            config = given.model
        elif found.kind == "checkpoint":
            config = _configs_of_run(found.file)[key]
        elif written.get("_class_name") in CLASSES:
            config = from_diffusers_config(diffusers_config(ModelConfig()) | written)
        elif self._lora_run is not None:
            config = _configs_of_run(self._lora_run)[self._lora_key]
        learned = DECAY_LOGIT in open_checkpoint(found.file, key, digests=False)
        return replace(config, state_decay=LEARNED) if learned else config

    def _card(self, what: str, count: int, dtypes: set[str], other_base: str = "") -> str:
        if not self.card:
            return ""
        change = "" if self.fuse is None else f", and the change of the LoRA `{self.fuse}` added"
        return MODEL_CARD.format(
            title=self.out.absolute().name,
            what=what,
            layout=self.layout,
            count=count,
            dtypes=", ".join(sorted(dtypes)),
            source=self.source,
            but=f"{change}, which {other_base}" if other_base else change,
        )


def _base_of(folder: Path, key: str) -> Base:
    """Describe the network that a LoRA's checkpoint folder was trained on, with the digest in its run's record."""
    from longsana.training.run_folder import Record

    config, record = _configs_of_run(folder)[key], Record.read(folder)
    setting = "fake_score.load_from" if key == "critic" else "model.load_from"
    digest = None if record is None else record.sha256.get(setting)
    seeded = digest is None or digest.startswith(SEEDED)  # as good as none: no file has it
    return Base.of(config, key=config.checkpoint_key, sha256=None if seeded else digest)


def _trained(folder: Path, key: str) -> dict[str, Tensor]:
    """Read the factors of a LoRA's checkpoint folder, by the names of diffusers' layers, with its scale in them."""
    stored, lora = open_factors(folder, key), _training_config(folder).train.lora
    layers = targeted(empty_model(_configs_of_run(folder)[key]), lora.targets, f"{folder / CONFIG}: train.lora.targets")
    return plain_trained({name: it.read() for name, it in stored.items()}, layers, lora.scale)


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
    config = _training_config(folder)
    return {"generator": config.model, "generator_ema": config.model, "critic": config.fake_score}


def _training_config(folder: Path) -> TrainingConfig:
    from longsana.training.config import TrainingConfig

    return load_config(folder / CONFIG, schema=TrainingConfig)


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
    return f"{what}, {_size(size)}{past}"


def _size(size: Architecture) -> str:
    return f"{size.depth} blocks of width {size.hidden_size}, patch {size.patch_size}"

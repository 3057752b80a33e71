"""Small trainings: networks of 56 channels on latents of 16 x 4 x 6, seeds instead of checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from longsana.config import ModelConfig, load_config
from longsana.encoders.vae import WanVAE
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.training.config import TrainingConfig
from longsana.training.learner import Learner
from longsana.training.parallel import connect
from longsana.weights.names import PAST
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_video_scripts" / "train_longsana.py"
PROMPTS = ("a red ball rolls", "a blue box waits", "two green stars orbit", "a grey cone falls", "a pink ring spins")
NETWORK: dict[str, Any] = {
    "model": "SanaMSVideo_4M_P2_D12",
    "depth": 2,
    "hidden_size": 56,
    "num_heads": 4,
    "linear_head_dim": 28,
    "caption_channels": 64,
    "caption_length": 48,
}
CHANNELS, HEIGHT, WIDTH = 16, 4, 6  # of latents
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def small_training(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`small_training("ode", "train.max_iters=3")`: a YAML file of a stage that takes milliseconds an iteration.

    Clips of 5 latents in chunks of 3 and 2, streams of up to 9.
    """
    folder = tmp_path_factory.mktemp("configs")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    def write(trainer: str, *overrides: str) -> Path:
        config: dict[str, Any] = {
            "trainer": trainer,
            "model": NETWORK | {"load_from": "seeded:1"},
            "vae": {"vae_pretrained": "seeded:asset/shapes/vae"},
            "text_encoder": {"text_encoder_name": "seeded:asset/shapes/text_encoder", "chi_prompt": "none"},
            "sampling": {"height": 32, "width": 48, "chunk_frames": 2, "num_frames": 17},
            "data": {"data_path": str(prompts)},
            "rollout": {"num_training_frames": 5},
            "optimizer": {"generator": {"lr": 1e-3}},
            "train": {
                "max_iters": 6,
                "log_iters": 2,
                "mixed_precision": False,
                "gradient_checkpointing": False,
                "ema_start_step": 2,
            },
            "validation": {"val_data_path": str(prompts), "vis_interval": 0, "vis_video_lengths": [3]},
        }
        if trainer in ("self_forcing", "longsana"):
            score = NETWORK | {"depth": 1}
            config["real_score"] = score | {"load_from": "seeded:2"}
            config["fake_score"] = score | {"load_from": "seeded:3"}
            config["sampling"]["negative_prompt"] = "blurred"
            config["optimizer"]["critic"] = {"lr": 1e-3}
            config["rollout"] |= {"min_num_training_frames": 5, "slice_last_frames": 5}
            config["distillation"] = {"dfake_gen_update_ratio": 2}
        if trainer == "longsana":
            config["streaming"] = {"streaming_max_length": 9, "streaming_min_new_frame": 4}
        if trainer == "consistency":
            config["data"]["data_path"] = "generated:blobs"
            config["real_score"] = NETWORK | {"depth": 1, "load_from": "seeded:2"}
            config["sampling"]["negative_prompt"] = "blurred"
        if trainer == "flow_matching":
            config["data"]["data_path"] = "generated:blobs"
            config["sampling"] |= {"null_caption": "learned", "cfg_scale": 2.0}
            config["scheduler"] = {"sampling_algo": "flow_euler", "num_inference_steps": 2}
        merged = OmegaConf.merge(OmegaConf.create(config), OmegaConf.from_dotlist(list(overrides)))
        path = folder / f"{trainer}-{len(list(folder.iterdir()))}.yaml"
        OmegaConf.save(merged, path)
        return path

    return write


@pytest.fixture(scope="session")
def pictured_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of PROMPTS, each line of which names a picture beside it, of 50 x 40 random pixels."""
    folder = tmp_path_factory.mktemp("pictured")
    for number in range(len(PROMPTS)):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(number)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    path = folder / "prompts.txt"
    path.write_text("".join(f"{prompt}<image>{n}.png\n" for n, prompt in enumerate(PROMPTS)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def training_config(small_training: Callable[..., Path]) -> Callable[..., TrainingConfig]:
    """The same, loaded."""

    def load(trainer: str, *overrides: str) -> TrainingConfig:
        config: TrainingConfig = load_config(small_training(trainer, *overrides), (), TrainingConfig)
        return config

    return load


@pytest.fixture(scope="session")
def vae() -> WanVAE:
    from longsana.config import VAEConfig

    return WanVAE.load(VAEConfig(vae_pretrained="seeded:asset/shapes/vae"), "cpu", torch.float32)


@pytest.fixture(scope="session")
def network() -> ModelConfig:
    return ModelConfig(**NETWORK)


@pytest.fixture(scope="session")
def embed() -> Callable[..., TextEmbedding]:
    """Prompts to embeddings that differ, without a text encoder."""

    def build(prompts: list[str]) -> TextEmbedding:
        tokens = [
            torch.randn(48, 64, generator=torch.Generator().manual_seed(sum(map(ord, prompt)))) for prompt in prompts
        ]
        return TextEmbedding(torch.stack(tokens), torch.ones(len(prompts), 48, dtype=torch.bool))

    return build


@pytest.fixture
def distilled(training_config, random_model, network, embed, vae) -> Callable[..., Any]:
    """`distilled(SelfForcing, "self_forcing", "rollout.last_step_only=true")`: a stage with random float32 networks."""

    def make(stage: Callable[..., Any], trainer: str, *overrides: str, **parts: Any) -> Any:
        config = training_config(trainer, *overrides)
        past = {name: getattr(config.model, name) for name in PAST}
        sizes = [dataclasses.replace(network, **past), network, network]
        models = [random_model(size, torch.float32, seed) for seed, size in enumerate(sizes)]
        return stage(
            config,
            Learner(
                "generator", models[0], config.optimizer.generator, every=config.distillation.dfake_gen_update_ratio
            ),
            Learner("critic", models[1], config.optimizer.critic),
            models[2].requires_grad_(False),
            embed=embed,
            negative=embed(["blurred"]),
            prompts=PROMPTS,
            vae=vae,
            latent_shape=(CHANNELS, HEIGHT, WIDTH),
            **parts,
        )

    return make


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    world = World()
    connect(world, CPU)
    yield
    world.disconnect()


@pytest.fixture(scope="session")
def train_script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="session")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 6 random trajectories of 5 latents, at the noise levels of the default steps."""
    from longsana.data.shards import Contents, ShardWriter
    from longsana.data.trajectories import KIND, SIGMAS
    from longsana.flow.schedule import FlowSchedule
    from longsana.runtime.distributed import World

    folder = tmp_path_factory.mktemp("trajectories")
    schedule = FlowSchedule(7.0)
    sigmas = [*schedule.sigma(torch.tensor(schedule.steps)).tolist(), 0.0]
    rng = torch.Generator().manual_seed(0)
    shape = (CHANNELS, 5, HEIGHT, WIDTH)
    x0, noise = (torch.randn(6, 1, *shape, generator=rng) for _ in range(2))
    levels = torch.tensor(sigmas).view(1, -1, 1, 1, 1, 1)
    states = (1 - levels) * x0 + levels * noise
    contents = Contents(KIND, {SIGMAS: sigmas}, tuple(states.shape[1:]), "float32", len(states), 4)
    writer = ShardWriter(folder, contents, World(), "folder")
    for shard in writer.mine:
        rows = contents.rows(shard)
        writer.write(shard, states[rows.start : rows.stop], [PROMPTS[i % len(PROMPTS)] for i in rows])
    writer.finish()
    return folder


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr."""
        (line,) = self.err.splitlines()
        return line


@pytest.fixture(scope="session")
def command(train_script: ModuleType) -> Callable[..., Result]:
    """The training command in this process, without wandb unless it is asked for."""

    def run(*arguments: str | Path, wandb: bool = False) -> Result:
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = train_script.main([*map(str, arguments), *([] if wandb else ["--disable-wandb"])])
        finally:
            World().disconnect()  # a process that fails leaves its group, and ends
        return Result(status, out.getvalue(), err.getvalue())

    return run


def forbidden(*arguments: Any, **options: Any) -> Any:
    """Put in the place of what comes too late."""
    raise AssertionError("too late: something is being loaded")

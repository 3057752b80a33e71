"""Builds a wheel that works by itself: it holds the files of the small default, which lie at the repository's root."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = (
    "configs/sana_video_config/longsana/shapes/longsana.yaml",
    "asset/samples/shapes_prompts.txt",
    "asset/shapes/longsana.safetensors",
    *(f"asset/shapes/text_encoder/{name}" for name in ("config.json", "model.safetensors")),
    *(f"asset/shapes/text_encoder/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
    *(f"asset/shapes/vae/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")),
    "asset/shapes/vae/tae_shapes.safetensors",
)


class Build(build_py):
    """Puts them into the package, where `longsana.runtime.hub` looks first; not into an editable install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib) / "longsana" / "shipped" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)


setup(cmdclass={"build_py": Build})

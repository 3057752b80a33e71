"""LongSANA: a causal linear-attention diffusion transformer for video (arXiv 2509.24695).

One forward serves every role. Teacher and critic are one chunk and no state; block-wise training is all chunks at
once; rollout and inference are one chunk plus the state of everything before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.models.attention import CrossAttention, LinearAttention
from longsana.models.embeddings import CaptionEmbedding, PatchEmbedding, Text, TextEmbedding, TextMemory, TimeEmbedding
from longsana.models.feed_forward import MixFeedForward, TemporalConv
from longsana.models.past import LEARNED, Past, Reach
from longsana.models.rope import Rotary, rotary
from longsana.ops import (
    add_norm_modulate,
    add_norm_modulate_rows,
    gated_residual,
    gated_residual_rows,
    norm_modulate,
    norm_modulate_rows,
)
from longsana.ops.reference import accumulation_dtype
from longsana.runtime.peers import Peers
from longsana.state import CausalState, LayerState

NORM_EPS = 1e-6


class Block(nn.Module):
    float8 = False
    """Whether products read rows in float8 (see `models.float8`), which the operations before them then write."""

    def __init__(self, hidden_size: int, num_heads: int, config: ModelConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(6, hidden_size))
        self.attn = LinearAttention(hidden_size, config.linear_head_dim, eps=config.linear_attn_eps)
        self.cross_attn = CrossAttention(hidden_size, num_heads, norm_eps=config.cross_norm_eps)
        self.feed_forward = MixFeedForward(hidden_size, config.mlp_ratio, config.feed_forward_frames)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None,
        rotary: Rotary,
        size: tuple[int, int],
        plan: ChunkPlan,
        state: LayerState,
        reach: Reach,
        peers: Peers | None = None,
    ) -> tuple[Tensor, LayerState]:
        """x: (B, T, S, D); modulation: (B, 1 or T, 6, D); text, mask: see `CrossAttention`; peers: see the network.

        Returns x's like and the next state.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (self.modulation + modulation)[:, :, None].unbind(dim=-2)
        tokens = x.shape[2]
        norm = norm_modulate_rows if self.float8 else norm_modulate
        add_norm = add_norm_modulate_rows if self.float8 else add_norm_modulate

        h = norm(x, shift_1, scale_1, NORM_EPS)
        h, kv, k_sum = self.attn(h, rotary, state.kv, state.k_sum, [n * tokens for n in plan.lengths], reach, peers)
        if self.float8:
            x, h = gated_residual_rows(x, gate_1, h.view(x.shape))
        else:
            x = h = gated_residual(x, gate_1, h.view(x.shape))

        h = self.cross_attn(h, text, mask)
        x, h = add_norm(x, h.view(x.shape), shift_2, scale_2, NORM_EPS)

        h, mixed, tail = self.feed_forward(h, size, state.tail, plan.lengths, peers)
        return gated_residual(x, gate_2, h, mixed), LayerState(kv, k_sum, tail)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(2, hidden_size))
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, T, S, D); embedding: (B, 1 or T, D), before the blocks' modulation layer."""
        shift, scale = (self.modulation + embedding[:, :, None])[:, :, None].unbind(dim=-2)
        return self.linear(norm_modulate(x, shift, scale, NORM_EPS))


class LongSanaDiT(nn.Module):
    """The network. Parameters are uninitialised until `init_weights` or a checkpoint fills them."""

    decay_logit: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.architecture()
        if size.hidden_size % config.linear_head_dim or size.hidden_size % size.num_heads:
            raise ValueError(
                f"hidden_size {size.hidden_size} must be a multiple of linear_head_dim "
                f"{config.linear_head_dim} and of num_heads {size.num_heads}"
            )
        if size.patch_size[0] != 1 or config.linear_head_dim % 2:
            raise ValueError(
                f"patch_size {size.patch_size} must not span frames, linear_head_dim {config.linear_head_dim} must be "
                "even"
            )
        self.past = Past.of(config)
        self.config = config
        self.patch_size = size.patch_size
        self.heads = size.hidden_size // config.linear_head_dim
        self.patch_embed = PatchEmbedding(config.in_channels, size.hidden_size, size.patch_size, size.patch_size)
        self.time_embed = TimeEmbedding(size.hidden_size)
        self.text_embed = CaptionEmbedding(config.caption_channels, size.hidden_size, config.caption_length)
        self.blocks = nn.ModuleList(Block(size.hidden_size, size.num_heads, config) for _ in range(size.depth))
        self.final = FinalLayer(size.hidden_size, math.prod(size.patch_size) * config.in_channels)
        # Of learned factors of the past, counted from the logit of `past.START`: there bfloat16 tells them apart best,
        # and a checkpoint without them is one with zeros.
        learned = nn.Parameter(torch.zeros(size.depth, self.heads)) if self.past.decay == LEARNED else None
        self.register_parameter("decay_logit", learned)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        *,
        plan: ChunkPlan | None = None,
        state: CausalState | None = None,
        peers: Peers | None = None,
    ) -> tuple[Tensor, CausalState]:
        """Velocity of noisy latents, and the state after them.

        Args:
            x: (B, C, T, H, W), noisy latents. H and W are multiples of the patch.
            t: (B,) or (B, T), timestep in [0, 1000] of each clip or of each latent frame.
            text: tokens (B, L, caption_channels) and mask (B, L); or what `read` made of them.
            plan: chunks of the T frames; a frame sees its own chunk and everything before. None is one chunk.
            state: what is kept of everything before the first frame (see `models.past`); None is nothing.
            peers: processes that call this with the same arguments, and each compute some frames of the one chunk; all
                of them return all of it. Where it has fewer frames than there are processes, each computes all. Without
                gradients.

        Returns:
            Velocity (noise - clean) like x in the network's dtype, and the state that includes x's frames.
        """
        batch, _, frames, *latent_size = x.shape
        plan = plan or ChunkPlan((frames,))
        size = (latent_size[0] // self.patch_size[1], latent_size[1] // self.patch_size[2])
        state = state or self.empty_state(batch, latent_size[0], latent_size[1])
        self._check(x, t, plan, state)
        own = range(frames)  # that this process computes
        if peers is not None and len(plan) == 1 and peers.size <= frames:
            own = peers.share(frames)
            x, t = x[:, :, own.start : own.stop], t if t.dim() == 1 else t[:, own.start : own.stop]
        else:
            peers = None

        x = self.patch_embed(x.to(self.dtype))
        embedding, modulation = self.time_embed(t.view(batch, -1))
        if isinstance(text, TextMemory):
            captions: Sequence[Tensor | tuple[Tensor, Tensor]] = text.layers
        else:
            captions = [self.text_embed(text.tokens)] * len(self.blocks)
        rotation = rotary(
            self.config.linear_head_dim,
            state.frames + own.start,
            (len(own), *size),
            dtype=accumulation_dtype(self.dtype),
            device=x.device,
        )
        factors = self.past.factors(
            plan.lengths,
            (len(self.blocks), self.heads),
            self.decay_logit,
            dtype=accumulation_dtype(self.dtype),
            device=x.device,
        )
        sink = self.past.joins(state.sinks)
        layers, part = [], plan if peers is None else ChunkPlan((len(own),))
        for block, caption, memory, decay in zip(self.blocks, captions, state.layers(), factors, strict=True):
            reach = Reach(self.past.window, decay, sink)
            x, memory = block(x, modulation, caption, text.mask, rotation, size, part, memory, reach, peers)
            layers.append(memory)
        velocity = self._unpatchify(self.final(x, embedding), size)
        if peers is not None:
            velocity = peers.whole(velocity, 2, frames)
        after = CausalState.stack(layers, state.frames + frames, self.past.sunk(state.sinks, len(plan)))
        return velocity, after

    def cache_caption(self, text: TextEmbedding) -> TextMemory:
        """A caption for many passes: keys and values are computed once, and a single caption loses its padding.

        Not for sharded networks, whose weights are whole in `forward` alone.
        """
        alone = len(text.mask) == 1 and bool(text.mask.any())
        caption = self.text_embed(text.tokens[:, text.mask[0]] if alone else text.tokens)
        layers = []
        for block in self.blocks:
            keys, values = cast(Block, block).cross_attn.cache_caption(caption)
            layers.append((keys, values.contiguous()))  # a view would keep unnormalised keys alive
        return TextMemory(layers, None if alone else text.mask)

    def optimize_layout(self) -> None:
        """Lay weights out in memory for inference with fused operations, which otherwise reorder some in every pass."""
        for block in self.blocks:
            cast(Block, block).feed_forward.optimize_layout()

    def empty_state(self, batch: int, height: int, width: int, *, frames: int = 0) -> CausalState:
        """The state before the first frame of a video of height x width latent cells."""
        return CausalState.empty(
            depth=len(self.blocks),
            batch=batch,
            entries=self.past.entries,
            heads=self.heads,
            head_dim=self.config.linear_head_dim,
            tokens=height * width // math.prod(self.patch_size),
            dtype=self.dtype,
            device=self.patch_embed.weight.device,
            frames=frames,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.weight.dtype

    def _unpatchify(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        _, ph, pw = self.patch_size
        x = rearrange(x, "b t (h w) (ph pw c) -> b c t (h ph) (w pw)", h=size[0], ph=ph, pw=pw)
        return x.contiguous()  # of patches of one latent it is a view, which FSDP's hooks do not like

    def _check(self, x: Tensor, t: Tensor, plan: ChunkPlan, state: CausalState) -> None:
        batch, _, frames, height, width = x.shape
        if height % self.patch_size[1] or width % self.patch_size[2]:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {self.patch_size[1:]}")
        if t.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"t has shape {tuple(t.shape)}: need ({batch},) or ({batch}, {frames})")
        if plan.frames != frames:
            raise ValueError(f"chunks {plan.lengths} hold {plan.frames} frames, the latents {frames}")
        own = (*state.tail.shape[:3], state.kv.shape[2])
        expected = (len(self.blocks), batch, height * width // math.prod(self.patch_size), self.past.entries)
        if own != expected:
            raise ValueError(
                f"the state is of (layers, batch, tokens a frame, entries of window and sinks) {own}, these latents "
                f"and network need {expected}"
            )
        if state.sinks > self.past.sinks:
            raise ValueError(f"the state has {state.sinks} sinks, this network num_sink_blocks={self.past.sinks}")

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter for training from scratch; a function of the seed alone, on any device."""
        rng = torch.Generator().manual_seed(seed)

        def fill(tensor: Tensor, *, std: float | None = None, bound: float | None = None) -> None:
            values = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            if std is not None:
                values.normal_(0.0, std, generator=rng)
            else:
                assert bound is not None
                values.uniform_(-bound, bound, generator=rng)
            tensor.copy_(values)

        def xavier(weight: Tensor) -> None:
            fan_out, fan_in = weight.flatten(1).shape
            fill(weight, bound=math.sqrt(6 / (fan_in + fan_out)))

        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                # A caption starts out quiet, as published (y_norm_scale_factor).
                nn.init.constant_(module.weight, 0.01 if name == "text_embed.norm" else 1.0)
            elif isinstance(module, MixFeedForward):
                fill(module.depthwise.weight, bound=1 / 3)  # 1 / sqrt(fan-in)
            elif isinstance(module, TemporalConv):
                # Zero, so that a network that starts from an image model starts without temporal mixing.
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                if name.startswith(("time_embed", "text_embed")):
                    fill(module.weight, std=0.02)
                else:
                    xavier(module.weight)
            elif isinstance(module, Block | FinalLayer):
                fill(module.modulation, std=module.modulation.shape[1] ** -0.5)
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.decay_logit is not None:
            nn.init.zeros_(self.decay_logit)
        xavier(self.patch_embed.weight)
        fill(self.text_embed.null_tokens, std=self.config.caption_channels**-0.5)

"""Figures of any video: what they are, and that they say what is wrong."""

from __future__ import annotations

import pytest
import torch

from longsana.chunks import ChunkPlan
from longsana.evaluation.measures import (
    Measures,
    boundaries,
    drift,
    drift_curve,
    end_drift,
    measure,
    motion,
    per_second,
    seam_index,
)
from longsana.runtime.gpu import pictures_together
from longsana.shapes import scenes as shapes
from longsana.shapes.sight import observe
from tests.shapes.films import pictures, through_vae

FPS = shapes.FPS


def test_figures_of_plain_pictures():
    clip = torch.zeros(2, 3, 8, 10, 3, dtype=torch.uint8)
    clip[:, 1] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    clip[:, 2, :, ::2] = 255
    figures = measure(clip)
    for name, expected in {
        "saturation": [0, 150 / 255, 0],
        "contrast": [0, 0, 0.5],
        "sharpness": [0, 0, 2],
        "change": [torch.nan, 350 / 3 / 255, (55 + 155 + 205 + 200 + 100 + 50) / 6 / 255],
    }.items():
        values = torch.tensor(expected, dtype=torch.float32).expand(2, 3)
        torch.testing.assert_close(getattr(figures, name), values, equal_nan=True, atol=1e-5, rtol=0, msg=name)


def test_pieces_are_the_whole():
    clip = through_vae(pictures([shapes.draw_scene(1, i) for i in range(3)], 45))
    whole = measure(clip)
    joined = Measures.join(
        [measure(clip[:, :7]), measure(clip[:, 7:30], clip[:, 6]), measure(clip[:, 30:], clip[:, 29])]
    )
    for a, b in zip(whole, joined, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_as_many_pictures_together_as_the_device_has_room_for() -> None:
    """On a GPU small ones are many, and of large ones no more than on a CPU."""
    small, large = (torch.empty(1, 1, *size, 3, device="meta") for size in ((96, 160), (704, 1280)))
    assert (pictures_together(torch.empty(1, 1, 96, 160, 3)), pictures_together(large)) == (32, 32)
    assert 1000 < pictures_together(small) < 1100


@pytest.mark.parametrize("together", [3, 1000])
def test_how_many_are_looked_at_together_changes_nothing(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    film = pictures([shapes.draw_scene(0, index) for index in range(2)], 20)
    figures, seen = measure(film), observe(film)
    for module in ("evaluation.measures", "shapes.sight"):
        monkeypatch.setattr(f"longsana.{module}.pictures_together", lambda pictures: together)
    torch.testing.assert_close(measure(film), figures, equal_nan=True)
    # Bytes, pixels and radians, of sums that are rounded otherwise.
    torch.testing.assert_close(observe(film)[:-1], seen[:-1], equal_nan=True, atol=1e-4, rtol=1e-5)


def test_boundaries_are_pixel_frames():
    assert boundaries(ChunkPlan.split(21, 10), 4) == [41]  # chunks of 11 and 10 latents: 41 frames, then 40
    assert boundaries(ChunkPlan.split(241, 10), 4)[:2] == [41, 81]
    assert len(boundaries(ChunkPlan.split(241, 10), 4)) == 23
    assert boundaries(ChunkPlan.split(5, 10), 4) == []


def rhythm(frames: int) -> torch.Tensor:
    """Changes of a decoder whose latents begin with a jolt."""
    change = torch.full((1, frames), 0.01)
    change[:, 1::4] = 0.03
    change[:, 0] = torch.nan
    return change


def test_the_rhythm_of_the_vae_is_no_seam():
    change = rhythm(161)
    assert seam_index(change, [41, 81, 121], 4).item() == pytest.approx(1)
    change[:, 81] *= 4
    assert seam_index(change, [41, 81, 121], 4).item() == pytest.approx(2, abs=0.02)
    assert seam_index(change, [], 4).isnan().all()


def test_every_vae_has_its_own_rhythm():
    assert boundaries(ChunkPlan.split(31, 10), 8) == [81, 161]  # 8 pixel frames a latent: chunks of 81, 80 and 80
    change = torch.full((1, 241), 0.01)
    change[:, 1::8] = 0.03
    assert seam_index(change, [81, 161], 8).item() == pytest.approx(1)
    assert seam_index(change, [81, 161], 4).item() > 1.4


def test_a_jump_at_a_boundary_is_a_seam():
    drawn = [shapes.draw_scene(2, i) for i in range(6)]
    drawn = [scene for scene in drawn if all(track.actor.motion != "still" for track in scene.tracks)]
    smooth = pictures(drawn, 81)
    jump = torch.cat([smooth[:, :41], pictures(drawn, 40, start=61)], dim=1)
    for spoil in (lambda clip: clip, lambda clip: through_vae(clip, psnr=40)):
        assert seam_index(measure(spoil(smooth)).change, [41], 4).mean() == pytest.approx(1, abs=0.1)
        assert seam_index(measure(spoil(jump)).change, [41], 4).min() > 1.3


def test_what_does_not_move_has_no_seam():
    clip = pictures([shapes.draw_scene(2, 0)], 1).expand(-1, 81, -1, -1, -1)
    change = measure(clip).change
    assert seam_index(change, [41], 4).item() == 1
    assert motion(change, FPS).item() == 0
    flicker = clip.clone()
    flicker[:, 41:, ::8, ::8, 0] += 1  # one byte in 192
    assert seam_index(measure(flicker).change, [41], 4).item() < 1.15


def test_fading_colours_drift():
    """By a tenth toward gray, from the sixth second on."""
    drawn = [shapes.draw_scene(3, i) for i in range(2)]
    clip = pictures(drawn, 10 * FPS + 1)
    gray = clip.float().mean(-1, keepdim=True)
    late = 0.1 * ((torch.arange(clip.shape[1]) - 5 * FPS) / FPS).clamp(0, 1)[None, :, None, None, None]
    faded = torch.lerp(clip.float(), gray, late).round().to(torch.uint8)
    values = measure(faded).saturation
    assert drift(measure(clip).saturation, FPS).abs().max() < 0.01
    assert (drift(values, FPS) < -0.07).all()
    curve = drift_curve(values, FPS)
    assert curve.shape == (2, 10)
    assert curve[:, :5].abs().max() < 0.01
    assert (curve[:, 6:] < -0.08).all()


def test_drift_needs_more_than_five_seconds():
    values = torch.ones(3, 5 * FPS + 1)
    assert drift(values, FPS).isnan().all()
    assert drift(torch.ones(3, 5 * FPS + 5), FPS).tolist() == [0, 0, 0]


def test_seconds():
    values = torch.arange(81.0)[None]
    assert per_second(values, 16).tolist() == [[7.5, 23.5, 39.5, 55.5, 72.0]]
    assert per_second(values[:, :7], 16).tolist() == [[3.0]]
    assert per_second(torch.arange(24.0)[None], 7.5).shape == (1, 3)


def test_motion_is_change_a_second():
    assert motion(torch.tensor([[torch.nan, 0.1, 0.3]]), 10).item() == pytest.approx(2)


def test_seams_of_a_video_without_an_opening_picture() -> None:
    """What goes on from another video has its latents' first frames at multiples of the stride."""
    change = torch.full((1, 40), 0.01)
    change[:, ::4] = 0.02  # the VAE's rhythm
    change[:, 0] = torch.nan
    assert float(seam_index(change, [8, 24], 4)) == pytest.approx(1)
    change[:, [8, 24]] = 0.06
    assert float(seam_index(change, [8, 24], 4)) == pytest.approx(3, rel=0.05)


def test_the_ends_are_fifteen_percent() -> None:
    """Of twenty frames three at each end count, whatever lies between; a share of them alone decides."""
    values = torch.full((1, 20), 7.0)
    values[:, :3], values[:, -3:] = 2.0, 3.0
    assert end_drift(values).item() == pytest.approx(0.5)
    assert end_drift(10 * values).item() == pytest.approx(0.5)
    assert end_drift(values.flip(1)).item() == pytest.approx(-1 / 3)
    values[:, 0] = torch.nan
    assert end_drift(values).item() == pytest.approx(0.5)
    assert end_drift(values[:, :3]).isnan().all()

"""MicroBatches, and the order of the data."""

from __future__ import annotations

import torch

from longsana.training.stages.stage import MicroBatch, MicroBatches, Shuffled


def test_micro_batchs_of_all_processes_are_all_micro_batchs_once():
    for processes, accumulation in ((1, 4), (2, 2), (4, 1), (3, 2)):
        micro_batches = [MicroBatches(rank, processes, accumulation).mine for rank in range(processes)]
        assert sorted(index for mine in micro_batches for index in mine) == list(range(processes * accumulation))
        # In each accumulation step the processes take neighbours.
        assert [mine[0] for mine in micro_batches] == list(range(processes))


def test_every_epoch_is_another_order_of_everything():
    order = Shuffled(7, seed=3, name="critic")
    epochs = [[order[7 * epoch + i] for i in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    # Asked for in any order, and by any process.
    again = Shuffled(7, seed=3, name="critic")
    assert [again[i] for i in reversed(range(28))] == [epochs[i // 7][i % 7] for i in reversed(range(28))]
    assert [Shuffled(7, 4, "critic")[i] for i in range(28)] != [order[i] for i in range(28)]
    assert [Shuffled(7, 3, "generator")[i] for i in range(28)] != [order[i] for i in range(28)]


def test_what_is_shared_does_not_know_the_micro_batch():
    def micro_batch(index: int, step: int = 0) -> MicroBatch:
        return MicroBatch(0, step, "generator", index, range(1), torch.device("cpu"))

    def draw(rng: torch.Generator) -> float:
        return float(torch.rand((), generator=rng))

    assert draw(micro_batch(0).shared_rng("exit")) == draw(micro_batch(5).shared_rng("exit"))
    assert draw(micro_batch(0).shared_rng("exit")) != draw(micro_batch(0, step=1).shared_rng("exit"))
    assert draw(micro_batch(0).rng("t")) != draw(micro_batch(5).rng("t"))
    assert draw(micro_batch(0).rng("t")) != draw(micro_batch(0).rng("drop"))


def test_noise_drawn_on_the_device_is_a_function_of_its_name_and_micro_batch():
    def micro_batch(index: int = 0, *, device_noise: bool = True) -> MicroBatch:
        return MicroBatch(0, 0, "generator", index, range(1), torch.device("cpu"), device_noise)

    noise = micro_batch().normal("noise", (2, 300))
    assert noise.dtype == torch.float32
    torch.manual_seed(9)
    assert torch.equal(noise, micro_batch().normal("noise", (2, 300)))
    for other in (micro_batch().normal("t", (2, 300)), micro_batch(1).normal("noise", (2, 300))):
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.2
    # Where the device is the CPU, to draw there changes nothing.
    assert torch.equal(noise, micro_batch(device_noise=False).normal("noise", (2, 300)))

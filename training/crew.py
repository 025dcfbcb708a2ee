"""Data-parallel training on one machine: each process takes its share of every batch, and gradients are averaged.

One process with two threads waits at the end of every small operation for the slower thread, which on a machine with
other load costs up to nine tenths of the speed; processes of one thread each synchronise once a step.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from training.data import Batch


@dataclass(frozen=True, slots=True)
class Place:
    """The rank of this process, the number of processes, and the folder that they share."""

    rank: int
    size: int
    meeting: Path


class Crew:
    """Averages gradients in shared memory; two alternating buffers need only one barrier a step."""

    def __init__(self, place: Place, parameters: list[torch.nn.Parameter]) -> None:
        """Map the shared buffers; a single process needs none."""
        self.rank, self.size = place.rank, place.size
        self._turn = 0
        if self.size == 1:
            return
        distributed.init_process_group(
            "gloo", init_method=f"file://{place.meeting}/start", rank=place.rank, world_size=place.size
        )
        self._length = sum(p.numel() for p in parameters)
        count = 2 * self.size * (self._length + 1)
        self._shared = torch.from_file(str(place.meeting / "gradients"), shared=True, size=count, dtype=torch.float32)
        self._shared = self._shared.view(2, self.size, self._length + 1)
        self._parameters = parameters
        self._shapes = [p.numel() for p in parameters]

    def share_of(self, batch: Batch) -> Batch:
        """Return this process's part of a batch."""
        mine = slice(self.rank, None, self.size)
        return Batch(batch.pixels[mine], batch.concepts[mine], batch.sources[mine])

    def meet(self, seconds: float) -> float:
        """Replace every gradient by its mean over the processes; return the seconds of rank 0, so that clocks agree."""
        if self.size == 1:
            return seconds
        buffers = self._shared[self._turn]
        self._turn = 1 - self._turn
        pieces = torch.split(buffers[self.rank, :-1], self._shapes)
        for piece, parameter in zip(pieces, self._parameters, strict=True):
            if parameter.grad is None:
                piece.zero_()
            else:
                piece.view_as(parameter).copy_(parameter.grad)
        buffers[self.rank, -1] = seconds
        distributed.barrier()
        mean = buffers[:, :-1].mean(dim=0)
        for piece, parameter in zip(torch.split(mean, self._shapes), self._parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(piece.view_as(parameter))
        return float(buffers[0, -1])

    def leave(self) -> None:
        """Wait for the other processes and leave the group."""
        if self.size > 1:
            distributed.barrier()
            distributed.destroy_process_group()


def thread_count(size: int) -> int:
    """Return the number of threads of each process."""
    return max(1, (os.cpu_count() or 1) // size)

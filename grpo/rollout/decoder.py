"""The device's side of the native engine: the cache, the state of the rows, and the decoding step, captured as CUDA graphs.

A step reads the newest token of each row, keeps its keys and values, and draws the next. Rows are the running sequences in any
order; all that a row is, is a column of `state` and a row of the block table, so rows can be rearranged between chunks of steps
without touching a key or value. A row that has ended repeats its last step until it is taken out, which changes nothing.

The device never waits for the host: a chunk is launched before the results of the one before it are known. The state of a
sequence that goes on therefore stays on the device, and only moves to its new column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.policy.language_model import output_head
from grpo.rollout.fp8 import Fp8Layers
from grpo.rollout.layers import FusedLayers, model_layers
from grpo.rollout.paged import PAGE, Kept, PagedCache, Places
from grpo.rollout.sampling import KNOBS, draw, knobs_of
from grpo.rollout.slots import Prefix, Sequence
from grpo.system import progress
from grpo.types import Sampling

CHUNK, CPU_CHUNK = 4, 2
"""Steps per launch. A sequence is taken out one chunk after the one in which it ends; so more steps waste more on ended rows,
and fewer leave the host too little time to prepare the next launch, which a CPU does not do meanwhile."""

TOKEN, LENGTH, REMAINING = range(3)  # rows of the state: newest token, tokens before it, tokens it may still draw


def bucket_of(num_rows: int) -> int:
    """Rows of the smallest graph that has so many: steps of about a quarter, so that few graphs waste few rows."""
    step = max((1 << (num_rows - 1).bit_length()) >> 3, 1)
    return -(-num_rows // step) * step


@dataclass
class Chunk:
    """Steps that were launched, and what they will have given once `wait` returns."""

    rows: list[Sequence]
    num_places: int  # rows of the graph times steps
    tokens: Tensor  # (steps, slots) int32, on the host
    logprobs: Tensor  # (steps, slots) float32
    lens: Tensor  # (slots,) int32, tokens before the newest of each row after the last step
    event: torch.cuda.Event | None

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


def _places(pages: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where in the cache these positions of a sequence with these pages are."""
    return pages[positions // PAGE] * PAGE + positions % PAGE


@contextmanager
def _undone_if_it_fails(device: torch.device, pool: tuple[int, int]) -> Iterator[None]:
    """A capture that fails leaves torch as if it still went on (torch 2.13, CUDAGraph::capture_end): its stream stays the current
    one, the allocator gives nothing back, neither in empty_cache nor before it is out of memory, and whoever draws random numbers
    next fails.

    Args:
        pool: the memory that the graph is captured in.
    """
    stream = torch.cuda.current_stream(device)
    try:
        yield
    except RuntimeError:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # the failure came after torch had ended it
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


class Decoder:
    """Runs forward passes of one model over one cache.

    Args:
        num_slots: most rows of a step.
        pages_each: pages of the longest sequence.
        fused: run the layers on our own kernels.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        cache: PagedCache,
        *,
        num_slots: int,
        pages_each: int,
        end_token_ids: list[int],
        fused: bool,
    ) -> None:
        self.lm, self.cache, self.fused = lm, cache, fused
        self.device = cache.keys.device
        self.chunk = CHUNK if self.device.type == "cuda" else CPU_CHUNK
        self.ends = torch.tensor(end_token_ids, dtype=torch.int32, device=self.device)
        self.state = self._zeros(3, num_slots)
        self.seeds = self._zeros(num_slots, dtype=torch.int64)
        self.table = self._zeros(num_slots, pages_each)
        self.knobs = self._zeros(len(KNOBS), dtype=torch.float32)
        self.step_number = self._zeros(1, dtype=torch.int64)
        self.tokens = self._zeros(self.chunk, num_slots)
        self.logprobs = self._zeros(self.chunk, num_slots, dtype=torch.float32)
        self.truncated = self.in_8_bits = False
        self._columns: dict[Sequence, int] = {}  # where each row of the last launch is
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._addresses: list[int] = []
        self._own_layers: Callable[..., Tensor] = model_layers
        self._fp8_layers: Fp8Layers | None = None

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def check_weights(self) -> None:
        """Drop what was captured if a weight has moved: a graph reads addresses, not tensors."""
        addresses = [weight.data_ptr() for weight in self.lm.parameters()]
        if addresses != self._addresses:
            self._addresses = addresses
            self._graphs.clear()
            self._own_layers = FusedLayers(self.lm) if self.fused else model_layers
            self._fp8_layers = None

    @property
    def _layers(self) -> Callable[..., Tensor]:
        if not self.in_8_bits:
            return self._own_layers
        assert self._fp8_layers is not None, "begin has made them"
        return self._fp8_layers

    def begin(self, sampling: Sampling) -> None:
        """Before the first launch of a call: the weights may have been updated since the one before."""
        self.check_weights()
        self._columns = {}
        self.in_8_bits = sampling.weights == "fp8"
        if self.in_8_bits:
            self._fp8_layers = self._fp8_layers or Fp8Layers(self.lm)
            self._fp8_layers.round_weights()
        self.knobs.copy_(knobs_of(sampling))
        self.truncated = sampling.truncated

    def read(self, prefixes: list[Prefix]) -> int:
        """Keep the keys and values of prefixes behind what is kept of them, up to `Prefix.end`, and say how many these are."""
        rows = [(prefix.tokens[: prefix.end], prefix.num_kept, prefix.pages) for prefix in prefixes]
        rows = [(tokens, start, pages) for tokens, start, pages in rows if len(tokens) > start]
        if not rows:
            return 0
        starts, ends = [start for _, start, _ in rows], [len(tokens) for tokens, _, _ in rows]
        lens = [end - start for start, end in zip(starts, ends, strict=True)]
        positions = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
        tables = [np.array(pages) for _, _, pages in rows]
        kept = None
        if any(starts):
            kept = Kept(
                self._upload(np.concatenate([*map(_places, tables, map(np.arange, ends))])),
                self._upload(np.cumsum([0, *ends])).int(),
                max(ends),
            )
        self._layers(
            self.lm,
            self._upload(np.concatenate([tokens[start:] for tokens, start, _ in rows])),
            self._upload(np.concatenate(positions)),
            Places(
                self.cache,
                write=self._upload(np.concatenate([*map(_places, tables, positions)])),
                cu_seqlens=self._upload(np.cumsum([0, *lens])).int(),
                longest=max(lens),
                kept=kept,
            ),
        )
        return sum(lens)

    def copy(self, pages: list[tuple[int, int]]) -> None:
        """Copy pages, as (source, target)."""
        if pages:
            sources, targets = self._upload(np.array(pages)).unbind(1)
            self.cache.copy(sources, targets)

    def _upload(self, values: np.ndarray) -> Tensor:
        return self._pinned(values.astype(np.int64)).to(self.device, non_blocking=True)

    def decode(self, rows: list[Sequence]) -> Chunk:
        """Launch a chunk of steps of these sequences. One that was in the last launch goes on from there."""
        size = self._size(len(rows))
        graph = self._graph(size) if self.device.type == "cuda" else None
        self._stage(rows)
        for _ in range(self.chunk):
            if graph is None:
                self._step(size)
            else:
                graph.replay()
        return self._collect(rows, size)

    def warm_up(self, num_rows: int) -> None:
        """Compile and capture the step of so many rows."""
        if self.device.type == "cuda":
            with torch.no_grad():
                self._graph(self._size(num_rows))

    def _size(self, num_rows: int) -> int:
        return min(bucket_of(num_rows), self.state.shape[1]) if self.device.type == "cuda" else num_rows

    def _stage(self, rows: list[Sequence]) -> None:
        """Set up the rows of the next steps; columns beyond them draw nothing and write to page 0."""
        num_slots, width = self.table.shape
        table = np.zeros((num_slots, width), np.int32)
        state = np.zeros((3, num_slots), np.int32)
        seeds = np.zeros(num_slots, np.int64)
        source = np.arange(num_slots, 2 * num_slots)  # columns of the state as it is, then of the new one
        for column, sequence in enumerate(rows):
            table[column, : len(sequence.shared)] = sequence.shared
            table[column, len(sequence.shared) :][: len(sequence.own)] = sequence.own
            seeds[column] = sequence.seed
            if sequence in self._columns:
                source[column] = self._columns[sequence]
            else:
                state[:, column] = sequence.newest, sequence.num_cached, sequence.remaining
        self._columns = {sequence: column for column, sequence in enumerate(rows)}
        self.table.copy_(self._pinned(table), non_blocking=True)
        self.seeds.copy_(self._pinned(seeds), non_blocking=True)
        both = torch.cat([self.state, self._pinned(state).to(self.device, non_blocking=True)], 1)
        self.state.copy_(both.index_select(1, self._pinned(source).to(self.device, non_blocking=True)))
        self.step_number.zero_()

    def _pinned(self, values: np.ndarray) -> Tensor:
        """On the host, in memory that the device copies from while the host goes on."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _collect(self, rows: list[Sequence], size: int) -> Chunk:
        tokens, logprobs, lens = map(self._download, (self.tokens, self.logprobs, self.state[LENGTH]))
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return Chunk(rows, size * self.chunk, tokens, logprobs, lens, event)

    def _download(self, source: Tensor) -> Tensor:
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=self.device.type == "cuda")
        return target.copy_(source, non_blocking=True)

    def logits(self, size: int) -> Tensor:
        """Read the newest token of each of the first `size` rows; (size, V) logits of the next."""
        tokens, lens = self.state[TOKEN, :size], self.state[LENGTH, :size]
        table = self.table[:size]
        page = table.gather(1, (lens // PAGE).long().unsqueeze(1)).squeeze(1).long()
        places = Places(self.cache, write=page * PAGE + lens % PAGE, block_table=table, lens=lens + 1)
        return output_head(self.lm)(self._layers(self.lm, tokens, lens, places))

    def _draw(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A token of each row and its log-probability; logits (size, V), positions (size,)."""
        return draw(logits, self.seeds[: len(logits)], positions, self.knobs, truncated=self.truncated)

    def _is_end(self, drawn: Tensor) -> Tensor:
        """(size,) whether a token ends its row."""
        return (drawn.unsqueeze(1) == self.ends).any(1)

    def _step(self, size: int) -> None:
        logits = self.logits(size)
        tokens, lens, remaining = self.state[:, :size].unbind(0)
        drawn, logprobs = self._draw(logits, lens + 1)
        self.tokens[:, :size].index_copy_(0, self.step_number, drawn.unsqueeze(0))
        self.logprobs[:, :size].index_copy_(0, self.step_number, logprobs.unsqueeze(0))
        self.step_number.add_(1)
        alive = remaining > 0
        lens.add_(alive)
        tokens.copy_(drawn.where(alive, tokens))
        remaining.sub_(alive.int()).mul_(~(alive & self._is_end(drawn)))

    def _variant(self) -> tuple[bool, ...]:
        """What a captured step depends on, besides its size."""
        return self.truncated, self.in_8_bits

    def _graph(self, size: int) -> torch.cuda.CUDAGraph:
        """A captured step. The step before the capture, which compiles and sets up, has no sequences: it writes to page 0."""
        key = (size, *self._variant())
        if key not in self._graphs:
            state, table = self.state.clone(), self.table.clone()
            self.state.zero_()
            self.table.zero_()
            self.step_number.zero_()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), progress.busy("compiling a step"):
                self._step(size)
            torch.cuda.current_stream().wait_stream(side)
            graph, pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
            with _undone_if_it_fails(self.device, pool), torch.cuda.graph(graph, pool=pool):
                self._step(size)
            self._pool, self._graphs[key] = pool, graph
            self.state.copy_(state)
            self.table.copy_(table)
        return self._graphs[key]

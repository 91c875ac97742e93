"""The teacher's final hidden states, computed once and used in every stage, epoch, method, temperature and job.

The cache holds the input of the output head at the positions that predict a response token; the head is applied in the
loss. That is exact for every temperature and method, at width x 2 or 4 bytes a token, where logits would take
vocabulary x 2.

States are kept by sample (:mod:`pocl.teacher.shards`): a run takes each sample from whichever shard has it, and only
what no shard has is computed (:mod:`pocl.teacher.filling`), so that the teacher runs once on a sample however many
data sets it is in. Where nothing is missing, the head of the teacher is loaded and its layers are not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import errorcode

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batches import Batch, EncodedSample
from pocl.errors import DiskFull
from pocl.events import Sink, Warned
from pocl.models.digest import head_digest
from pocl.models.heads import without_layers
from pocl.models.precision import Precision
from pocl.out_of_memory import is_out_of_memory, release_memory
from pocl.storage.shared_cache import CacheHolder, SharedCache
from pocl.teacher.filling import Filling, spot_check
from pocl.teacher.found_shards import FoundShards
from pocl.teacher.shards import choose_batch_tokens, max_positions_of, plan_batches, shard_kind
from pocl.teacher.signal import TeacherSignal, TeacherSource


@contextmanager
def open_teacher(
    source: TeacherSource,
    samples: Sequence[EncodedSample],
    *,
    shared_cache: SharedCache,
    sink: Sink,
    should_stop: Callable[[], bool] = lambda: False,
    batch_tokens: int | None = None,
) -> Iterator[TeacherSignal]:
    """The teacher for these samples: cached, after computing what the cache lacks, or else live.

    Where something is computed, a few cached samples are compared with the live teacher, and a difference discards all.
    Where the cache cannot be used, for want of room on the disk or within its bound, the live teacher is returned, with
    a warning.

    Args:
        source: Loads the teacher, or its head alone.
        samples: Every sample that the teacher will be needed for; order and repeats do not matter.
        shared_cache: Where shards are stored, for this run and others.
        sink: Receives progress and warnings.
        should_stop: Called before each batch of the teacher.
        batch_tokens: Tokens of a batch of the teacher; by the device unless given. The bits of the states depend on it.

    Raises:
        RunStopped: when `should_stop` turns true; finished shards stay.
        RuntimeError, MemoryError: memory ran out for a single sample, as :func:`~pocl.out_of_memory.is_out_of_memory`
            says.
    """
    # The shards are held for as long as the teacher is used, so that no other run evicts them.
    with ExitStack() as held:
        teacher: TeacherSignal
        try:
            holder = held.enter_context(shared_cache.holder())
            opening = _Opening(source, samples, shared_cache, holder, sink, should_stop)
            shared_cache.sweep()
            teacher = opening.open(batch_tokens or choose_batch_tokens(source.precision.device))
            # It refers to the layers, which a cached teacher does not need: their memory is freed.
            del opening
        except (DiskFull, OSError, SafetensorError) as error:
            held.close()
            message = f"the teacher runs at each visit of a sample: {_reason(error)}"
            sink(Warned(code="teacher_cache_skipped", message=message))
            teacher = source.live()
        del source
        yield teacher


class CachedTeacher:
    """A teacher whose hidden states come from memory-mapped shards."""

    def __init__(
        self, head_only: PreTrainedModel, precision: Precision, states: dict[str, Tensor], batch_tokens: int
    ) -> None:
        """`head_only` is the model without layers; `states` are the hidden states by content digest of the sample."""
        self.model = head_only
        self.precision = precision
        self.batch_tokens = batch_tokens
        """Tokens of the batches that the states were computed in."""
        self._states = states

    def hidden(self, batch: Batch) -> Tensor:
        """Input of the output head at the positions that predict a response token, `[T, width]`.

        Raises:
            KeyError: for a sample that the cache was not opened with.
        """
        states = [self._states[sample.content_digest] for sample in batch.samples]
        device = batch.labels.device
        if device.type != "cuda":
            return torch.cat(states)
        # Out of pinned memory the copy is asynchronous; the allocator keeps it until the copy is done.
        staging = torch.empty(batch.tokens, states[0].shape[1], dtype=states[0].dtype, pin_memory=True)
        torch.cat(states, out=staging)
        return staging.to(device, non_blocking=True)


class _Opening:
    """Opens the shards of one teacher for the samples of one run, and computes what is missing."""

    def __init__(
        self,
        source: TeacherSource,
        samples: Sequence[EncodedSample],
        shared_cache: SharedCache,
        holder: CacheHolder,
        sink: Sink,
        should_stop: Callable[[], bool],
    ) -> None:
        self._source = source
        self._samples = {sample.content_digest: sample for sample in samples}
        self._shared_cache = shared_cache
        self._holder = holder
        self._sink = sink
        self._should_stop = should_stop

    def open(self, batch_tokens: int) -> CachedTeacher:
        """The cached teacher, once no state is missing; out of memory halves the batch, and with it the kind."""
        while True:
            try:
                return self._open_at(batch_tokens)
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) and self._has_batch_of_several(batch_tokens)):
                    raise
            release_memory()
            batch_tokens //= 2
            message = f"the teacher runs on {batch_tokens} tokens at once, as more do not fit: its rounding changes"
            self._sink(Warned(code="teacher_batch_halved", message=message))

    def _open_at(self, batch_tokens: int) -> CachedTeacher:
        kind = shard_kind(self._source.digest, self._source.structure, self._source.precision, batch_tokens)
        found = FoundShards(self._shared_cache, self._holder, kind, self._samples, self._sink)
        found.scan()
        head = None if found.missing() else self._stored_head(found)
        if head is None:
            live = self._source.live()
            filling = Filling(live, head_digest(live.model), self._holder, batch_tokens, self._sink, self._should_stop)
            if not found.have_head(filling.head) or (found.missing() and not spot_check(live, found, batch_tokens)):
                self._sink(Warned(code="teacher_cache_rebuilt", message="the cached teacher was not this teacher"))
                found.discard_all()
            filling.fill(found)
            head = without_layers(live.model)
        return CachedTeacher(head, self._source.precision, found.map_states(), batch_tokens)

    def _has_batch_of_several(self, batch_tokens: int) -> bool:
        batches = plan_batches(tuple(self._samples.values()), batch_tokens, max_positions_of(self._source.structure))
        return any(batch.rows > 1 for batch in batches)

    def _stored_head(self, found: FoundShards) -> PreTrainedModel | None:
        """The head alone, where it is the one that all shards were computed for; None in doubt."""
        heads = found.heads()
        return self._source.head_only(heads.pop()) if len(heads) == 1 else None


def _reason(error: Exception) -> str:
    if isinstance(error, DiskFull):
        return "the disk is full" if error.args[0] == DiskFull.__doc__ else error.message
    number = error.errno if isinstance(error, OSError) else None
    return f"the cache cannot be used ({type(error).__name__ if number is None else errorcode.get(number, number)})"

"""A model that reads prompts packed and then decodes one token a slot, all slots at once: shapes that repeat."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.packing import Packing
from pocl.models.attention_span import attention_span
from pocl.models.heads import restrict_head
from pocl.models.packed import packed_attention
from pocl.models.rounding import difference_beyond_rounding
from pocl.models.slot_cache import SlotCache, bucket_of, decode_attention, decode_mask
from pocl.out_of_memory import is_out_of_memory

_PROBE_LENGTHS = (9, 4, 9)
"""Tokens of the rows that :func:`can_decode_in_slots` tries."""


class SlotDecoder:
    """Logits of the next tokens of rows in slots; for use in eval mode and without gradients."""

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int) -> None:
        """`max_length`: tokens of a row, prompt and answer."""
        self._model = model
        self._cache = SlotCache(model.config.get_text_config().num_hidden_layers, slots, bucket_of(max_length))

    def read(self, prompts: Sequence[Sequence[int]], slots: Tensor) -> Tensor:
        """Read packed prompts into `slots`, `[prompts]` int64: the logits of the token after each, `[prompts, V]`."""
        device = slots.device
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        packing = Packing.of([len(prompt) for prompt in prompts], device)
        starts = packing.cu_seqlens.long()
        slot_of_token = slots.repeat_interleave(starts.diff(), output_size=len(ids))
        self._cache.write_prompts(slot_of_token, packing.position_ids[0])
        last = starts[1:] - 1
        with restrict_head(self._model, lambda hidden: hidden[:, last]), packed_attention(self._model, packing):
            output = self._model(
                input_ids=ids[None], position_ids=packing.position_ids, past_key_values=self._cache, use_cache=True
            )
        logits: Tensor = output.logits[0]
        return logits

    def step(self, tokens: Tensor, positions: Tensor, bucket: int) -> Tensor:
        """Read one token a slot, and give the logits of the next, `[slots, V]`, in a :func:`decode_attention`.

        Args:
            tokens: `[slots]` int64.
            positions: Of these tokens, `[slots]` int64; their keys and values are written there.
            bucket: Above every position that counts.
        """
        self._cache.write_next(positions, bucket)
        output = self._model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=decode_mask(positions, bucket, self._model.dtype),
            position_ids=positions.unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def select(self, slots: Tensor) -> None:
        """Keep these slots alone, in this order."""
        self._cache.select(slots)


@torch.no_grad()
def can_decode_in_slots(model: PreTrainedModel) -> bool:
    """Whether rows in slots get the logits that each gets by itself, where they fit into the window of attention.

    The model is tried as it is: in eval mode, and with the weights that it has now. A family without position ids, with
    a recurrent state or capped scores cannot, and neither can a model that fails.
    """
    try:
        return _agrees(model)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A model may fail in any way; it is then answered padded, as all can be.
        return False


def fits_window(model: PreTrainedModel, max_length: int) -> bool:
    """Whether rows of up to `max_length` tokens, prompt and answer, are never longer than a sliding window."""
    span = attention_span(model)
    return span is None or max_length <= span


def _agrees(model: PreTrainedModel) -> bool:
    """Whether three random rows, read together but for their last token, get their own logits at the last two."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    lengths = list(_PROBE_LENGTHS)
    rows = [torch.randint(vocabulary, (length,), generator=generator).to(model.device) for length in lengths]
    expected = torch.stack([_last_logits(model, row) for row in rows], 1)
    decoder = SlotDecoder(model, len(rows), max(lengths))
    first = decoder.read([row[:-1].tolist() for row in rows], torch.arange(len(rows), device=model.device))
    positions = torch.tensor(lengths, device=model.device) - 1
    with decode_attention(model):
        second = decoder.step(torch.stack([row[-1] for row in rows]), positions, bucket_of(max(lengths)))
    is_exact = model.dtype == torch.float32
    return difference_beyond_rounding(torch.stack([first, second]), expected, is_exact=is_exact) is None


def _last_logits(model: PreTrainedModel, row: Tensor) -> Tensor:
    """The logits after the last two tokens of a row by itself, `[2, V]`."""
    positions = torch.arange(len(row), device=row.device)
    logits: Tensor = model(input_ids=row[None], position_ids=positions[None], use_cache=False).logits
    return logits[0, -2:].float()

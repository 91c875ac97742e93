"""A trial of a model whose family nobody has tried: does a padded batch give the logits of each text by itself?"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.errors import ModelUnsupported
from pocl.inspect.family_support import FAMILIES
from pocl.models.heads import response_logits
from pocl.models.rounding import difference_beyond_rounding

_LENGTHS = (11, 5)


@torch.no_grad()
def try_family(model: PreTrainedModel) -> None:
    """Try a model unless its family is in the table of those that were tried.

    Two texts are scored as training scores them, padded on the right, and each by itself. A model that attends to both
    sides is found by its beginning: it is scored by itself too, and what follows must not change it.

    Raises:
        ModelUnsupported: the logits differ, or the model fails.
    """
    family = str(model.config.model_type)
    if family in FAMILIES:
        return
    was_training = model.training
    model.train(False)
    try:
        difference = _difference(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelUnsupported(f"A {family} model cannot be run on a batch of texts; use another family.") from error
    finally:
        model.train(was_training)
    if difference is not None:
        raise ModelUnsupported(
            f"A {family} model gives a text in a padded batch logits that differ by {difference:.0%} from those of the "
            "text by itself, so it cannot be distilled; use another family."
        )


def _difference(model: PreTrainedModel) -> float | None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    longer, shorter = (torch.randint(vocabulary, (1, length), generator=generator) for length in _LENGTHS)
    padding = torch.zeros(1, longer.shape[1] - shorter.shape[1], dtype=torch.long)
    ids = torch.cat([longer, torch.cat([shorter, padding], 1)]).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, shorter.shape[1] :] = 0
    together = response_logits(model, ids, mask, mask.flatten().nonzero()[:, 0])
    beginning = longer[:, : shorter.shape[1]]
    alone = [_logits(model, text.to(model.device)) for text in (longer, shorter, beginning)]
    is_exact = model.dtype == torch.float32
    return difference_beyond_rounding(
        torch.cat([together, together[: shorter.shape[1]]]), torch.cat(alone), is_exact=is_exact
    )


def _logits(model: PreTrainedModel, text: Tensor) -> Tensor:
    """The logits of one text as plain transformers gives them, `[tokens, V]`."""
    logits: Tensor = model(input_ids=text, use_cache=False).logits
    return logits[0]

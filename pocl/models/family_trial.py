"""A trial of a model: does it run, and where nobody has tried its family, does a padded batch give the logits of each
text by itself?"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.errors import ModelUnsupported
from pocl.inspect.family_support import FAMILIES
from pocl.models.heads import response_logits
from pocl.models.model_files import explain
from pocl.models.rounding import difference_beyond_rounding
from pocl.out_of_memory import is_out_of_memory

_LENGTHS = (11, 5)
_SHORTEST = 2


@torch.no_grad()
def try_family(model: PreTrainedModel) -> None:
    """Run a model on a short text, and try it unless its family is in the table of those that were tried.

    To try it, two texts are scored as training scores them, padded on the right, and each by itself. A model that
    attends to both sides is found by its beginning: it is scored by itself too, and what follows must not change it.

    Raises:
        ModelUnsupported: the logits differ, or the model fails.
    """
    family = str(model.config.model_type)
    is_tried = family in FAMILIES
    was_training = model.training
    model.train(False)
    try:
        _run(model)
        difference = None if is_tried else _difference(model)
    # Whatever a forward pass raises over a config that makes a model and not one that runs.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _does_not_run(model, error) from error
    finally:
        model.train(was_training)
    if difference is not None:
        raise ModelUnsupported(
            f"A {family} model gives a text in a padded batch logits that differ by {difference:.0%} from those of the "
            "text by itself, so it cannot be distilled; use another family."
        )


def run_structure(model: PreTrainedModel) -> None:
    """Run a model of tensors without memory on a short text, as far as that needs none of their values.

    Raises:
        ModelUnsupported: its config makes a model that no text can be run through.
    """
    model.train(False)
    for dtype in (torch.float32, torch.bfloat16):
        # Products over groups of experts are defined for one of them alone where there are no values.
        torch.nn.Module.to(model, dtype)
        try:
            _run(model)
            return
        except Exception as error:  # noqa: BLE001 # Any class may come out of a model that no text fits.
            # What asks for a value that such a tensor lacks says so; everything else is as it would be with weights.
            if isinstance(error, NotImplementedError) or "meta" in str(error):
                return
            found = error
    raise _does_not_run(model, found) from found


def _does_not_run(model: PreTrainedModel, error: Exception) -> ModelUnsupported:
    family = str(model.config.model_type)
    advice = "correct its config.json" if family in FAMILIES else "use another family"
    return ModelUnsupported(f"The {family} model cannot be run on a text ({explain(error)}); {advice}.")


def _run(model: PreTrainedModel) -> None:
    """Run the model on a short text, which entries such as more experts for a token than there are make impossible."""
    _logits(model, torch.zeros(1, _SHORTEST, dtype=torch.long, device=model.device))


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

"""Names of stored tensors as the model has them: without the prefixes of wrappers that training left in them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from pocl.errors import ModelUnsupported

_WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Wrappers of torch.compile, FSDP and activation checkpointing, which may stand anywhere in a name."""
_LEADING = ("module.", "_forward_module.", "base_model.model.")
"""Wrappers of DistributedDataParallel, Lightning and peft around the whole model."""
_ADAPTER = re.compile(
    r"\.lora_[AB]\b|\.lora_embedding_[AB]\b|\.lora_magnitude|\.base_layer\.|\.modules_to_save\.|\.ia3_l"
)
_QUANTISED = {".qweight": "GPTQ or AWQ", ".absmax": "bitsandbytes", ".weight_packed": "compressed-tensors"}
_OTHER_PARTS = re.compile(
    r"^(?:model\.)?(?:visual|vision\w*|image\w*|audio\w*|multi_modal_projector|mm_projector|connector|embed_vision|"
    r"embed_audio|patch_merger)\b"
)
_TEXT_PARTS = ("model.language_model.", "language_model.", "model.text_model.", "text_model.")


@dataclass(frozen=True)
class WeightNames:
    """The tensors of a model that are loaded."""

    stored: dict[str, str] = field(repr=False)
    """Name in the model -> name in the files."""
    removed: tuple[str, ...]
    """Prefixes of wrappers that were taken off the names in the files."""

    @property
    def renamed(self) -> bool:
        """Whether any tensor has another name in the model than in the files, or is left out."""
        return any(name != stored for name, stored in self.stored.items())


def model_names(stored: Iterable[str], *, text_part: bool = False) -> WeightNames:
    """The names of the tensors in the model, out of those in its files.

    Args:
        text_part: The files hold a model of several modalities, of which the text model alone is loaded.

    Raises:
        ModelUnsupported: the tensors are those of an adapter, or quantised, or two of them get the same name.
    """
    names = {name: name for name in stored}
    _refuse_adapter(names)
    removed: list[str] = []
    for wrapper in _WITHIN:
        if any(wrapper in name for name in names.values()):
            names = {name: current.replace(wrapper, "") for name, current in names.items()}
            removed.append(wrapper)
    while prefix := _common_prefix(list(names.values())):
        names = {name: current.removeprefix(prefix) for name, current in names.items()}
        removed.append(prefix)
    if text_part:
        names = _text_names(names)
    by_name = {current: name for name, current in names.items()}
    if len(by_name) != len(names):
        raise ModelUnsupported(
            f"The model's weights have some tensors twice, with and without the prefix "
            f"{removed[0] if removed else ''!r}; save the model itself, not its wrapper, with save_pretrained()."
        )
    return WeightNames(by_name, tuple(removed))


def _common_prefix(names: list[str]) -> str | None:
    """A prefix that a wrapper gave to all names."""
    for prefix in _LEADING:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    # A module that holds the whole model as `model`: with the head of its own beside the layers.
    if names and all(name.startswith("model.") for name in names):
        inner = [name.removeprefix("model.") for name in names]
        if any(name.startswith(("lm_head.", "model.layers.", "model.embed_tokens.")) for name in inner):
            return "model."
    return None


def _refuse_adapter(names: Iterable[str]) -> None:
    for name in names:
        if _ADAPTER.search(name):
            raise ModelUnsupported(
                f"The model's weights hold an adapter ({name[:80]}); merge it into its base with peft's "
                "merge_and_unload() and save the result with save_pretrained()."
            )
        for suffix, method in _QUANTISED.items():
            if name.endswith(suffix):
                raise ModelUnsupported(
                    f"The model's weights are quantised by {method} ({name[:80]}), and its config.json does not say "
                    "how; give the model from which it was quantised."
                )


def _text_names(names: dict[str, str]) -> dict[str, str]:
    """The tensors of the text model alone, under its names."""
    part = next((part for part in _TEXT_PARTS if any(name.startswith(part) for name in names.values())), None)
    result = {}
    for stored, name in names.items():
        if name.startswith(("lm_head.", "model.lm_head.")):
            result[stored] = name.removeprefix("model.")
        elif part is not None and name.startswith(part):
            inner = name.removeprefix(part)
            result[stored] = inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"
        elif part is None and not _OTHER_PARTS.search(name):
            result[stored] = name
    return result

"""How far back the attention of a model reaches, by its config."""

from transformers import PreTrainedModel

_WINDOWS = (
    "sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size", "attention_window",
    "window_size", "local_attention",
)  # fmt: skip
"""Names that families have for the tokens that a layer attends to."""


def attention_span(model: PreTrainedModel) -> int | None:
    """The fewest tokens that a layer of `model` attends to; None where each attends to all before it."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if isinstance(types, list | tuple) and all(type_ == "full_attention" for type_ in types):
        return None
    spans = [getattr(config, name, None) for name in _WINDOWS]
    # 0 and -1 say that there is no window.
    return min((span for span in spans if isinstance(span, int) and span > 0), default=None)

"""How samples become text and token ids: templates and tokenizers, without torch and transformers."""

"""A tokenizer that `AutoTokenizer` reads by other rules is known, and told in the model card."""

import pytest
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2Config

from pocl.export.tokenizer_reading import TokenizerTrial, is_read_as_written, try_tokenizer
from pocl.models.random import byte_level_tokenizer


def tokenizer_with_own_rule() -> PreTrainedTokenizerBase:
    tokenizer = byte_level_tokenizer(64)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize(
    ("config", "tokenizer", "as_written"),
    [
        (LlamaConfig(), byte_level_tokenizer(64), True),
        (LlamaConfig(), tokenizer_with_own_rule(), True),
        # transformers builds a Qwen2Tokenizer out of the vocabulary, whatever tokenizer.json says.
        (Qwen2Config(), tokenizer_with_own_rule(), False),
    ],
    ids=["llama", "llama, rule of its own", "qwen2, rule of its own"],
)
def test_a_tokenizer_that_is_rebuilt_by_its_family_is_known(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, as_written: bool
) -> None:
    assert is_read_as_written(tokenizer, config) is as_written


def test_a_trial_is_made_again_only_for_another_tokenizer_or_config() -> None:
    tokenizer, config = byte_level_tokenizer(64), LlamaConfig()
    first = try_tokenizer(tokenizer, "digest", config, None)
    assert first.is_read_as_written
    # An outcome that no trial has: whoever returns it has not tried.
    untried = TokenizerTrial(inputs=first.inputs, is_read_as_written=False)
    assert try_tokenizer(tokenizer, "digest", config, untried) is untried
    assert try_tokenizer(tokenizer, "other", config, untried).is_read_as_written
    assert try_tokenizer(tokenizer, "digest", LlamaConfig(hidden_size=32), untried).is_read_as_written

"""A model directory as transformers objects: config and weights as the torch-free inspection reads them.

What transformers refuses of foreign files is the model's fault, whichever exception it raises.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    FineGrainedFP8Config,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.quantization_config import Mxfp4Config

from pocl.errors import ModelUnsupported, PoclError
from pocl.inspect.config import ModelConfig, read_config
from pocl.inspect.weights import StoredModel, read_weights
from pocl.models.heads import has_tied_embeddings

_MAX_CAUSE = 200
_PATH = re.compile(r"(?:/[\w.@+-]+){2,}/?")
_ADDRESS = re.compile(r"https?://\S+")


@contextmanager
def loading_foreign(path: Path, what: str) -> Iterator[None]:
    """While the context lasts, what code of transformers raises over the files of a model is :class:`ModelUnsupported`.

    Args:
        path: The model's directory or file.
        what: Names in a sentence what is loaded.

    Raises:
        ModelUnsupported: with the cause in words, without paths.
    """
    try:
        yield
    except (PoclError, MemoryError, torch.OutOfMemoryError):
        raise
    # Any class may come out of a constructor that is given foreign values: none of them is a fault of the service.
    except Exception as error:
        if "allocate memory" in str(error):
            # PyTorch reports that the host has no memory as a plain RuntimeError.
            raise MemoryError from error
        raise ModelUnsupported(f"{what} of {path.name} could not be loaded: {explain(error)}.") from error


def explain(error: Exception) -> str:
    """The first line of an exception's text, with its class, without paths and addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = _PATH.sub("...", _ADDRESS.sub("...", lines[0])) if lines else ""
    return f"{type(error).__name__}: {text[:_MAX_CAUSE]}".rstrip(".: ")


def config_in(directory: Path) -> PreTrainedConfig:
    """The config of a model directory.

    Raises:
        ModelUnsupported: with what to do about it.
    """
    return _build_config(read_config(directory), directory)


def model_in(directory: Path) -> PreTrainedModel:
    """The model of a directory, in the dtype that its weights are stored in.

    Raises:
        ModelUnsupported: with what to do about it.
    """
    config = read_config(directory)
    stored = read_weights(directory, text_part=config.whole_family is not None, quantised_by=config.quantised_by)
    options: dict[str, Any] = {}
    if config.quantised_by is not None:
        dequantise = FineGrainedFP8Config if config.quantised_by == "fp8" else Mxfp4Config
        options["quantization_config"] = dequantise(dequantize=True)
    with loading_foreign(directory, "The weights"):
        if stored.names.renamed:
            options["state_dict"] = _renamed_tensors(directory, stored)
        built = _build_config(config, directory)
        # The class itself takes tensors in place of a path, which AutoModelForCausalLM does not.
        model_class = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(built)])
        loaded = model_class.from_pretrained(
            None if stored.names.renamed else directory,
            config=built,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    # With `output_loading_info` it returns a pair, which its annotation does not say.
    model, loading_info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    _check_loaded(loading_info, directory)
    if config.quantised_by is not None:
        remove_quantiser(model)
    if stored.names.renamed and (directory / "generation_config.json").is_file():
        with loading_foreign(directory, "The generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    # Saved models must not disclose the paths of this machine.
    model.config.name_or_path = directory.name
    _correct_tie(model)
    return model


def _correct_tie(model: PreTrainedModel) -> None:
    """Have the config say whether the output head is the input embeddings: weights that differ were not tied.

    A config that says otherwise would tie them as soon as the model is built again, with other layers or dropout, or
    is read by a version of transformers that takes it at its word.
    """
    tied = has_tied_embeddings(model)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", tied) != tied:
            config.tie_word_embeddings = tied


def remove_quantiser(model: PreTrainedModel) -> None:
    """Let a model whose weights were made full be saved with full weights: the quantiser would pack them again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
        if name in vars(model):
            delattr(model, name)


def _check_loaded(loading_info: dict[str, Any], directory: Path) -> None:
    """Check that every weight came out of the files: transformers has filled the others with random numbers.

    Raises:
        ModelUnsupported: naming a weight.
    """
    if mismatched := sorted(loading_info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelUnsupported(
            f"{directory.name} has {len(mismatched)} weights of another shape than its config.json describes, among "
            f"them {name}: {list(stored)} instead of {list(expected)}."
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise ModelUnsupported(f"{directory.name} lacks {len(missing)} weights, among them {missing[0]}.")


def _build_config(config: ModelConfig, directory: Path) -> PreTrainedConfig:
    with loading_foreign(directory, "The config.json"):
        # The constructors change objects within what they are given.
        built: PreTrainedConfig = CONFIG_MAPPING[config.family].from_dict(deepcopy(config.entries))
    built.name_or_path = directory.name
    return built


def _renamed_tensors(directory: Path, stored: StoredModel) -> dict[str, torch.Tensor]:
    """The tensors that are loaded, under the names that the model has for them."""
    names_by_file: dict[str, list[str]] = {}
    for tensor in stored.tensors:
        names_by_file.setdefault(tensor.file, []).append(tensor.name)
    tensors: dict[str, torch.Tensor] = {}
    for file, names in names_by_file.items():
        with safe_open(directory / file, "pt") as opened:
            tensors |= {name: opened.get_tensor(stored.names.stored[name]) for name in names}
    return tensors

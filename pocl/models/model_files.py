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
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.quantization_config import Mxfp4Config

from pocl.errors import ModelUnsupported, PoclError
from pocl.inspect.config import ModelConfig, read_config
from pocl.inspect.facts import ModelWarning
from pocl.inspect.generation_config import read_generation_config
from pocl.inspect.weights import StoredModel, read_weights, unused_weights
from pocl.models.heads import has_tied_embeddings
from pocl.out_of_memory import is_out_of_memory

_MAX_CAUSE = 200
_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
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
    except PoclError:
        raise
    # Any class may come out of a constructor that is given foreign values: none of them is a fault of the service.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelUnsupported(f"{what} of {path.name} could not be loaded: {explain(error)}.") from error


def explain(error: Exception) -> str:
    """The first line of an exception's text, with its class, without paths and addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = _PATH.sub("...", _ADDRESS.sub("...", lines[0])) if lines else ""
    return f"{type(error).__name__}: {text[:_MAX_CAUSE]}".rstrip(".: ")


def model_in(directory: Path) -> tuple[PreTrainedModel, tuple[ModelWarning, ...]]:
    """The model of a directory, in the dtype that its weights are stored in; and a warning that names weights that it
    has no place for.

    Raises:
        ModelUnsupported: with what to do about it.
    """
    config = read_config(directory)
    stored = read_weights(directory, text_part=config.whole_family is not None, quantised_by=config.quantised_by)
    options = {"state_dict": _renamed_tensors(directory, stored)} if stored.names.renamed else {}
    source = None if stored.names.renamed else directory
    with loading_foreign(directory, "The weights"):
        model, loading_info = _load(_build_config(config, directory), config, source, **options)
    check_loaded(loading_info, directory)
    warnings = _unused_weights(loading_info, config)
    if config.quantised_by is not None:
        remove_quantiser(model)
    _set_generation_config(model, directory, config)
    # Saved models must not disclose the paths of this machine.
    model.config.name_or_path = directory.name
    _correct_tie(model)
    return model, warnings


def check_structure(directory: Path) -> tuple[PreTrainedModel, tuple[ModelWarning, ...]]:
    """Refuse a directory that :func:`model_in` would refuse for its config or for names and shapes of its weights.

    Nothing else is read of the weights: the model that is returned, as by that function, is built of tensors without
    memory.

    Raises:
        ModelUnsupported: with what to do about it.
    """
    config = read_config(directory)
    stored = read_weights(directory, text_part=config.whole_family is not None, quantised_by=config.quantised_by)
    built = _build_config(config, directory)
    model = structure_of(directory)
    if config.quantised_by is not None:
        # Their scales are multiplied in as they are read, of which tensors without memory have nothing.
        return model, ()
    tensors = {
        tensor.name: torch.empty(tensor.shape, dtype=_TORCH_DTYPES.get(tensor.dtype, torch.float32), device="meta")
        for tensor in (*stored.tensors, *stored.buffers)
    }
    with loading_foreign(directory, "The weights"):
        _, loading_info = _load(built, config, None, state_dict=tensors, device_map={"": "meta"})
    check_loaded(loading_info, directory)
    return model, _unused_weights(loading_info, config)


def structure_of(directory: Path) -> PreTrainedModel:
    """The model of a directory with its configs, whose weights have shapes and no memory (`meta` tensors).

    Raises:
        ModelUnsupported: transformers does not know the config.
    """
    config = read_config(directory)
    built = _build_config(config, directory)
    with loading_foreign(directory, "The model"), torch.device("meta"), no_init_weights():
        # The method carries no annotations in transformers.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(built)
    # Initialisation would tie weights, and it was left out.
    model.tie_weights()
    _set_generation_config(model, directory, config)
    return model


def _set_generation_config(model: PreTrainedModel, directory: Path, config: ModelConfig) -> None:
    """Give the model what its files say about generation, as far as it can be used."""
    read = read_generation_config(directory, config.entries, config.size("vocab_size"))
    generation = GenerationConfig()
    known = vars(generation).keys()
    for name, value in read.entries.items():
        if read.in_file or name in known:
            # The constructor refuses values of entries that nothing here uses.
            setattr(generation, name, value)
    model.generation_config = generation


def _load(
    built: PreTrainedConfig, config: ModelConfig, source: Path | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its weights, and what transformers says about those.

    Args:
        source: The directory with the weights; None where `options` hold them.
        options: Of :meth:`~transformers.PreTrainedModel.from_pretrained`.
    """
    if config.quantised_by is not None:
        dequantise = FineGrainedFP8Config if config.quantised_by == "fp8" else Mxfp4Config
        options["quantization_config"] = dequantise(dequantize=True)
    # The class itself takes tensors in place of a path, which AutoModelForCausalLM does not.
    model_class = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(built)])
    loaded = model_class.from_pretrained(
        source,
        config=built,
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        # That of the files is read apart, where odd entries are no reason to refuse a model.
        generation_config=GenerationConfig(),
        **options,
    )
    # With `output_loading_info` it returns a pair, which its annotation does not say.
    return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)


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


def check_loaded(loading_info: dict[str, Any], path: Path) -> None:
    """Check that every weight came out of the files: transformers has filled the others with random numbers.

    Args:
        loading_info: What transformers says of a model that it has loaded.
        path: The model's directory or file.

    Raises:
        ModelUnsupported: naming a weight.
    """
    if mismatched := sorted(loading_info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelUnsupported(
            f"{path.name} has {len(mismatched)} weights of another shape than its config describes, among them "
            f"{name}: {list(stored)} instead of {list(expected)}."
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise ModelUnsupported(f"{path.name} lacks {len(missing)} weights, among them {missing[0]}.")


def _unused_weights(loading_info: dict[str, Any], config: ModelConfig) -> tuple[ModelWarning, ...]:
    if config.whole_family is not None:
        # The other parts of the whole are said to be left out.
        return ()
    return unused_weights(loading_info["unexpected_keys"], config.size("num_hidden_layers"))


def _build_config(config: ModelConfig, directory: Path) -> PreTrainedConfig:
    with loading_foreign(directory, "The config.json"):
        config_class = CONFIG_MAPPING[config.family]
        # An entry named like a method would take its place.
        entries = {
            name: value for name, value in config.entries.items() if not callable(getattr(config_class, name, None))
        }
        # The constructors change objects within what they are given.
        built: PreTrainedConfig = config_class.from_dict(deepcopy(entries))
    built.name_or_path = directory.name
    return built


def _renamed_tensors(directory: Path, stored: StoredModel) -> dict[str, torch.Tensor]:
    """The tensors that are loaded, under the names that the model has for them."""
    names_by_file: dict[str, list[str]] = {}
    for tensor in (*stored.tensors, *stored.buffers):
        names_by_file.setdefault(tensor.file, []).append(tensor.name)
    tensors: dict[str, torch.Tensor] = {}
    for file, names in names_by_file.items():
        with safe_open(directory / file, "pt") as opened:
            tensors |= {name: opened.get_tensor(stored.names.stored[name]) for name in names}
    return tensors

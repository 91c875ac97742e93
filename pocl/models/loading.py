"""Loading models: from a directory, a GGUF file, the Hub, at random, or from layers of the teacher.

Weights are read from safetensors or GGUF only, and no code of a model repository is ever run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pocl.errors import CheckpointCorrupt, ModelNotFound, ModelUnsupported
from pocl.inspect import inspect_model, shared_vocabulary_size
from pocl.models.digest import model_digest
from pocl.models.gguf import load_gguf
from pocl.models.heads import output_head
from pocl.models.hub import HubClient, HuggingFaceHub, fetch
from pocl.models.layers import select_layers, with_dropout
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.spec import ModelRef, RandomModel, StudentRef

Origin = Mapping[str, str | None]


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """SHA-256 over config and weights as they are stored; of a student cut out of its teacher, before training."""
    origin: Origin
    """Provenance: `kind` and `name`; of the Hub also `revision` and `commit`; of a student cut out of its teacher also
    `layers`."""
    read_again: Callable[[], PreTrainedModel] | None = field(default=None, repr=False, compare=False)
    """Reads the model again with its weights as stored; None where `model` holds them unrounded."""


def load_teacher(
    ref: ModelRef, *, device: torch.device, dtype: torch.dtype, hub: HubClient | None = None
) -> LoadedModel:
    """A frozen model in eval mode on `device`, with its weights in `dtype`.

    Raises:
        ModelNotFound, ModelUnsupported: with what to do about it.
        DiskFull, EngineFailure: the files of the Hub could not be fetched.
    """
    loaded = _load(ref, hub)
    rounds = torch.promote_types(loaded.model.dtype, dtype) != dtype
    _move_and_cast(loaded.model, device, dtype)
    loaded.model.requires_grad_(False)
    loaded.model.train(False)
    return loaded if rounds else replace(loaded, read_again=None)


def load_student(
    ref: StudentRef,
    teacher: LoadedModel | None,
    *,
    device: torch.device,
    dropout: float | None = None,
    hub: HubClient | None = None,
) -> LoadedModel:
    """A model to be trained: in train mode, with fp32 weights of its own on `device`.

    Args:
        teacher: Needed for a student that is cut out of it; it is not changed.
        dropout: Probability for every dropout that the family has; None keeps the config's.

    Raises:
        ModelNotFound, ModelUnsupported: with what to do about it.
        SpecInvalid: the teacher lacks a layer that is asked for.
        DiskFull, EngineFailure: the files of the Hub could not be fetched.
    """
    if ref.from_teacher is None:
        loaded = _load(ref, hub)
    elif teacher is None:
        raise ModelNotFound("A student cut out of the teacher needs a teacher; name one.")
    else:
        loaded = _from_teacher(teacher, ref.from_teacher.layers)
    model = loaded.model if dropout is None else with_dropout(loaded.model, dropout)
    _move_and_cast(model, device, torch.float32)
    model.requires_grad_(True)
    model.train()
    return replace(loaded, model=model, read_again=None)


def shared_vocabulary(teacher: LoadedModel, student: LoadedModel) -> int:
    """The number of ids that mean the same to both models and that both heads score: those from 0 up to it.

    Raises:
        VocabularyMismatch: naming tokens that differ.
    """
    return shared_vocabulary_size(
        teacher.tokenizer.get_vocab(),
        _head_vocabulary(teacher),
        student.tokenizer.get_vocab(),
        _head_vocabulary(student),
    )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write what `from_pretrained` loads: config, safetensors, generation config, tokenizer and chat template.

    Equal models give equal bytes, and nothing in them says where the model was read from.
    """
    # One shard: a manifest lists it, and a student that can be trained here fits into one file.
    model.save_pretrained(directory, max_shard_size="1TB")
    tokenizer.save_pretrained(directory)
    # safetensors writes files that only their owner may read; the others follow the process's umask.
    mode = (directory / "config.json").stat().st_mode
    for weights in directory.glob("*.safetensors"):
        weights.chmod(mode)


def load_weights(model: PreTrainedModel, directory: Path) -> None:
    """Put the weights of a directory that :func:`save_model` wrote into `model`, bit for bit.

    Raises:
        CheckpointCorrupt: they are damaged, or not the weights of such a model.
    """
    try:
        stored = _model_in(directory)
        model.load_state_dict(stored.state_dict(), strict=True)
    except (ModelUnsupported, RuntimeError) as error:
        raise CheckpointCorrupt(f"The weights of {directory.name} are damaged or of a different model.") from error


def _load(ref: ModelRef, hub: HubClient | None) -> LoadedModel:
    if ref.path is not None:
        path = Path(ref.path)
        # Refuses pickles, remote code and damaged files before transformers sees them.
        inspect_model(path)
        return _read(path, {"kind": "path", "name": path.absolute().name})
    if ref.hub is not None:
        commit, directory = fetch(ref.hub, hub or HuggingFaceHub())
        inspect_model(directory)
        return _read(directory, {"kind": "hub", "name": ref.hub.repo, "revision": ref.hub.revision, "commit": commit})
    if ref.random is not None:
        return _random(ref.random)
    raise ModelNotFound("The engine reads files; the service resolves a checkpoint id to a path before it starts one.")


def _read(path: Path, origin: Origin) -> LoadedModel:
    if path.is_file():
        model, tokenizer = load_gguf(path)
        return LoadedModel(model, tokenizer, model_digest(model), origin, lambda: load_gguf(path)[0])
    model = _model_in(path)
    return LoadedModel(model, _tokenizer_in(path), model_digest(model), origin, lambda: _model_in(path))


def _random(ref: RandomModel) -> LoadedModel:
    model = random_model(ref)
    origin = {"kind": "random", "name": ref.family}
    tokenizer = byte_level_tokenizer(ref.max_positions)
    return LoadedModel(model, tokenizer, model_digest(model), origin, lambda: random_model(ref))


def _from_teacher(teacher: LoadedModel, layers: tuple[int, ...]) -> LoadedModel:
    # A teacher rounded to bf16 would start its student with rounded weights.
    unrounded = teacher.model if teacher.read_again is None else teacher.read_again()
    model = select_layers(unrounded, layers)
    origin = {"kind": "from_teacher", "name": teacher.origin["name"], "layers": ",".join(map(str, layers))}
    return LoadedModel(model, teacher.tokenizer, model_digest(model), origin)


def _model_in(directory: Path) -> PreTrainedModel:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise ModelUnsupported(f"{directory.name} could not be loaded as a causal language model.") from error
    # With `output_loading_info` it returns a pair, which its annotation does not say.
    model, loading_info = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    if missing := sorted(loading_info["missing_keys"]):
        # transformers has filled them with random numbers.
        raise ModelUnsupported(f"{directory.name} lacks {len(missing)} weights, among them {missing[0]}.")
    # Saved models must not disclose the paths of this machine.
    model.config.name_or_path = directory.name
    return model


def _tokenizer_in(directory: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnsupported(f"The tokenizer of {directory.name} could not be loaded.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelUnsupported(f"The tokenizer of {directory.name} could not be loaded.")
    return tokenizer


def _move_and_cast(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Move everything, and cast the weights alone: rotary frequencies in bf16 would blur far positions."""
    torch.nn.Module.to(model, device=device)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype


def _head_vocabulary(loaded: LoadedModel) -> int:
    return int(output_head(loaded.model).get_parameter("weight").shape[0])

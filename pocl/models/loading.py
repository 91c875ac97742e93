"""Loading models: from a directory, a GGUF file, the Hub, at random, or from layers of the teacher.

Weights are read from safetensors or GGUF only, and no code of a model repository is ever run.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.errors import CheckpointCorrupt, ModelNotFound, ModelUnsupported
from pocl.inspect import ModelWarning, SharedVocabulary, TokenLimits, compare_vocabularies, inspect_model
from pocl.inspect.licence import LICENCE_FIELDS, read_licence
from pocl.models.digest import DigestStore, head_digest, model_digest
from pocl.models.family_trial import try_family
from pocl.models.gguf import load_gguf
from pocl.models.heads import head_vocabulary_size, without_layers
from pocl.models.hub import HubClient, HuggingFaceHub, fetch
from pocl.models.layers import names_in_whole, rebuild_with_layers, select_layers, with_dropout
from pocl.models.model_files import loading_foreign, model_in, structure_of
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.models.rope_scaling import scale_rope_per_sample
from pocl.models.stored_tensors import first_dtype, read_head, read_tensors
from pocl.models.tokenizers import transformers_tokenizer
from pocl.out_of_memory import fit_or_refuse
from pocl.prompting.tokenizer_files import read_tokenizer
from pocl.spec import ModelRef, RandomModel, StudentRef

Origin = Mapping[str, str | None]
_UNREADABLE = (OSError, ValueError, KeyError, SafetensorError, RuntimeError, ModelUnsupported)
"""What reading a part of a model may raise; the whole is then read, and says what is wrong."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """SHA-256 over config and weights as they are stored; of a student cut out of its teacher, before training."""
    origin: Origin
    """Provenance: `kind` and `name`; of the Hub also `revision` and `commit`; of a student cut out of its teacher also
    `layers`; and `license`, `license_name` and `license_link` where the model's card states them."""
    read_again: Callable[[], PreTrainedModel] | None = field(default=None, repr=False, compare=False)
    """Reads the model again with its weights as stored; None where `model` holds them unrounded."""
    warnings: tuple[ModelWarning, ...] = ()
    """What is not used of its files, or used in another way than they say."""
    stored_dtype: torch.dtype = torch.float32
    """The format of its weights as they are stored; of a student cut out of its teacher, of the teacher's."""

    @property
    def structure(self) -> PreTrainedModel:
        """The model with its configs and the shapes of its weights."""
        return self.model

    def with_layers(self, layers: Sequence[int]) -> PreTrainedModel:
        """A model in fp32 with these layers, counted from 0, of the weights as stored.

        Raises:
            SpecInvalid: there is no such layer.
            ModelUnsupported: the layers cannot be told from the other parts of the model.
        """
        # A teacher rounded to bf16 would start its student with rounded weights.
        return select_layers(self.model if self.read_again is None else self.read_again(), layers)


class LazyModel:
    """A frozen model on disk of which only what is asked for is read."""

    def __init__(
        self,
        structure: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        digest: str,
        origin: Origin,
        *,
        load: Callable[[], LoadedModel],
        stored: "_StoredModel | None",
        warnings: tuple[ModelWarning, ...] = (),
        stored_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`load` reads the whole model; `stored` is the directory that parts are read from, None where only the whole
        can be.
        """
        self.structure = structure
        """The model with its configs and the shapes of its weights."""
        self.tokenizer = tokenizer
        self.digest = digest
        """SHA-256 over config and weights as they are stored."""
        self.origin = origin
        """Provenance, as of a :class:`LoadedModel`."""
        self.warnings = warnings
        """As of a :class:`LoadedModel`."""
        self.stored_dtype = stored_dtype
        """As of a :class:`LoadedModel`."""
        self._load = load
        self._stored = stored
        self._loaded: LoadedModel | None = None

    @classmethod
    def of(cls, loaded: LoadedModel, *, load: Callable[[], LoadedModel], stored: "_StoredModel | None") -> Self:
        """A model that has been read; `load` reads it again after a release."""
        model = cls(
            loaded.model,
            loaded.tokenizer,
            loaded.digest,
            loaded.origin,
            load=load,
            stored=stored,
            warnings=loaded.warnings,
            stored_dtype=loaded.stored_dtype,
        )
        model._loaded = loaded
        return model

    def whole(self) -> PreTrainedModel:
        """The whole model, frozen and in eval mode, on its device; read once until it is released.

        Raises:
            OutOfMemory: it does not fit into the memory of the device.
        """
        return self._whole().model

    def release(self) -> None:
        """Let go of the layers, which are read again if they are asked for."""
        if self._loaded is not None and self.structure is self._loaded.model:
            self.structure = without_layers(self.structure)
        self._loaded = None

    def head_only(self, digest: str) -> PreTrainedModel | None:
        """The model without its layers if its head has this digest; None in doubt."""
        if self._loaded is None and self._stored is not None:
            head = self._stored.head()
        else:
            head = without_layers(self.whole())
        return head if head is not None and head_digest(head) == digest else None

    def with_layers(self, layers: Sequence[int]) -> PreTrainedModel:
        """As :meth:`LoadedModel.with_layers`; only these layers are read where their digest is known."""
        student = None
        if self._stored is not None and self._loaded is None:
            student = self._stored.with_layers(self.structure, layers)
        if student is None:
            student = self._whole().with_layers(layers)
            if self._stored is not None:
                self._stored.keep_digest(layers, student)
        return student

    def _whole(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = fit_or_refuse(self._load, "The teacher")
        return self._loaded


@dataclass(frozen=True)
class _LocatedModel:
    """A model whose files are at hand and have been inspected."""

    path: Path
    origin: Origin
    warnings: tuple[ModelWarning, ...]


@dataclass(frozen=True)
class _StoredModel:
    """A directory with a model in safetensors, of which parts are read."""

    directory: Path
    digests: DigestStore
    device: torch.device
    dtype: torch.dtype

    def head(self) -> PreTrainedModel | None:
        with suppress(*_UNREADABLE):
            return read_head(self.directory, device=self.device, dtype=self.dtype)
        return None

    def with_layers(self, structure: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel | None:
        """The model with these layers alone; None unless it has the digest that was kept when the whole was read."""
        expected = self.digests.find(self._key(layers))
        if expected is None:
            return None
        with suppress(*_UNREADABLE):
            names = names_in_whole(structure, layers)
            tensors = read_tensors(structure, self.directory, names.values())
            if tensors is None:
                return None
            model = rebuild_with_layers(structure, layers, {new: tensors[old] for new, old in names.items()})
            return model if model_digest(model) == expected else None
        return None

    def keep_digest(self, layers: Sequence[int], model: PreTrainedModel) -> None:
        self.digests.keep(self._key(layers), model_digest(model))

    def _key(self, layers: Sequence[int]) -> str | None:
        return self.digests.key(self.directory, f"layers {list(layers)}")


def load_teacher(
    ref: ModelRef, *, device: torch.device, dtype: torch.dtype, hub: HubClient | None = None
) -> LoadedModel:
    """A frozen model in eval mode on `device`, with its weights in `dtype`.

    Raises:
        ModelNotFound, ModelUnsupported: with what to do about it.
        DiskFull, EngineFailure: the files of the Hub could not be fetched.
    """
    return _frozen(_load(ref, hub), device, dtype)


def load_lazily(
    ref: ModelRef, *, device: torch.device, dtype: torch.dtype, digests: DigestStore, hub: HubClient | None = None
) -> LazyModel:
    """As :func:`load_teacher`, but nothing is read beyond the config and the tokenizer where the digest is known.

    Raises:
        ModelNotFound, ModelUnsupported: with what to do about it.
        DiskFull, EngineFailure: the files of the Hub could not be fetched.
    """
    located = _locate(ref, hub)
    stored = None if located is None or located.path.is_file() else _StoredModel(located.path, digests, device, dtype)

    def load() -> LoadedModel:
        return _frozen(_load(ref, hub, digests, located), device, dtype)

    known = None if located is None or stored is None else digests.find(digests.key(located.path))
    if located is not None and known is not None:
        with suppress(*_UNREADABLE):
            structure = structure_of(located.path)
            configured = structure.config.dtype
            return LazyModel(
                structure,
                _tokenizer_in(located.path),
                known,
                located.origin,
                load=load,
                stored=stored,
                warnings=located.warnings,
                # As reading the whole takes it, where the config has none.
                stored_dtype=configured if isinstance(configured, torch.dtype) else first_dtype(located.path),
            )
    return LazyModel.of(load(), load=load, stored=stored)


def load_student(
    ref: StudentRef,
    teacher: LoadedModel | LazyModel | None,
    *,
    device: torch.device,
    dropout: float | None = None,
    hub: HubClient | None = None,
    digests: DigestStore | None = None,
) -> LoadedModel:
    """A model to be trained: in train mode, with fp32 weights of its own on `device`.

    Args:
        teacher: Needed for a student that is cut out of it; it is not changed.
        dropout: Probability for every dropout that the family has; None keeps the config's.
        digests: Where the digest of a model on disk is kept; None computes it.

    Raises:
        ModelNotFound, ModelUnsupported: with what to do about it.
        SpecInvalid: the teacher lacks a layer that is asked for.
        DiskFull, EngineFailure: the files of the Hub could not be fetched.
    """
    if ref.from_teacher is None:
        loaded = _load(ref, hub, digests)
    elif teacher is None:
        raise ModelNotFound("A student cut out of the teacher needs a teacher; name one.")
    else:
        loaded = _from_teacher(teacher, ref.from_teacher.layers)
    try_family(loaded.model)
    model = loaded.model if dropout is None else with_dropout(loaded.model, dropout)
    scale_rope_per_sample(model)
    _move_and_cast(model, device, torch.float32)
    model.requires_grad_(True)
    model.train()
    return replace(loaded, model=model, read_again=None)


def shared_vocabulary(teacher: LoadedModel | LazyModel, student: LoadedModel) -> SharedVocabulary:
    """How far the vocabularies of both models agree, and which ids both heads score.

    Raises:
        VocabularyMismatch: naming tokens that differ, where they are of different tokenizers.
    """
    return compare_vocabularies(
        teacher.tokenizer.get_vocab(),
        head_vocabulary_size(teacher.structure),
        student.tokenizer.get_vocab(),
        head_vocabulary_size(student.structure),
    )


def token_limits(models: Mapping[str, LoadedModel | LazyModel], conflicts: Mapping[int, str]) -> TokenLimits:
    """Which ids the samples of a run may use.

    Args:
        models: By their roles, as a sentence names them.
        conflicts: As of :class:`~pocl.inspect.SharedVocabulary`.
    """
    rows = {
        role: int(model.structure.get_input_embeddings().get_parameter("weight").shape[0])
        for role, model in models.items()
    }
    return TokenLimits(rows, conflicts)


def load_weights(model: PreTrainedModel, directory: Path) -> None:
    """Put the weights of a directory that a run has saved into `model`, bit for bit.

    Raises:
        CheckpointCorrupt: they are damaged, or not the weights of such a model.
    """
    try:
        stored, _ = model_in(directory)
        model.load_state_dict(stored.state_dict(), strict=True)
    except (ModelUnsupported, RuntimeError) as error:
        raise CheckpointCorrupt(f"The weights of {directory.name} are damaged or of a different model.") from error


def _locate(ref: ModelRef, hub: HubClient | None) -> _LocatedModel | None:
    """Where a model's files are, and their provenance; None of a random model."""
    if ref.path is not None:
        path = Path(ref.path)
        # Refuses pickles, remote code and damaged files before transformers sees them.
        origin: dict[str, str | None] = {"kind": "path", "name": path.absolute().name, **_licence(path)}
        return _LocatedModel(path, origin, inspect_model(path).warnings)
    if ref.hub is not None:
        commit, directory = fetch(ref.hub, hub or HuggingFaceHub())
        source = {"name": ref.hub.repo, "revision": ref.hub.revision, "commit": commit}
        return _LocatedModel(
            directory, {"kind": "hub", **source, **_licence(directory)}, inspect_model(directory).warnings
        )
    if ref.random is not None:
        return None
    raise ModelNotFound("The engine reads files; the service resolves a checkpoint id to a path before it starts one.")


def _licence(path: Path) -> dict[str, str]:
    return read_licence(path) if path.is_dir() else {}


def _load(
    ref: ModelRef,
    hub: HubClient | None,
    digests: DigestStore | None = None,
    located: _LocatedModel | None = None,
) -> LoadedModel:
    """Read a model, which was `located` before or is now."""
    if ref.random is not None:
        return _random(ref.random)
    located = located or _locate(ref, hub)
    assert located is not None  # Only a random model has no files.
    key = None if digests is None else digests.key(located.path)
    loaded = _read(located, None if digests is None else digests.find(key))
    # Files that changed while they were read have another key now.
    if digests is not None and digests.key(located.path) == key:
        digests.keep(key, loaded.digest)
    return loaded


def _read(located: _LocatedModel, digest: str | None) -> LoadedModel:
    """Read a model from disk; `digest` is its digest where that is known."""
    path, origin, warnings = located.path, located.origin, located.warnings
    if path.is_file():
        model, tokenizer = load_gguf(path)
        digest = digest or model_digest(model)
        return LoadedModel(model, tokenizer, digest, origin, lambda: load_gguf(path)[0], warnings, model.dtype)
    model, about_weights = model_in(path)
    # What was inspected before has warned of them already, where it knew.
    further = tuple(each for each in about_weights if each.code not in {known.code for known in warnings})
    digest = digest or model_digest(model)
    all_warnings = (*warnings, *further)
    return LoadedModel(model, _tokenizer_in(path), digest, origin, lambda: model_in(path)[0], all_warnings, model.dtype)


def _frozen(loaded: LoadedModel, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    rounds = torch.promote_types(loaded.model.dtype, dtype) != dtype
    scale_rope_per_sample(loaded.model)
    _move_and_cast(loaded.model, device, dtype)
    loaded.model.requires_grad_(False)
    loaded.model.train(False)
    try_family(loaded.model)
    return loaded if rounds else replace(loaded, read_again=None)


def _random(ref: RandomModel) -> LoadedModel:
    model = random_model(ref)
    origin = {"kind": "random", "name": ref.family}
    tokenizer = byte_level_tokenizer(ref.max_positions)
    return LoadedModel(model, tokenizer, model_digest(model), origin, lambda: random_model(ref))


def _from_teacher(teacher: LoadedModel | LazyModel, layers: tuple[int, ...]) -> LoadedModel:
    model = teacher.with_layers(layers)
    licence = {name: value for name, value in teacher.origin.items() if name in LICENCE_FIELDS}
    origin = {"kind": "from_teacher", "name": teacher.origin["name"], "layers": ",".join(map(str, layers)), **licence}
    return LoadedModel(model, teacher.tokenizer, model_digest(model), origin, stored_dtype=teacher.stored_dtype)


def _tokenizer_in(directory: Path) -> PreTrainedTokenizerBase:
    with loading_foreign(directory, "The tokenizer"):
        return transformers_tokenizer(read_tokenizer(directory))


def _move_and_cast(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Move everything, and cast the weights alone: rotary frequencies in bf16 would blur far positions."""
    torch.nn.Module.to(model, device=device)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype

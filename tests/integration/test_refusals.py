"""The dry run refuses what the engine would refuse, under the same code: nothing that it accepts fails while loading.

Each case goes through both doors. A new refusal about files, rows or settings is a line of `CASES`. What both take has
the same token ids, the same mask and the same counts on either side.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from domain.datasets.repository import add_dataset
from domain.db import Database
from domain.errors import ApiError
from domain.ids import new_id
from domain.jobs import model_checks
from domain.jobs.planning import JobPlan, check_data, plan_job
from domain.model_structure import StructureChecker
from domain.settings import Settings
from pocl.encoding_counts import EncodingCounts
from pocl.errors import PoclError, RunStopped
from pocl.events import DataEncoded, Event
from pocl.models import structure_process
from pocl.models.digest import DigestStore
from pocl.models.precision import choose_precision
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.prepare import encode_corpus, load_models
from pocl.preview.encoder import EncodingInputs
from pocl.read_data import read_data
from pocl.run import run
from pocl.spec import DistillationSpec, RandomModel, resolve
from tests.pocl.families import CONFIGS
from tests.support.encoders import unlimited_checker

pytestmark = pytest.mark.system

ROWS: Final[list[dict[str, Any]]] = [{"instruction": f"Count to {n}", "output": f"{n} it is"} for n in range(8)]
TALK: Final[dict[str, Any]] = {
    "messages": [{"role": role, "content": f"The {role} speaks"} for role in ("system", "user", "assistant")]
}
TEMPLATE: Final = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM: Final = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)


Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """Something that clients send."""

    name: str
    code: str | None
    """What both doors refuse it with; null where both take it."""
    data: dict[str, Any] = field(default_factory=dict)
    """Fields of the specification's `data`."""
    rows: Sequence[dict[str, Any]] = tuple(ROWS)
    held_out: Sequence[dict[str, Any]] = ()
    models: Change | None = None
    """Changes the directories of both models."""
    teacher: Change | None = None
    """Changes the directory of the teacher."""
    student: Change | None = None
    """Changes the directory of the student."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Further fields of the specification."""


def config(name: str, **changes: Any) -> Change:
    """Change fields of a JSON file; a value of `...` removes the field."""

    def change(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def chat_template(source: str) -> Change:
    return lambda model: (model / "chat_template.jinja").write_text(source)


def without(*names: str) -> Change:
    def change(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return change


def named_templates(*names: str) -> Change:
    def change(model: Path) -> None:
        without("chat_template.jinja")(model)
        templates = [{"name": name, "template": TEMPLATE} for name in names]
        config("tokenizer_config.json", chat_template=templates)(model)

    return change


def adapter(model: Path) -> None:
    without("config.json", "model.safetensors")(model)
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    (model / "adapter_model.safetensors").write_bytes(b"")


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def swap_tokens(one: str, other: str) -> Change:
    def change(model: Path) -> None:
        path = model / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(content))

    return change


def add_token(model: Path) -> None:
    """A token beyond the embeddings."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    new = {**content["added_tokens"][-1], "id": 400, "content": "<|new|>"}
    content["added_tokens"].append(new)
    path.write_text(json.dumps(content))


def rename_token(old: str, new: str) -> Change:
    """One more name for an id, as R1-Distill-Qwen has for some of Qwen 2.5."""

    def change(model: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (path := model / name).exists():
                path.write_text(path.read_text().replace(old, new))

    return change


def another_family(name: str) -> Change:
    """Another model, with the tokenizer of the first."""

    def change(model: Path) -> None:
        config = deepcopy(CONFIGS[name])
        for entry, value in {"vocab_size": 259, "max_position_embeddings": 256, "eos_token_id": 258}.items():
            setattr(config, entry, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(model: Path) -> None:
        path = model / "model.safetensors"
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})

    return change


def prefixed(prefix: str) -> Change:
    return weights(lambda all_: {prefix + name: tensor for name, tensor in all_.items()})


def both(*changes: Change) -> Change:
    def change(model: Path) -> None:
        for each in changes:
            each(model)

    return change


MTP_LAYER: Final = {"model.layers.3.eh_proj.weight": torch.ones(32, 64), "model.layers.3.enorm.weight": torch.ones(32)}
LOST: Final = "transformer.h.1.mlp.c_fc.weight"

CASES: Final = [
    # What both doors take.
    Case("plain", None),
    Case("named templates with a default", None, models=named_templates("default", "rag")),
    Case("a named template", None, {"template_name": "rag"}, models=named_templates("plain", "rag")),
    Case("template of one's own", None, {"chat_template": TEMPLATE, "template": "chat"}),
    Case("system message", None, rows=[TALK] * 8),
    Case("no template", None, models=without("chat_template.jinja")),
    Case("held-out rows", None, held_out=[ROWS[0], TALK]),
    Case("begin of sequence by the template", None, models=chat_template("{{ bos_token }}" + TEMPLATE)),
    Case(
        "begin of sequence and a cut",
        None,
        {"max_prompt_length": 20},
        models=chat_template("{{ bos_token }}" + TEMPLATE),
    ),
    Case(
        "generation prompt with a thought",
        None,
        models=chat_template(TEMPLATE.replace("assistant: {% e", "assistant: <think>\n{% e")),
    ),
    Case("no end of the last answer", None, models=chat_template(TEMPLATE.replace("{{ eos_token }}", ""))),
    Case("content in parts", None, models=chat_template(TEMPLATE.replace("m.content", "m.content[0].text"))),
    Case("date", None, models=chat_template("{{ strftime_now('%d %B %Y') }}" + TEMPLATE)),
    Case("system message of the specification", None, {"system": "Be brief."}),
    Case("all ends lost", None, {"max_length": 34, "max_prompt_length": 32}),
    # Templates.
    Case("named templates without a default", "spec_invalid", models=named_templates("plain", "rag")),
    Case("unknown named template", "spec_invalid", {"template_name": "no"}, models=named_templates("default")),
    Case("chat without a template", "spec_invalid", {"template": "chat"}, models=without("chat_template.jinja")),
    Case("template that cannot be parsed", "spec_invalid", models=chat_template("{% for m in messages %}")),
    Case("template that always raises", "spec_invalid", models=chat_template("{{ raise_exception('no') }}")),
    Case("template that raises TypeError", "spec_invalid", models=chat_template("{{ 1 + messages }}")),
    Case("template that shows nothing", "spec_invalid", models=chat_template("nothing")),
    Case(
        "template that asks for too much memory",
        "spec_invalid",
        models=chat_template("{{ ('x' * 10000000000) | length }}" + TEMPLATE),
    ),
    Case("template that refuses a row", "dataset_invalid", rows=[*ROWS, TALK], models=chat_template(NO_SYSTEM)),
    Case(
        "template that refuses a held-out row",
        "dataset_invalid",
        held_out=[TALK],
        models=chat_template(NO_SYSTEM),
    ),
    Case("unknown template variable", "spec_invalid", {"chat_template_kwargs": {"enable_thinking": False}}),
    # Data.
    Case("more stages than samples", "spec_invalid", rows=ROWS[:1]),
    Case("split without samples", "dataset_invalid", {"split": {"test": 0.0001}}),
    # By its share the split leaves 6 samples of 8, by the samples themselves 4.
    Case(
        "split that leaves too few samples",
        "spec_invalid",
        {"split": {"test": 0.25, "seed": 3}},
        spec={"curriculum": {"stages": 6}},
    ),
    # Tokenizers.
    Case("no tokenizer", "model_unsupported", models=without("tokenizer.json")),
    Case("broken tokenizer", "model_unsupported", models=lambda model: (model / "tokenizer.json").write_text("{")),
    Case("tokens with other ids that samples use", "vocabulary_mismatch", student=swap_tokens("a", "b")),
    Case("tokens with other ids that no sample uses", None, student=swap_tokens("~", "}")),
    Case("token without an embedding", "model_unsupported", {"system": "<|new|>"}, models=add_token),
    Case("token without an embedding that no sample uses", None, models=add_token),
    # Models.
    Case("adapter", "model_unsupported", teacher=adapter),
    Case("pickled weights", "model_unsupported", teacher=pickled),
    Case("no weights", "model_unsupported", student=without("model.safetensors")),
    Case("code of its own", "model_unsupported", teacher=config("config.json", auto_map={"AutoModel": "model.Model"})),
    Case("quantised", "model_unsupported", teacher=config("config.json", quantization_config={"quant_method": "gptq"})),
    Case("encoder", "model_unsupported", teacher=config("config.json", architectures=["BertForMaskedLM"])),
    Case("more layers than weights", "model_unsupported", student=config("config.json", num_hidden_layers=3)),
    Case("samples longer than positions", "spec_invalid", {"max_length": 4096}),
    Case(
        "config in odd types",
        None,
        models=config(
            "config.json",
            initializer_range=1,
            rms_norm_eps="1e-5",
            num_attention_heads=2.0,
            num_key_value_heads=None,
            pad_token_id=-1,
            eos_token_id=[258],
            _attn_implementation="flash_attention_2",
            architectures=None,
            dtype=None,
            do_sample=True,
            temperature=0.7,
            max_length=4096,
        ),
    ),
    Case("config with no number", "model_unsupported", student=config("config.json", rms_norm_eps=float("nan"))),
    Case(
        "rotary embeddings without their numbers",
        "model_unsupported",
        student=config("config.json", rope_parameters=..., rope_scaling={"type": "su", "factor": 2.0}),
    ),
    Case("names of a wrapper", None, student=prefixed("_orig_mod.")),
    Case(
        "names of an unknown wrapper",
        "model_unsupported",
        student=prefixed("policy."),
    ),
    Case(
        "layers for multi-token prediction",
        None,
        teacher=both(
            another_family("deepseek_v3"),
            weights(lambda all_: {**all_, **MTP_LAYER}),
            config("config.json", num_nextn_predict_layers=1),
        ),
    ),
    Case("recurrent student", None, student=another_family("rwkv")),
    Case(
        "lost weight of a family without a table",
        "model_unsupported",
        student=both(another_family("gpt2"), weights(lambda all_: {name: all_[name] for name in all_ if name != LOST})),
    ),
    Case("class of another tokenizer", None, models=config("tokenizer_config.json", tokenizer_class="GPT2Tokenizer")),
    Case("padding token that the vocabulary lacks", None, models=config("tokenizer_config.json", pad_token="[PAD]")),
    Case(
        "padding token that the vocabulary of the student lacks",
        None,
        student=config("tokenizer_config.json", pad_token="[PAD]"),
    ),
    Case(
        "template beside the processor alone",
        None,
        models=both(without("chat_template.jinja"), config("chat_template.json", chat_template=TEMPLATE)),
    ),
    Case("empty generation config", None, models=lambda model: (model / "generation_config.json").write_text("{}")),
    Case(
        "odd generation config",
        None,
        models=config(
            "generation_config.json", eos_token_id=[258, 99999], watermarking_config={"no": 1}, max_new_tokens=-1
        ),
    ),
    Case(
        "generation config that is no JSON",
        "model_unsupported",
        student=lambda model: (model / "generation_config.json").write_text("{"),
    ),
    Case("renamed token that samples use", "vocabulary_mismatch", student=rename_token("<|eos|>", "<|im_end|>")),
    Case("renamed token that no sample uses", None, student=rename_token("<|pad|>", "<|im_start|>")),
    Case("layer that the teacher lacks", "spec_invalid", spec={"student": {"from_teacher": {"layers": [0, 7]}}}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, which cases change copies of."""
    directory = tmp_path_factory.mktemp("models") / "whole"
    ref = RandomModel(layers=2, hidden_size=16, heads=2)
    random_model(ref).save_pretrained(directory)
    byte_level_tokenizer(ref.max_positions).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def database(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """The kind of the database is of no matter here."""
    file = shutil.copy(sqlite_template, tmp_path_factory.mktemp("database"))
    database = Database(f"sqlite:///{file}")
    yield database
    database.close()


class InProcess:
    """Builds models here: importing torch in a process of its own takes seconds, and one test of that is enough."""

    def call(self, request: Any, *, seconds: float) -> Any:  # noqa: ARG002 # The process that it stands for has it.
        return structure_process.answer(request)

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _structures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "_structures", StructureChecker(InProcess))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@dataclass(frozen=True)
class Doors:
    """The files of a case, and both ways to run it."""

    case: Case
    settings: Settings
    database: Database
    counts: dict[str, EncodingCounts] = field(default_factory=dict)
    """What the engine counted, by data set."""

    def dry_run(self) -> JobPlan:
        spec = self._spec(
            **{part: {"dataset": self._upload(rows)} for part, rows in self._rows().items()},
        )
        with self.database.transaction(write=False) as session:
            plan = plan_job(session, self.settings, spec, project="default")
        return check_data(unlimited_checker(), plan)

    def run_engine(self) -> None:
        """Load and encode, then stop."""
        run(self._engine_spec(), self.settings.work_root, self._hear, should_stop=lambda: True)

    def previewed_tokens(self) -> list[list[tuple[int, bool]]]:
        """The tokens of the training samples and whether they are trained on, as the preview shows them."""
        data = self._engine_spec().data.model_copy(update={"validation": None, "date": date(2000, 1, 1)})
        inputs = EncodingInputs(data, self.settings.model_roots[0] / "teacher")
        page = unlimited_checker().preview(inputs, skip=0, rows=len(self.case.rows))
        return [[(token.id, token.trained) for token in row.tokens] for row in page.rows]

    def trained_tokens(self) -> list[list[tuple[int, bool]]]:
        """The same, as the engine trains them."""
        spec = self._engine_spec().with_day(date(2000, 1, 1))
        cpu = torch.device("cpu")
        digests = DigestStore(self.settings.home / "digests")
        models = load_models(spec, device=cpu, precision=choose_precision("fp32", cpu), digests=digests)
        corpus = encode_corpus(spec.data, models, read_data(spec).splits.train, {})
        return [list(zip(each.input_ids, each.label_mask, strict=True)) for each in corpus.train.samples]

    def _hear(self, event: Event) -> None:
        if isinstance(event, DataEncoded):
            self.counts[event.part] = event.counts

    def _engine_spec(self) -> DistillationSpec:
        spec = self._spec(**{part: {"path": str(self._write(rows, part))} for part, rows in self._rows().items()})
        for role in ("teacher", "student"):
            if "path" in spec[role]:
                spec[role] = {"path": str(self.settings.model_roots[0] / role)}
        return resolve(spec)

    def _rows(self) -> dict[str, Sequence[dict[str, Any]]]:
        return {"train": self.case.rows, **({"validation": self.case.held_out} if self.case.held_out else {})}

    def _spec(self, **parts: dict[str, str]) -> dict[str, Any]:
        return {
            "preset": "quick",
            "teacher": {"path": "teacher"},
            "student": {"path": "student"},
            "curriculum": {"stages": 2},
            **self.case.spec,
            "data": {"max_length": 128, "max_prompt_length": 96, **parts, **self.case.data},
        }

    def _write(self, rows: Sequence[dict[str, Any]], part: str) -> Path:
        path = self.settings.home / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _upload(self, rows: Sequence[dict[str, Any]]) -> str:
        dataset = new_id("ds")
        key = f"datasets/{dataset}.jsonl"
        stored = self.settings.artifact_root / key
        stored.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._write(rows, "upload"), stored)
        with self.database.transaction(write=True) as session:
            return add_dataset(
                session,
                project="default",
                name="rows",
                rows=len(rows),
                size_bytes=stored.stat().st_size,
                sha256=dataset,
                store_key=key,
                dataset_id=dataset,
            ).id


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_doors_refuse_alike(case: Case, model: Path, settings: Settings, database: Database) -> None:
    for role, own_change in (("teacher", case.teacher), ("student", case.student)):
        directory = settings.model_roots[0] / role
        shutil.copytree(model, directory)
        for change in (case.models, own_change):
            if change is not None:
                change(directory)
    doors = Doors(case, settings, database)
    if case.code is None:
        plan = doors.dry_run()
        with pytest.raises(RunStopped):
            doors.run_engine()
        assert doors.counts == {figures.part: figures.counts for figures in plan.data}
        assert doors.previewed_tokens() == doors.trained_tokens()
        return
    with pytest.raises(ApiError) as refused:
        doors.dry_run()
    assert (refused.value.code, refused.value.status) == (case.code, 422)
    assert refused.value.field_errors
    with pytest.raises(PoclError) as ended:
        doors.run_engine()
    assert (ended.value.code, ended.value.fault) == (case.code, "user")

"""GGUF files of a model: every weight, token and template of it is there, as the readers of others see it."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pocl.__main__ import main
from pocl.errors import GgufUnsupported, SpecInvalid
from pocl.export.gguf import GgufSource, check_model, file_name
from pocl.export.gguf.modelfile import frames_of
from pocl.export.model_card import Progress
from pocl.export.model_directory import save_model
from pocl.export.student import StudentExport
from pocl.export.tokenizer_reading import PROBE_TEXTS
from pocl.inspect import check_gguf_family
from pocl.models.gguf import load_gguf
from pocl.prompting.template_process import answer
from pocl.storage.manifest import new_directory, verify
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer
from tests.pocl.export.gguf_models import CASES, LLAMA3_ROPE, SPECIAL, model_directory, tokenizer_like

pytestmark = pytest.mark.system
Directories = dict[str, Path]
_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", (32,))])
"""A block of Q8_0 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """The models by case, each with its GGUF files in `gguf` below it."""
    made = {}
    for name in CASES:
        made[name] = model_directory(name, tmp_path_factory.mktemp(name) / "model")
        (made[name] / "gguf").mkdir()
        GgufSource.open(made[name]).write(made[name] / "gguf", ["q8_0", "f16", "f32"])
    return made


def reader(directory: Path, format_: str) -> GGUFReader:
    return GGUFReader(directory / "gguf" / f"model-{format_}.gguf")


def field(read: GGUFReader, key: str) -> Any:
    found = read.get_field(key)
    return None if found is None else found.contents()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(40)[None] * 7 % 300).logits
    return result


def rounded(directory: Path, round_matrix: Any) -> torch.Tensor:
    """The logits of the model whose matrices went through `round_matrix`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(round_matrix(parameter))
    return logits(model)


def q8_0(matrix: torch.Tensor) -> torch.Tensor:
    """Blocks of 32 in a row are multiples of a scale: the 127th part of their largest value, in fp16."""
    blocks = matrix.reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    values = torch.where(scale > 0, blocks / scale, 0).round()
    return (values * scale.half().float()).reshape(matrix.shape)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("format_", ["f32", "f16", "q8_0"])
def test_transformers_computes_from_the_file_what_the_rounded_model_gives(
    directories: Directories, name: str, format_: str
) -> None:
    rounding = {"f32": lambda matrix: matrix, "f16": lambda matrix: matrix.half().float(), "q8_0": q8_0}[format_]
    model, _ = load_gguf(directories[name] / "gguf" / f"model-{format_}.gguf")
    read, expected = logits(model.float()), rounded(directories[name], rounding)
    torch.testing.assert_close(read, expected, rtol=0, atol=2e-3 if format_ == "q8_0" else 2e-4)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_weight_is_there_once_and_exact(directories: Directories, name: str) -> None:
    own = load_file(directories[name] / "model.safetensors")
    values = {
        each.name: np.array(each.data).reshape(each.shape[::-1]) for each in reader(directories[name], "f32").tensors
    }
    assert sum(each.size for each in values.values()) == sum(each.numel() for each in own.values())
    # Rows of queries and keys are in another order.
    ours = sorted(np.sort(each.numpy(), axis=None).tobytes() for each in own.values())
    assert sorted(np.sort(each, axis=None).tobytes() for each in values.values()) == ours
    assert np.array_equal(values["token_embd.weight"], own["model.embed_tokens.weight"].numpy())
    assert ("output.weight" in values) == (not AutoConfig.from_pretrained(directories[name]).tie_word_embeddings)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_heads_are_rotated_in_neighbouring_pairs(name: str, tmp_path: Path) -> None:
    changes = {"attention_bias": True} if name == "llama" else {}
    directory = model_directory(name, tmp_path / "model", **changes)
    GgufSource.open(directory).write(tmp_path, ["f32"])
    stored = {each.name: np.array(each.data) for each in GGUFReader(tmp_path / "model-f32.gguf").tensors}
    own = load_file(directory / "model.safetensors")
    config = AutoConfig.from_pretrained(directory)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for projection, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        for kind in ("weight", *(["bias"] if changes else [])):
            ours = own[f"model.layers.1.self_attn.{projection}.{kind}"].numpy()
            for row in range(len(ours)):
                head, element = divmod(row, size)
                # Element i of the first half of a head is paired with element i of the second.
                half, index = divmod(element, size // 2)
                rows = stored[f"blk.1.{theirs}.{kind}"].reshape(ours.shape)
                assert np.array_equal(rows[head * size + 2 * index + half], ours[row])


def test_q8_0_is_as_near_as_its_scale_allows(directories: Directories) -> None:
    own = load_file(directories["qwen2"] / "model.safetensors")
    read = reader(directories["qwen2"], "q8_0")
    matrices = [each for each in read.tensors if each.tensor_type == GGMLQuantizationType.Q8_0]
    assert len(matrices) == sum(each.dim() > 1 for each in own.values())
    (embedding,) = [each for each in matrices if each.name == "token_embd.weight"]
    blocks = np.frombuffer(np.array(embedding.data).tobytes(), dtype=_BLOCK)
    exact = own["model.embed_tokens.weight"].numpy().reshape(-1, 32)
    scale = np.abs(exact).max(axis=1, keepdims=True) / 127
    stored = blocks["values"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    # Half a step, and 127 times what the rounding of the scale to fp16 moves it.
    assert np.all(np.abs(stored - exact) <= scale / 2 + 127 * scale * 2**-11 + 1e-7)


@pytest.mark.parametrize("format_", ["f16", "q8_0"])
def test_vectors_stay_in_fp32_and_odd_rows_in_fp16(format_: str, tmp_path: Path) -> None:
    directory = model_directory("llama", tmp_path / "model", intermediate_size=88)
    GgufSource.open(directory).write(tmp_path, [format_])  # type: ignore[list-item] # a parameter is any text
    for tensor in GGUFReader(tmp_path / f"model-{format_}.gguf").tensors:
        wanted = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}[format_]
        if len(tensor.shape) == 1:
            wanted = GGMLQuantizationType.F32
        elif tensor.shape[0] % 32:
            wanted = GGMLQuantizationType.F16
        assert tensor.tensor_type == wanted, tensor.name


# --- The tokenizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CASES))
def test_tokens_ends_and_template_are_those_of_the_model(directories: Directories, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directories[name])
    own = tokenizer_like(CASES[name].split, begins=CASES[name].begins)
    read = reader(directories[name], "q8_0")
    tokens, kinds = field(read, "tokenizer.ggml.tokens"), field(read, "tokenizer.ggml.token_type")
    assert {token: id_ for id_, token in enumerate(tokens[: len(own)])} == own.get_vocab()
    assert tokens[len(own) :] == [f"[PAD{id_}]" for id_ in range(len(own), len(own) + 5)]
    special = [id_ for id_, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert special == [own.convert_tokens_to_ids(token) for token in SPECIAL]
    assert kinds[own.convert_tokens_to_ids("<think>")] == gguf.TokenType.USER_DEFINED
    assert kinds[len(own) :] == [gguf.TokenType.UNUSED] * 5
    named = {key: field(read, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")}
    assert {key: tokens[id_] for key, id_ in named.items()} == {
        "bos": "<s>",
        "eos": "<|endoftext|>",
        "eot": "<|im_end|>",
    }
    assert field(read, "tokenizer.ggml.add_bos_token") is CASES[name].begins
    assert field(read, "tokenizer.ggml.pre") == CASES[name].split
    assert field(read, "tokenizer.chat_template") == tokenizer.chat_template == CHATML


@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=20)
@given(texts=st.lists(st.text(max_size=30) | st.sampled_from(PROBE_TEXTS), min_size=1, max_size=5))
def test_a_text_has_the_same_tokens(directories: Directories, name: str, texts: list[str]) -> None:
    if name not in tokenizers_read:
        read = load_gguf(directories[name] / "gguf" / "model-q8_0.gguf")[1]
        tokenizers_read[name] = tokenizer_like(CASES[name].split, begins=CASES[name].begins), read
    own, read = tokenizers_read[name]
    for text in texts:
        assert read(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]


tokenizers_read: dict[str, tuple[Any, Any]] = {}


# --- Rotary embeddings ------------------------------------------------------------------------------------


def test_frequencies_of_llama_3_are_divided_as_transformers_does(tmp_path: Path) -> None:
    directory = model_directory("llama", tmp_path / "model", rope_parameters=LLAMA3_ROPE, head_dim=64)
    GgufSource.open(directory).write(tmp_path, ["f32"])
    (stored,) = [each for each in GGUFReader(tmp_path / "model-f32.gguf").tensors if each.name == "rope_freqs.weight"]
    config = AutoConfig.from_pretrained(directory)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(torch.from_numpy(np.array(stored.data)), plain / scaled)
    assert len(set(np.array(stored.data).round(3))) > 2


def test_scaling_and_windows_are_written_or_told(tmp_path: Path) -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    directory = model_directory("qwen2", tmp_path / "yarn", rope_parameters=scaled)
    GgufSource.open(directory).write(tmp_path, ["f32"])
    read = GGUFReader(tmp_path / "model-f32.gguf")
    keys = ("type", "factor", "original_context_length")
    assert [field(read, f"qwen2.rope.scaling.{key}") for key in keys] == ["yarn", 4.0, 64]
    windowed = GgufSource.open(model_directory("mistral", tmp_path / "window", sliding_window=32))
    assert windowed.architecture.context_length == 32
    assert "beyond 32" in windowed.write(tmp_path, ["f16"]).notes[0]


# --- What cannot be written -------------------------------------------------------------------------------


def refusal(directory: Path) -> str:
    with pytest.raises(GgufUnsupported) as raised:
        GgufSource.open(directory).write(directory, ["f16"])
    assert str(directory) not in raised.value.message
    assert not list(directory.glob("*.gguf")) or "fp16" in raised.value.message
    return raised.value.message


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=500))
    save_model(model, byte_tokenizer(), tmp_path)
    assert "'gpt2'" in refusal(tmp_path)
    assert "llama, mistral, qwen2, qwen3" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("qwen3", {"attention_bias": True}, "q_proj.bias"),
    ],
)
def test_what_llama_cpp_lacks_is_named(name: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert named in refusal(model_directory(name, tmp_path / "model", **changes)).replace("k_proj", "q_proj")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (lambda text: text.replace('"byte_fallback":false', '"byte_fallback":true'), "fallback to bytes"),
        (lambda text: text.replace('"individual_digits":true', '"individual_digits":false'), "splits or normalises"),
        (lambda text: text.replace('"normalizer":null', '"normalizer":{"type":"Lowercase"}'), "splits or normalises"),
    ],
    ids=["sentencepiece", "split", "normaliser"],
)
def test_a_tokenizer_of_other_rules_is_refused(changed: Any, named: str, tmp_path: Path) -> None:
    file = model_directory("smollm", tmp_path / "model") / "tokenizer.json"
    text = re.sub(r'": +', '":', file.read_text(encoding="utf-8"))
    file.write_text(changed(text), encoding="utf-8")
    assert changed(text) != text
    assert named in refusal(file.parent)


def test_a_weight_without_a_value_in_fp16_is_refused(tmp_path: Path) -> None:
    directory = model_directory("qwen2", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    save_model(model, tokenizer_like("qwen2"), directory)
    assert "mlp.up_proj" in refusal(directory)
    assert GgufSource.open(directory).write(tmp_path, ["f32", "q8_0"]).files[:2] == (
        "model-f32.gguf",
        "model-q8_0.gguf",
    )


# --- Ollama's Modelfile -----------------------------------------------------------------------------------


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Fill in the part of Go's template language that a Modelfile uses."""
    parts = re.split(r"(\{\{ .*? \}\})", template.replace("{{ else if", "{{ elif"), flags=re.DOTALL)
    code, depth = ["out = []"], 0
    for part in parts:
        action = part[3:-3] if part.startswith("{{ ") else None
        if action is None:
            code.append("    " * depth + f"out.append({part!r})")
        elif action == "end":
            depth -= 1
        elif action.startswith('"'):
            code.append("    " * depth + f"out.append({action})")
        elif action == ".Content":
            code.append("    " * depth + "out.append(message['content'])")
        else:
            depth -= action.startswith("elif")
            condition = re.sub(r'eq \.Role (".*?")', r"message['role'] == \1", action)
            condition = condition.replace("range .Messages", "for message in messages").replace(".System", "system")
            code.append("    " * depth + condition + ":")
            depth += 1
            code.append("    " * depth + "pass")
    system = next((each["content"] for each in messages if each["role"] == "system"), "")
    scope: dict[str, Any] = {"messages": messages, "system": system}
    exec("\n".join(code), scope)
    return "".join(scope["out"])


SYSTEM_OF_ITS_OWN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe \"kind\".<|im_end|>\n{% endif %}" + CHATML
)
BEGINNING = "{{ bos_token }}" + CHATML.replace("\n{% endfor", "{% endfor")


@pytest.mark.parametrize("template", [CHATML, SYSTEM_OF_ITS_OWN, BEGINNING], ids=["chatml", "system", "begin"])
@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=5), has_system=st.booleans())
def test_the_template_of_the_modelfile_gives_the_text_of_the_chat_template(
    template: str, contents: list[str], has_system: bool
) -> None:
    frames = frames_of(template, {"bos_token": "<s>"}, SPECIAL, answer)
    assert frames is not None
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    if has_system:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    tokenizer = byte_tokenizer(template)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert go(frames.in_go(), messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y') }}" + CHATML,
        CHATML.replace("{{ message.content }}", "{{ message.content | upper }}"),
        "{% for message in messages %}{{ loop.index }} {{ message.content }}\n{% endfor %}",
        "{{ raise_exception('none') }}",
    ],
    ids=["date", "changed", "numbered", "refuses"],
)
def test_a_template_that_does_more_is_not_guessed_at(template: str) -> None:
    assert frames_of(template, {}, SPECIAL, answer) is None


def test_the_modelfile_stops_where_the_student_was_taught_to_stop(directories: Directories) -> None:
    lines = (directories["smollm"] / "gguf" / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./model-q8_0.gguf"
    assert [line for line in lines if line.startswith("PARAMETER stop")] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]
    assert "PARAMETER num_ctx 256" in lines
    assert "PARAMETER temperature 0" in lines
    assert any(line.startswith('TEMPLATE """') for line in lines)


# --- Whole exports ----------------------------------------------------------------------------------------


def test_equal_models_give_equal_bytes(directories: Directories, tmp_path: Path) -> None:
    GgufSource.open(directories["qwen3"]).write(tmp_path, ["q8_0"])
    for name in ("model-q8_0.gguf", "Modelfile"):
        both = [(place / name).read_bytes() for place in (tmp_path, directories["qwen3"] / "gguf")]
        assert hashlib.sha256(both[0]).digest() == hashlib.sha256(both[1]).digest()


def test_student_leaves_a_run_with_the_files_that_its_manifest_lists(tmp_path: Path) -> None:
    directory = model_directory("smollm", tmp_path / "read")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    export = StudentExport(AutoTokenizer.from_pretrained(directory), dtype=torch.bfloat16)
    progress = Progress(step=1, finished_stages=(), evaluations=())
    with new_directory(tmp_path / "state") as scratch:
        export.write(model, scratch, progress)
    export.link(model, tmp_path / "state", tmp_path / "final", progress, ["q8_0"])
    listed = {file.path for file in verify(tmp_path / "final").files}
    assert {"model.safetensors", "model-q8_0.gguf", "Modelfile"} <= listed
    # Of the weights that were trained, and not of those that were rounded for `model.safetensors`.
    read, _ = load_gguf(tmp_path / "final" / "model-q8_0.gguf")
    torch.testing.assert_close(logits(read.float()), rounded(tmp_path / "state", q8_0), rtol=0, atol=2e-3)


def test_what_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=500))
    with pytest.raises(GgufUnsupported, match="gpt2"):
        check_model(model, byte_tokenizer())
    with pytest.raises(SpecInvalid) as refused:
        check_gguf_family("gpt2")
    assert [(each.pointer, each.code) for each in refused.value.field_errors] == [("/export/gguf", "gguf_unsupported")]
    directory = model_directory("qwen2", tmp_path / "model")
    check_model(AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory))


def test_command_writes_the_files_or_says_what_is_missing(
    directories: Directories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = directories["qwen2"], tmp_path / "out"
    assert main(["export-gguf", str(source), str(target), "--format", "f16", "--format", "q8_0"]) == 0
    assert {each.name for each in target.iterdir()} == {
        *(file_name("f16"), file_name("q8_0"), "Modelfile", "manifest.json"),
    }
    assert (target / file_name("f16")).read_bytes() == (source / "gguf" / "model-f16.gguf").read_bytes()
    capsys.readouterr()
    assert main(["export-gguf", str(tmp_path / "nothing"), str(tmp_path / "other")]) == 2
    assert "model_not_found" in capsys.readouterr().err


def test_command_answers_programs_in_json(tmp_path: Path) -> None:
    # A process of its own: it keeps standard output for its answer. What it writes is read in tests/worker/exports.
    command = [sys.executable, "-m", "pocl", "export-gguf", str(tmp_path / "nothing"), str(tmp_path / "out"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    error = json.loads(ended.stdout)["error"]
    assert (ended.returncode, error["code"], error["fault"]) == (2, "model_not_found", "user")
    assert "model_not_found" in ended.stderr

"""What is remembered of models, and until when."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from domain.model_facts import ModelFactsCache
from pocl.inspect import ModelFacts, inspect_model
from tests.support.requests import write_model


class CountingInspector:
    """Inspects models, and notes their names."""

    def __init__(self, tokens: int = 2) -> None:
        self.inspected: list[str] = []
        self._tokens = tokens

    def __call__(self, path: Path) -> ModelFacts:
        self.inspected.append(path.name)
        return replace(inspect_model(path), tokens={str(number): number for number in range(self._tokens)})


def test_a_model_is_inspected_once_until_one_of_its_files_changes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tokens={"a": 0, "b": 1})
    inspector = CountingInspector()
    cache = ModelFactsCache(inspector)
    with ThreadPoolExecutor(8) as pool:
        facts = list(pool.map(cache.facts_of, [model] * 40))
    assert inspector.inspected == ["model"]
    assert all(each is facts[0] for each in facts)
    config = model / "config.json"
    state = config.stat()
    config.write_text(config.read_text().replace('"num_attention_heads": 1', '"num_attention_heads": 2'))
    # As a copy that keeps the time has it.
    os.utime(config, ns=(state.st_atime_ns, state.st_mtime_ns))
    cache.facts_of(model)
    assert inspector.inspected == ["model"] * 2


def test_as_many_models_are_remembered_as_their_vocabularies_allow(tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, tokens={"a": 0, "b": 1}) for name in "abc"]
    inspector = CountingInspector(tokens=4)
    cache = ModelFactsCache(inspector, max_tokens=8)
    for model in (*models[:2], *models[:2], models[2], models[1], models[0]):
        cache.facts_of(model)
    assert inspector.inspected == ["a", "b", "c", "a"]
    inspector.inspected.clear()
    large = ModelFactsCache(inspector, max_tokens=1)
    for _ in range(2):
        large.facts_of(models[0])
    assert inspector.inspected == ["a"]

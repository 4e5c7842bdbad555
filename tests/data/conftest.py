"""Small prepared folders and configurations for the data tests. No network, no standard library corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from megatron_q3n.config import RunConfig, validate
from megatron_q3n.data.prepare import Preparation, prepare
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe

# a deadline per example would only measure what else the machine is doing
settings.register_profile("data", deadline=None)
settings.load_profile("data")

TEXTS = [f"def f{i}(x):\n    '''Return {i}.'''\n\n    return x + {i}\n" * (1 + i % 4) for i in range(40)]

MakeData = Callable[..., Path]
MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture
def make_data(tmp_path: Path, tokenizer_path: Path) -> MakeData:
    """Return a function that prepares texts into a folder below tmp_path."""

    def make(name: str, texts: list[str], **settings: Any) -> Path:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = {"tokenizer": tokenizer_path, "workers": 1} | settings
        prepare(Preparation(inputs=(str(source),), output=tmp_path / name, **options))
        return tmp_path / name

    return make


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Return a function that makes the configuration of a small run over prepared folders."""

    def make(train: list[Path] | list[dict[str, Any]], validation: list[Path], **sections: Any) -> RunConfig:
        blend = [part if isinstance(part, dict) else {"path": str(part)} for part in train]
        data = {
            "source": "blend",
            "cache_dir": str(tmp_path / "cache"),
            "train": blend,
            "validation": [{"path": str(path)} for path in validation],
        }
        training = {"steps": 6, "sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 8}
        return validate(
            {
                "data": data | sections.get("data", {}),
                "training": training | sections.get("training", {}),
                "schedule": {"warmup_steps": 1},
                "validation": {"batches": 2},
                "model": sections.get("model", {}),
            }
        )

    return make

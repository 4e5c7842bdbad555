"""Rows of files and tables: one reader for conversations and prompts, and one message for every bad line."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import PromptSource
from megatron_q3n.data.chat_template import PLAIN, ChatTemplate
from megatron_q3n.data.conversations import read_conversations
from megatron_q3n.data.readers import read_documents
from megatron_q3n.data.rows import read_rows
from megatron_q3n.data.sources import find_sources
from megatron_q3n.data.tokenizer import train_bpe
from megatron_q3n.rl.prompts import Prompts

# U+2028 and U+0085 end a line for str.splitlines, not in JSONL
ROWS = [{"prompt": "one\u2028two\x85three"}, {"prompt": "zwei ÄÖÜ 数"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TALK = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path)]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"\n", b"\r\n\n"))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.ndjson.zst").write_bytes(zstandard.compress(LINES))
    (tmp_path / "list.json").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=1).encode())
    (tmp_path / "lines.json").write_bytes(LINES)
    (tmp_path / "unknown.suffix").write_bytes(LINES)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for path in sorted(tmp_path.iterdir()):
        assert rows_of(path) == ROWS, path
    assert rows_of(tmp_path / "*.jsonl") == ROWS + ROWS
    assert [row.location for row in read_rows(tmp_path / "a.jsonl")][1] == f"{tmp_path / 'a.jsonl'}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "caf\xe9"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "not valid Unicode"),
        (b'{"prompt": {"deep": ["\\udfff"]}}', "not valid Unicode"),
        (b'{"prompt": "cut', "not JSON"),
        (b'["prompt"]', "a JSON list, not an object"),
        (b'"' + b"[" * 100_000, "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"messages": ["hello"]}', "a message is no JSON object"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "role 'bot'"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "["}', "tools is text, but not JSON"),
    ],
)
def test_a_bad_line_has_one_message_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    template = ChatTemplate(PLAIN, train_bpe(["user"], 270))
    file.write_bytes(b'\n{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"{file}(:| line )3: {message}"):
        Prompts([PromptSource(path=str(file))], template, max_tokens=50, seed=1)
    file.write_bytes(b"\n" + json.dumps({"messages": TALK}).encode() + b"\n" + line + b"\n")
    with pytest.raises(
        UserError, match=rf"{file}(:| line )3: ({message}|no conversation|no message of role assistant)"
    ):
        list(read_conversations(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "cannot be read as .gz"),
        ("a.json.gz", b"no gzip", "cannot be read as .gz"),
        ("a.jsonl.zst", b"not zstandard", "cannot be read as .zst"),
        ("a.parquet", b"PAR1 not really", "cannot be read"),
        ("a.json", b"[{]", "not JSON"),
        ("a.json", b'[{"prompt": "caf\xe9"}]', "not UTF-8"),
        ("a.json", b'[{"prompt": "\\ud800"}]', "item 1: not valid Unicode"),
        ("a.json", b'[{"prompt": "a"}, 3]', "item 2: a JSON int, not an object"),
        ("a.jsonl", b"", "only empty files"),
    ],
)
def test_a_damaged_file_has_one_message(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_cut_arrow_file_has_one_message(tmp_path: Path) -> None:
    """Cut at its begin, in its middle, and missing."""
    many = [{"prompt": f"{n}" * 50} for n in range(2000)]
    datasets.Dataset.from_list(many).save_to_disk(str(tmp_path / "whole"))
    (arrow,) = (tmp_path / "whole").glob("*.arrow")
    for size in (0, 100, arrow.stat().st_size // 2):
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut{size}")
        with (tmp_path / f"cut{size}" / arrow.name).open("r+b") as file:
            file.truncate(size)
        with pytest.raises(UserError, match=rf"cut{size}"):
            rows_of(tmp_path / f"cut{size}")
        with pytest.raises(UserError, match=rf"cut{size}"):
            list(read_documents(*find_sources([str(tmp_path / f"cut{size}")]), "prompt"))


def test_prompts_with_tools_render_them(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"messages": [{"role": "user", "content": "Rome?"}], "tools": json.dumps(tools), "answer": "sunny"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = train_bpe(["user"], 270)
    prompt = Prompts(
        [PromptSource(path=str(tmp_path / "a.jsonl"))], ChatTemplate(PLAIN, tokenizer), max_tokens=900, seed=1
    )
    assert json.dumps(tools[0]) in tokenizer.decode(prompt[0].tokens)
    assert prompt[0].scoring_arguments == {"answer": "sunny", "tools": tools, "text": "Rome?"}
    silent = ChatTemplate("{{ messages[0].content }}", tokenizer)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the chat template leaves out tools"):
        Prompts([PromptSource(path=str(tmp_path / "a.jsonl"))], silent, max_tokens=900, seed=1)

"""Pretraining batches: a function of the step, equal in every parallel layout, validated before use."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_q3n.config import UserError
from megatron_q3n.data.batch import Batch
from megatron_q3n.data.pretrain import PretrainData, build_pretrain_data
from megatron_q3n.data.tokenizer import train_bpe

TRAIN = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(60)]
OTHER = [f"class C{i}:\n\tvalue = {i * i}\n" * (2 + i % 3) for i in range(40)]
HELD_OUT = [f"lambda y: y * {i}\n" * 3 for i in range(30)]


@pytest.fixture
def folders(make_data) -> dict[str, Path]:  # type: ignore[no-untyped-def]
    return {
        "train": make_data("train", TRAIN),
        "other": make_data("other", OTHER),
        "held_out": make_data("held_out", HELD_OUT),
    }


def step_rows(microbatches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.tokens_BT for batch in microbatches])


def all_rows(data: PretrainData, first_step: int = 0) -> list[torch.Tensor]:
    return [step_rows(step) for step in data.train_batches(first_step, 0, 1)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_shapes_and_labels(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    data = build_pretrain_data(make_config([folders["train"]], [folders["held_out"]]))
    steps = list(data.train_batches(0, 0, 1))
    assert [len(step) for step in steps] == [4] * 6
    for batch in itertools.chain.from_iterable(steps):
        assert batch.tokens_BT.shape == batch.labels_BT.shape == batch.loss_mask_BT.shape == (2, 16)
        assert torch.equal(batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1])
        assert batch.loss_mask_BT.dtype == torch.float32
        assert int(batch.num_loss_tokens) == 32
        assert batch.packing is None


def test_first_epoch_has_every_token_once(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    documents = IndexedDataset(str(folders["train"] / "documents"))
    corpus = np.concatenate(documents[:])
    rows_per_epoch = (len(corpus) - 1) // 16
    config = make_config([folders["train"]], [folders["held_out"]], training={"steps": rows_per_epoch})
    data = build_pretrain_data(config)
    epoch = np.concatenate([row[:-1] for row in data.train_sample_tokens(rows_per_epoch)])
    left_out = np.bincount(corpus, minlength=300) - np.bincount(epoch, minlength=300)
    assert left_out.min() >= 0
    assert left_out.sum() == len(corpus) - rows_per_epoch * 16 <= 16
    rows = [row.tobytes() for row in data.train_sample_tokens(2 * rows_per_epoch)]
    assert sorted(rows[:rows_per_epoch]) == sorted(rows[rows_per_epoch:])
    assert rows[:rows_per_epoch] != rows[rows_per_epoch:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("blended", [False, True])
def test_resuming_at_a_step_continues_there(make_config, folders, num_workers, blended) -> None:  # type: ignore[no-untyped-def]
    parts = ["train", "other"] if blended else ["train"]
    train = [folders[part] for part in parts]
    config = make_config(train, [folders["held_out"]], data={"num_workers": num_workers})
    whole = all_rows(build_pretrain_data(config))
    for first_step in (1, 4, 6):
        assert same(all_rows(build_pretrain_data(config), first_step), whole[first_step:])


def test_a_longer_run_begins_like_a_shorter_one(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    """Epochs and blends included: these 60 steps are several times the smaller folder."""
    train = [{"path": str(folders["train"]), "weight": 3}, {"path": str(folders["other"])}]
    short = build_pretrain_data(make_config(train, [folders["held_out"]], training={"steps": 50}))
    longer = build_pretrain_data(make_config(train, [folders["held_out"]], training={"steps": 60}))
    assert same(all_rows(short), all_rows(longer)[:50])


def test_ranks_share_out_the_global_batch(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    config = make_config([folders["train"]], [folders["held_out"]])
    data = build_pretrain_data(config)
    ranks = [list(data.train_batches(0, rank, 2)) for rank in range(2)]
    for step, one in enumerate(all_rows(data)):
        micro = [[ranks[r][step][m].tokens_BT for r in range(2)] for m in range(2)]
        assert torch.equal(torch.cat([torch.cat(pair) for pair in micro]), one)
    validation = [list(data.validation_batches(rank, 2)) for rank in range(2)]
    one = [step_rows(step) for step in data.validation_batches(0, 1)]
    for step, rows in enumerate(one):
        parts = [validation[r][step][m].tokens_BT for m in range(2) for r in range(2)]
        assert torch.equal(torch.cat(parts), rows)


def test_validation_repeats_and_differs_from_training(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    data = build_pretrain_data(make_config([folders["train"]], [folders["held_out"]]))
    first, second = ([step_rows(s) for s in data.validation_batches(0, 1)] for _ in range(2))
    assert len(first) == 2
    assert same(first, second)
    sampled = np.stack(list(data.validation_sample_tokens()))
    assert np.array_equal(sampled[:, :-1], torch.cat(first).numpy())
    assert "lambda" in data.tokenizer.decode(sampled.reshape(-1))


def test_sample_tokens_are_the_trained_rows(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    data = build_pretrain_data(make_config([folders["train"]], [folders["held_out"]]))
    sampled = np.stack(list(data.train_sample_tokens(48)))
    batches = list(itertools.chain.from_iterable(data.train_batches(0, 0, 1)))
    assert np.array_equal(sampled[:, :-1], torch.cat([b.tokens_BT for b in batches]).numpy())
    assert np.array_equal(sampled[:, 1:], torch.cat([b.labels_BT for b in batches]).numpy())


def test_blend_follows_the_weights(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    train = [{"path": str(folders["train"]), "weight": 3}, {"path": str(folders["other"])}]
    data = build_pretrain_data(make_config(train, [folders["held_out"]], training={"steps": 25}))
    kinds = [int(data.train_dataset[i]["dataset_id"]) for i in range(200)]
    assert kinds.count(0) == 150
    assert kinds[:40].count(0) == 30  # evenly, not one folder after the other
    facts = data.describe()
    assert [part["share"] for part in facts["train"]] == [0.75, 0.25]
    tokens = facts["train"][1]["tokens"]
    assert facts["train"][1]["epochs"] == pytest.approx(50 / ((tokens - 1) // 16))


def test_document_boundaries(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    masked = {"data": {"mask_document_boundaries": True}, "training": {"micro_batch_size": 1}}
    data = build_pretrain_data(make_config([folders["train"]], [folders["held_out"]], **masked))
    plain = build_pretrain_data(make_config([folders["train"]], [folders["held_out"]]))
    eod = data.tokenizer.eod
    packed = list(itertools.chain.from_iterable(data.train_batches(0, 0, 1)))
    assert torch.equal(torch.cat([b.tokens_BT for b in packed]), torch.cat(all_rows(plain)))
    assert any(batch.packing.num_documents > 1 for batch in packed)  # type: ignore[arg-type]
    for batch in packed:
        assert torch.equal(batch.loss_mask_BT == 0, batch.tokens_BT == eod)


def test_seed_changes_the_order_and_global_random_state_is_left_alone(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one = all_rows(build_pretrain_data(make_config([folders["train"]], [folders["held_out"]])))
    assert torch.equal(torch.rand(1), expected)
    other = make_config([folders["train"]], [folders["held_out"]], training={"seed": 5})
    assert not same(all_rows(build_pretrain_data(other)), one)


def test_data_made_anew_at_the_same_path_is_not_read_through_the_old_index(  # type: ignore[no-untyped-def]
    make_config, make_data, folders, tokenizer
) -> None:
    config = make_config([folders["train"]], [folders["held_out"]])
    build_pretrain_data(config)
    make_data("train", OTHER, force=True)
    rows = build_pretrain_data(config).train_sample_tokens(10)
    assert all("def" not in tokenizer.decode(row) for row in rows)


def test_bad_data_is_refused(make_config, make_data, folders, tmp_path) -> None:  # type: ignore[no-untyped-def]
    train, held_out = folders["train"], folders["held_out"]
    foreign = train_bpe(["other text"] * 50, 280)
    foreign.save(tmp_path)
    other = make_data("foreign", TRAIN, tokenizer=tmp_path / "tokenizer.json")
    tiny = make_data("tiny", ["x"])
    cases = [
        (make_config([train], []), "data.validation is empty"),
        (make_config([tmp_path / "nowhere"], [held_out]), "nowhere does not exist"),
        (make_config([train], [tiny]), r"data.validation: .*tiny holds 2 tokens, less than one sample"),
        (make_config([train, other], [held_out]), r"data.train: .*foreign was made with tokenizer"),
        (make_config([train], [other]), r"data.validation: .*foreign was made with tokenizer"),
        (
            make_config([train], [held_out], data={"tokenizer": str(tmp_path)}),
            r"data.tokenizer=.* has fingerprint .* Leave data.tokenizer null",
        ),
        (make_config([train], [held_out], model={"vocab_size": 256}), r"300 entries, more than model.vocab_size=256"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            build_pretrain_data(config)
    with (train / "documents.bin").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(UserError, match=r"documents.bin: \d+ bytes, the manifest records"):
        build_pretrain_data(make_config([train], [held_out]))


def test_a_process_without_access_to_the_index_raises(make_config, folders) -> None:  # type: ignore[no-untyped-def]
    config = make_config([folders["train"]], [folders["held_out"]])
    with pytest.raises(UserError, match=r"does not see it.*data.cache_dir"):
        build_pretrain_data(config, is_leader=False)
    calls = []
    leader = build_pretrain_data(config, barrier=lambda: calls.append("leader"))
    follower = build_pretrain_data(config, is_leader=False, barrier=lambda: calls.append("follower"))
    assert calls == ["leader", "follower"]
    assert same(all_rows(leader), all_rows(follower))


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from megatron_q3n.config import validate
from megatron_q3n.data.pretrain import build_pretrain_data
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
config = validate(__import__("json").loads(sys.argv[3]))
data = build_pretrain_data(config, is_leader=rank == 0, barrier=dist.barrier)
rows = [b.tokens_BT for step in data.train_batches(0, 0, 1) for b in step]
torch.save(torch.cat(rows), f"{sys.argv[2]}.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_with_torch_distributed_initialized(make_config, folders, tmp_path) -> None:  # type: ignore[no-untyped-def]
    train = [folders["train"], folders["other"]]
    config = make_config(train, [folders["held_out"]])
    command = [sys.executable, "-c", TWO_PROCESSES]
    arguments = [str(tmp_path / "rendezvous"), config.model_dump_json()]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen([*command, str(r), *arguments], cwd=root) for r in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    expected = torch.cat(all_rows(build_pretrain_data(config)))
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"rendezvous.{rank}"), expected)


def test_each_folder_of_a_validation_blend_has_batches_of_its_own(folders, make_config, make_data) -> None:  # type: ignore[no-untyped-def]
    """Their share of the batches, and only their text; a single folder has none beside the whole."""
    letters = make_data("letters", ["zzzz " * 400])
    data = build_pretrain_data(make_config([folders["train"]], [folders["held_out"], letters]))
    sources = {name: list(batches) for name, batches in data.validation_sources(0, 1)}
    assert {name: len(batches) for name, batches in sources.items()} == {"held_out": 1, "letters": 1}
    texts = {name: data.tokenizer.decode(step_rows(steps[0]).flatten().tolist()) for name, steps in sources.items()}
    assert "z" not in texts["held_out"]
    assert set(texts["letters"].replace("<|endoftext|>", "")) <= set("z ")
    alone = build_pretrain_data(make_config([folders["train"]], [folders["held_out"]]))
    assert list(alone.validation_sources(0, 1)) == []

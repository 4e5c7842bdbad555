"""Checkpoints in one process: exact resume, errors for damage and other architectures, retention, full disks.

One process and one layout; resharding is not covered here. Damage of every kind: test_corruption.py; kills during a
save: test_kill.py; resuming of whole runs: tests/stages/test_resume.py.
"""

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError
from tests.checkpoint.tiny_state import TINY, state_of, step
from tests.small_disk import small_disk


@pytest.fixture
def saved(alone: Any, tmp_path: Path) -> tuple[Any, Path]:
    """Return a state after two steps and its checkpoint."""
    from megatron_q3n import checkpoint

    state = state_of(alone)
    for _ in range(2):
        step(state)
    return state, checkpoint.save(state, tmp_path)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_resumed_training_is_bit_equal(alone: Any, tmp_path: Path, compute: str) -> None:
    from megatron_q3n import checkpoint

    settings = {"precision": {"compute": compute}}
    first = state_of(alone, settings)
    for _ in range(3):
        step(first)
    path = checkpoint.save(first, tmp_path)
    expected = [step(first) for _ in range(3)]
    second = state_of(alone, settings)
    checkpoint.load(second, path, resume=True)
    assert second.step == 3
    assert [step(second) for _ in range(3)] == expected
    for (name, a), b in zip(first.models[0].state_dict().items(), second.models[0].state_dict().values()):
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("bf16", "fp32")])
def test_weights_and_moments_load_in_another_dtype(alone: Any, tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """A checkpoint of an fp32 run resumes in bf16, and back: master weights and moments are fp32 in both."""
    from megatron_q3n import checkpoint

    first, second = (state_of(alone, {"precision": {"compute": compute}}) for compute in dtypes)
    for _ in range(3):
        step(first)
    path = checkpoint.save(first, tmp_path)
    expected = [step(first) for _ in range(3)]
    checkpoint.load(second, path, resume=True)
    assert [step(second) for _ in range(3)] == pytest.approx(expected, rel=1e-2)


def test_new_run_from_weights_starts_at_step_zero(alone: Any, saved: tuple[Any, Path]) -> None:
    from megatron_q3n import checkpoint

    state, path = saved
    other = state_of(alone, {"model": TINY["model"] | {"rotary_base": 5e6}})
    checkpoint.load(other, path, resume=False, with_optimizer=False)
    assert other.step == 0
    for (name, a), b in zip(state.models[0].named_parameters(), other.models[0].parameters()):
        assert torch.equal(a, b), name


def test_moments_load_with_another_learning_rate(alone: Any, saved: tuple[Any, Path]) -> None:
    from megatron_q3n import checkpoint
    from megatron_q3n.training.optimizer import torch_adam_states

    state, path = saved
    other = state_of(alone, {"schedule": {"lr": 7e-3, "warmup_steps": 0, "style": "constant"}})
    checkpoint.load(other, path, resume=False)
    pairs = zip(*(torch_adam_states(x.optimizer) for x in (state, other)), strict=True)
    for (expected, a), (found, b) in pairs:
        assert torch.equal(expected.state[a]["exp_avg"], found.state[b]["exp_avg"])
        assert expected.state[a]["exp_avg"].any()
    step(other)
    rates = {group["lr"] for adam, _ in torch_adam_states(other.optimizer) for group in adam.param_groups}
    assert rates == {7e-3}


OPTIMIZER_CHANGES: dict[str, dict[str, Any]] = {
    "learning rate": {"schedule": {"lr": 1e-5, "min_lr": 1e-6, "warmup_steps": 5}},
    "betas and epsilon": {"optimizer": {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_eps": 1e-6}},
    "weight decay": {"optimizer": {"weight_decay": 0.05}},
    "no weight decay": {"optimizer": {"weight_decay": 0.0}},
    "no decay of norms": {"optimizer": {"decay_norm_weights": False}},
}


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "loaded"])
@pytest.mark.parametrize("change", OPTIMIZER_CHANGES)
def test_the_optimizer_has_the_settings_of_the_run_and_the_moments_of_the_checkpoint(
    alone: Any, saved: tuple[Any, Path], change: str, resume: bool
) -> None:
    """The settings are compared with those of a run that loads nothing, parameter by parameter."""
    from megatron_q3n import checkpoint

    state, path = saved
    fresh, loaded = (state_of(alone, OPTIMIZER_CHANGES[change]) for _ in range(2))
    checkpoint.load(loaded, path, resume=resume)
    fresh.set_step(2 if resume else 0)
    assert loaded.step == fresh.step
    expected, found, before = (_settings_and_moments(x) for x in (fresh, loaded, state))
    assert found.keys() == expected.keys() == before.keys()
    for name, (settings, moment) in found.items():
        assert settings == expected[name][0], name
        assert torch.equal(moment, before[name][1]), name
    assert any(expected[name][0] != before[name][0] for name in expected)


def _settings_and_moments(state: Any) -> dict[str, tuple[dict[str, Any], torch.Tensor]]:
    """Return, by parameter name, the settings that its next update uses and its second moment."""
    names = ("lr", "betas", "eps", "weight_decay")
    by_parameter = {}
    for part in state.optimizer.chained_optimizers:
        owner = {id(parameter): name for name, parameter in state.models[0].named_parameters()}
        for model_group, group in zip(part.model_fp32_groups, part.optimizer.param_groups, strict=True):
            for model_parameter, parameter in zip(model_group, group["params"], strict=True):
                settings = {name: group[name] for name in names}
                by_parameter[owner[id(model_parameter)]] = (settings, part.optimizer.state[parameter]["exp_avg_sq"])
    return by_parameter


def test_another_architecture_is_refused_by_name(alone: Any, saved: tuple[Any, Path]) -> None:
    from megatron_q3n import checkpoint

    other = state_of(alone, {"model": TINY["model"] | {"num_moe_experts": 4}})
    before = other.models[0].embedding.word_embeddings.weight.clone()
    with pytest.raises(UserError, match=r"model\.num_moe_experts: 8 there, 4 here"):
        checkpoint.load(other, saved[1], resume=False)
    assert torch.equal(other.models[0].embedding.word_embeddings.weight, before)


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_damage_is_found_before_loading(alone: Any, saved: tuple[Any, Path], damage: str) -> None:
    from megatron_q3n import checkpoint

    path = saved[1]
    victim = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    if damage == "missing":
        victim.unlink()
    elif damage == "short":
        os.truncate(victim, victim.stat().st_size - 1)
    else:
        (path / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(state_of(alone), path, resume=True)


def test_an_unfinished_save_is_no_checkpoint(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """The remains of a SIGKILL: a hidden folder, or one without its manifest."""
    from megatron_q3n import checkpoint

    (tmp_path / "checkpoints/.step_0000009.partial").mkdir()
    (tmp_path / "checkpoints/step_0000008").mkdir()
    assert checkpoint.newest_in(tmp_path) == saved[1].resolve()
    assert checkpoint.find(tmp_path) == saved[1].resolve()
    with pytest.raises(UserError, match="no checkpoint found"):
        checkpoint.find(tmp_path / "elsewhere")


def test_old_checkpoints_are_pruned_and_milestones_are_kept(alone: Any, tmp_path: Path) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone, {"checkpoint": {"keep_last": 2, "keep_every_steps": 3}})
    for _ in range(6):
        step(state)
        checkpoint.save(state, tmp_path)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_0000003", "step_0000005", "step_0000006"]
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_0000006"
    assert json.loads((tmp_path / "checkpoints/latest/checkpoint.json").read_text())["step"] == 6


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk that holds one checkpoint of the tiny model, not two."""
    with small_disk(tmp_path / "disk", 10_240) as folder:
        yield folder


def test_full_disk_keeps_the_last_good_checkpoint(alone: Any, disk: Path) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone)
    step(state)
    good = checkpoint.save(state, disk)
    step(state)
    with pytest.raises(UserError, match=r"could not be written.*last good checkpoint is .*step_0000001"):
        checkpoint.save(state, disk)
    resumed = state_of(alone)
    checkpoint.load(resumed, good, resume=True)
    assert resumed.step == 1
    assert [p.name for p in (disk / "checkpoints").iterdir() if p.name.startswith(".step")] == []


def test_a_write_that_fails_midway_keeps_the_last_good_checkpoint(
    alone: Any, saved: tuple[Any, Path], tmp_path: Path
) -> None:
    """The disk had free space when the save began; a file size limit stops the writers in the middle."""
    from megatron_q3n import checkpoint

    state, good = saved
    step(state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written"):
            checkpoint.save(state, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest_in(tmp_path) == good.resolve()
    assert checkpoint.save(state, tmp_path).name == "step_0000003"

"""PassState: values of a pass are taken once, observers are restored, copies of the configuration share plan and state.

Also the patches of megatron-core: none at import, and exactly those listed in model/patches.py once a model is built.
"""

import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_q3n.config.execution_plan import Kernel
from tests.execution_plans import INTERPRETED_KERNELS, fused_plan, launched_kernels, use_plan
from tests.inference.tiny_model import random_prompts, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["rope_angles", "residual", "draft_chain"])
def test_what_is_handed_over_is_taken_once(name: str, alone: Any) -> None:
    from megatron_q3n.model.pass_state import PassState

    state, value = PassState(), object()
    take = getattr(state, f"take_{name}")
    assert take() is None
    setattr(state, name, value)
    assert take() is value
    assert take() is None


@pytest.mark.parametrize("settings", [{}, {"mixer_pattern": "SG", "attention_window_tokens": 5, "num_layers": 2}])
def test_all_modules_of_a_model_share_its_plan_and_its_pass_state(settings: dict[str, Any], alone: Any) -> None:
    """Routers, shared experts and attention variants hold copies of the configuration."""
    model, other = tiny_model(alone, **settings), tiny_model(alone, **settings)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    assert len(configs) > 1, "no module holds a copy"
    dispatchers = [m.token_dispatcher.config for m in model.modules() if hasattr(m, "token_dispatcher")]
    assert dispatchers
    for config in (*configs.values(), *dispatchers, copy.copy(model.config), copy.deepcopy(model.config)):
        assert config.plan is model.config.plan
        assert config.pass_state is model.config.pass_state
    assert other.config.pass_state is not model.config.pass_state


def test_plan_and_pass_state_are_no_fields_of_the_configuration(alone: Any) -> None:
    """megatron-core compares, prints and converts fields, and checks names that recipes pass through."""
    config = tiny_model(alone).config
    assert not {"plan", "pass_state"} & {field.name for field in dataclasses.fields(config)}
    assert "PassState" not in repr(config)


def test_nested_observers_are_restored(alone: Any) -> None:
    from megatron_q3n.model.pass_state import PassState

    state = PassState()
    first, second = nn.Identity(), nn.Identity()
    for context, observers in ((state.probing, "delta_rule_probes"), (state.with_routing, "routing")):
        current = lambda name=observers: getattr(state, name)
        assert not state.is_observed
        with context({first: "outer"}):
            assert current() == {first: "outer"}
            with context({first: "inner", second: "inner"}):
                assert current() == {first: "inner", second: "inner"}
                with pytest.raises(RuntimeError, match="innermost"), context({second: "innermost"}):
                    raise RuntimeError(current()[second])
                assert current() == {first: "inner", second: "inner"}
            assert current() == {first: "outer"}
            assert state.is_observed
        assert current() == {}


def test_only_the_probed_delta_rule_is_wrapped(alone: Any) -> None:
    """By `observed`, and in a forward pass: the other layer of the model runs its own rule."""
    from megatron_q3n.model.gated_delta_net import GatedDeltaNet
    from megatron_q3n.model.pass_state import PassState

    calls: list[str] = []

    class Probe:
        def __init__(self, name: str) -> None:
            self.name = name

        def wrap(self, rule: Any) -> Any:
            def run(*inputs: Any, **options: Any) -> Any:
                calls.append(self.name)
                return rule(*inputs, **options)

            return run

    rule, mixer = (lambda: None), nn.Identity()
    assert PassState().observed(rule, mixer) is rule
    model = tiny_model(alone, mixer_pattern="G", num_layers=2, mtp_num_layers=0)
    mixers = [module for module in model.modules() if isinstance(module, GatedDeltaNet)]
    plain = forward(model)
    with model.config.pass_state.probing({mixers[1]: Probe("second")}):
        observed = forward(model)
    assert calls == ["second"]
    torch.testing.assert_close(observed, plain, rtol=0, atol=0)
    forward(model)
    assert calls == ["second"]


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_pass_leaves_nothing_behind(recomputes: bool, alone: Any, triton_device: str) -> None:
    """With fused kernels, whose epilogues take angles and residual, and with draft chains; in recomputed passes too."""
    settings = {
        "mixer_pattern": "G*",
        "num_layers": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "kv_channels": 16,
        "vocab_size": 16,
        "mtp_num_layers": 2,
        "mtp_use_repeated_layer": True,
    }
    model = tiny_model(alone, **settings).train()
    model.config.pass_state.mtp = drafting_losses()
    if recomputes:
        recompute_all(model)
    passes: list[nn.Module] = []
    model.decoder.layers[1].mlp.router.register_forward_hook(lambda router, *_: passes.append(router))
    with use_plan(model, fused_plan(tiny_config(**settings), INTERPRETED_KERNELS)), launched_kernels() as launched:
        forward(model, labels=True).sum().backward()
    assert launched >= {Kernel.QKV_NORM_ROPE, Kernel.PERMUTATION, Kernel.SHARED_EXPERT_GATE}
    assert len(passes) == 1 + recomputes
    state = model.config.pass_state
    assert (state.rope_angles, state.residual, state.draft_chain) == (None, None, None)
    assert not state.is_observed


def drafting_losses() -> Any:
    from megatron_q3n.config.mtp import MtpConfig
    from megatron_q3n.model.mtp.accumulators import MTPLosses

    return MTPLosses(2, MtpConfig(method="inference"))


def recompute_all(model: Any) -> None:
    """Enable full activation checkpointing on the model's configuration."""
    model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
    model.config.recompute_num_layers = 1


def forward(model: Any, labels: bool = False) -> torch.Tensor:
    """Run a forward pass; return logits, or with `labels` losses, whose graph also has MTP's."""
    device = next(model.parameters()).device
    tokens = torch.tensor(random_prompts([12, 12], 16), device=device)
    positions = torch.arange(12, device=device).expand(2, -1)
    if not labels:
        with torch.no_grad():
            return model(tokens, positions, None)
    return model(tokens, positions, None, labels=tokens.roll(-1, 1), loss_mask=torch.ones(2, 12, device=device))


PATCHES = """
import sys
from megatron.core.models.hybrid import hybrid_block, hybrid_model

before = hybrid_block.TENorm, hybrid_model.process_mtp_loss, hybrid_model.MultiTokenPredictionBlock
import megatron_q3n.model.mtp.loss
import megatron_q3n.model.build
from megatron_q3n import parallel
from megatron_q3n.config import validate
from megatron_q3n.device import select_device

def replaced_names():
    return hybrid_block.TENorm, hybrid_model.process_mtp_loss, hybrid_model.MultiTokenPredictionBlock

assert replaced_names() == before, "an import replaces a name"
config = validate({"model": {"num_layers": 2, "mixer_pattern": "G*"}})
device = select_device(config)
group = parallel.initialize(config, device)
assert replaced_names() == before, "the process's set-up replaces a name"

def callables(owner):
    return {name: value for name, value in vars(owner).items() if callable(value)}

def snapshot():
    modules = {name: module for name, module in sys.modules.items() if name.startswith("megatron.core")}
    owners = dict(modules)
    for name, module in modules.items():
        for value in callables(module).values():
            if isinstance(value, type) and value.__module__ == name:
                owners[f"{name}.{value.__qualname__}"] = value
    return {f"{owner}.{name}": value for owner, found in owners.items() for name, value in callables(found).items()}

old = snapshot()
megatron_q3n.model.build.build_model(config, "torch", group.groups)
new = snapshot()
for name in sorted(old):
    if new[name] is not old[name]:
        print(name)
parallel.shutdown()
"""


def test_only_a_built_model_patches_megatron_and_only_as_listed() -> None:
    """In a fresh process: imports replace no name; `build_model` replaces those of the table in model/patches.py."""
    from megatron_q3n.model import patches

    done = subprocess.run(
        [sys.executable, "-c", PATCHES], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", patches.__doc__ or "", re.MULTILINE)
    assert len(listed) == 6
    replaced = [".".join(name.split(".")[-2:]) for name in done.stdout.split()]
    assert sorted(replaced) == sorted(listed)

"""The router: rows of equal norm at init, balance over the whole global batch, the same for every split of it."""

from typing import Any

import torch

from megatron_q3n.config import validate


def test_rows_start_with_one_norm(alone: Any) -> None:
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.moe.router import routers_of

    for normalized in (True, False):
        config = validate({"model": {"moe_router_normalized_init": normalized}})
        (model,) = build_model(config, "torch", alone[1].groups)
        for router in routers_of([model]).values():
            norms = router.weight.norm(dim=1)
            same = torch.allclose(norms, torch.full_like(norms, 0.02 * 128**0.5), rtol=1e-5)
            assert same == normalized


def test_balance_does_not_depend_on_micro_batches(alone: Any) -> None:
    """Three steps with 1, 2 and 4 micro-batches: the same losses, loads and gradient norms."""
    from megatron_q3n.data.batch import batch_of_rows
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    tokens = torch.randint(0, 512, (3, 4, 65), generator=torch.Generator().manual_seed(5))
    results = []
    for size in (4, 2, 1):
        training = {"micro_batch_size": size, "global_batch_size": 4, "sequence_length": 64}
        state = build_state(validate({"training": training, "model": {"moe_aux_loss_coeff": 0.1}}), *alone)
        weights = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in state.models[0].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=weights) * 0.05)
        steps = []
        for rows in tokens:
            batches = [
                batch_of_rows(part[:, :-1], part[:, 1:].contiguous(), torch.ones(size, 64)) for part in rows.split(size)
            ]
            report = train_step(state, batches)
            steps.append([report.loss, report.grad_norm, *report.balance_losses.values(), *report.mtp_losses])
        results.append(torch.tensor(steps))
    for split in results[1:]:
        torch.testing.assert_close(split, results[0], rtol=1e-5, atol=0)


def test_text_starts_more_evenly_spread_from_rows_of_one_norm(alone: Any) -> None:
    """Real text, 64 experts, three models that differ in nothing else: load nearer to 1, choice nearer to uniform.

    tools/studies/router_balance.py prints the figures for any model. With few experts, or wide rows, whose norms hardly
    differ, the effect drowns in that of frequent tokens.
    """
    from megatron_q3n.data.pretrain import build_pretrain_data
    from tools.studies.router_balance import FIGURES, fresh_loads

    size = {"num_moe_experts": 64, "moe_router_topk": 4, "hidden_size": 64, "embedding_init_method_std": 1.0}
    config = validate({"model": size, "training": {"sequence_length": 256}})
    text = torch.stack([torch.as_tensor(row[:-1]) for row in build_pretrain_data(config).train_sample_tokens(8)])
    figures = {}
    for normalized in (False, True):
        config = validate({"model": size | {"moe_router_normalized_init": normalized}})
        loads = [load for seed in range(3) for load in fresh_loads(config, seed, text, alone)]
        assert len(loads) == 3 * 4
        for name, figure in FIGURES.items():
            figures[name, normalized] = sum(map(figure, loads)) / len(loads)
    print({f"{name}, {'one norm' if one else 'plain'}": f"{x:.4f}" for (name, one), x in figures.items()})
    assert 1 < figures["fullest / mean", True] < figures["fullest / mean", False]
    assert 1 > figures["emptiest / mean", True] > figures["emptiest / mean", False]
    entropy = "entropy / log(experts)"
    assert 0.98 < figures[entropy, True] < 1
    assert figures[entropy, True] > figures[entropy, False]


def gradients_over(state: Any, tokens: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Take a step that changes no weight, in micro-batches of so many rows; return every gradient."""
    from megatron_q3n.data.batch import batch_of_rows
    from tests.model.test_packing import gradients_of

    batches = [
        batch_of_rows(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(size, rows.shape[1] - 1))
        for rows in tokens.split(size)
    ]
    return gradients_of(state, batches)[1]


def test_balance_in_a_micro_batch_is_that_of_its_own_tokens(alone: Any) -> None:
    """aux_loss: the mean over micro-batches of the reference's loss on each; seen to differ from the whole batch's."""
    from megatron_q3n import hf
    from megatron_q3n.training.state import build_state
    from tests.model.reference.test_model import reference

    size = {"mixer_pattern": "*", "num_layers": 2, "mtp_num_layers": 0, "moe_aux_loss_coeff": 1.0}
    model = size | {"moe_router_load_balancing_type": "aux_loss"}
    training = {"micro_batch_size": 2, "global_batch_size": 4, "sequence_length": 40}
    config = validate({"model": model, "training": training})
    state, exact = build_state(config, *alone), reference(config.model)
    state.models[0].load_state_dict(hf.to_megatron(exact.state_dict(), config.model), strict=False)
    tokens = torch.randint(0, 512, (4, 41), generator=torch.Generator().manual_seed(5))
    found = gradients_over(state, tokens, 2)

    def wanted(rows: int) -> dict[str, torch.Tensor]:
        exact.zero_grad()
        for part in tokens.split(rows):
            (exact(part[:, :-1], part[:, 1:]).loss * rows / 4).backward()
        published = {name: p.grad for name, p in exact.named_parameters()}
        return hf.to_megatron(published, config.model, gradients=True)

    each, whole = wanted(2), wanted(4)
    for name, gradient in found.items():
        largest = each[name].abs().max()
        assert (gradient - each[name]).abs().max() < 1e-3 * largest, name
        if name.endswith("router.weight"):
            assert (gradient - whole[name]).abs().max() > 0.01 * largest, name


def test_bias_chooses_and_does_not_weigh(alone: Any) -> None:
    """Logits and gradients are the reference's, which adds the bias to the choice alone."""
    from megatron_q3n import hf
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.moe.router import routers_of
    from tests.model.reference.test_model import reference

    size = {"mixer_pattern": "*", "num_layers": 2, "mtp_num_layers": 0, "moe_aux_loss_coeff": 0}
    config = validate({"model": size | {"moe_router_enable_expert_bias": True}})
    exact = reference(config.model)
    (model,) = build_model(config, "torch", alone[1].groups)
    model.load_state_dict(hf.to_megatron(exact.state_dict(), config.model), strict=False)
    tokens = torch.randint(0, 512, (1, 41), generator=torch.Generator().manual_seed(5))
    plain = exact(tokens[:, :-1]).logits_BTV
    for layer, router in zip(exact.model.layers, routers_of([model]).values()):
        assert not router.expert_bias.any()
        router.expert_bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(7)) * 3)
        layer.mlp.expert_bias_E.copy_(router.expert_bias)
    wanted = exact(tokens[:, :-1], tokens[:, 1:])
    assert (wanted.logits_BTV - plain).abs().max() > 0.1
    wanted.loss.backward()
    positions = torch.arange(40)[None]
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    losses.mean().backward()
    published = {name: p.grad for name, p in exact.named_parameters()}
    gradients = hf.to_megatron(published, config.model, gradients=True)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max()
        assert error < 1e-3 * gradients[name].abs().max(), name
    with torch.no_grad():
        logits = model.eval()(tokens[:, :-1], positions, None)
    torch.testing.assert_close(logits, wanted.logits_BTV.float().detach(), rtol=0, atol=1e-4)


def test_bias_balances_without_a_loss(alone: Any) -> None:
    """It moves by the rate towards the mean of the global batch's counts, is saved, and evens the load out."""
    from megatron_q3n.data.batch import batch_of_rows
    from megatron_q3n.model.moe.router import routers_of
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    model = {
        "mixer_pattern": "*",
        "num_layers": 1,
        "mtp_num_layers": 0,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
        "moe_aux_loss_coeff": 0,
        "moe_router_load_balancing_type": "none",
    }
    training = {"micro_batch_size": 2, "global_batch_size": 4, "sequence_length": 64}
    state = build_state(validate({"model": model, "training": training}), *alone)
    state.optimizer.step = lambda: (True, None, None)
    (router,) = routers_of(state.models).values()
    tokens = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(5))
    batches = [batch_of_rows(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(2, 64)) for rows in tokens.split(2)]
    fullest = []
    for _ in range(40):
        before = router.expert_bias.clone()
        (load,) = map(torch.tensor, train_step(state, batches).expert_load.values())
        torch.testing.assert_close(router.expert_bias - before, 0.01 * (1 / 8 - load).sign())
        fullest.append(load.max().item() * 8)
    print(f"fullest / mean: {fullest[0]:.3f} at first, {fullest[-1]:.3f} after 40 steps")
    assert fullest[-1] < 1.1 < fullest[0]
    saved = state.models[0].sharded_state_dict()
    key = next(key for key in saved if key.endswith("expert_bias"))
    assert saved[key].data is router.expert_bias
    assert router.expert_bias.dtype == torch.float32

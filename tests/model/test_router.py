"""The router: rows of equal norm at init, balance over the whole global batch, the same for every split of it."""

from typing import Any

import torch

from megatron_q3n.config import validate


def test_rows_start_with_one_norm(alone: Any) -> None:
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.router import routers_of

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
        state = build_state(
            validate({"training": training, "model": {"moe_aux_loss_coeff": 0.1}}), *alone
        )
        weights = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in state.models[0].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=weights) * 0.05)
        steps = []
        for rows in tokens:
            batches = [
                batch_of_rows(part[:, :-1], part[:, 1:].contiguous(), torch.ones(size, 64))
                for part in rows.split(size)
            ]
            report = train_step(state, batches)
            steps.append(
                [report.loss, report.grad_norm, *report.balance_losses.values(), *report.mtp_losses]
            )
        results.append(torch.tensor(steps))
    for split in results[1:]:
        torch.testing.assert_close(split, results[0], rtol=1e-5, atol=0)

"""Stage 3's checks, default settings, and what is measured while it trains."""

import torch
from accelerate import Accelerator

from genima.act import ACT, SIZES, Controller
from genima.files import UserError
from genima.training import check_numbers


def fill_in_defaults(settings, base: Controller | None):
    """Fill in what depends on the size, and on whether there is a base."""
    defaults = {"steps": 2400, "learning_rate": SIZES[settings.size]["learning_rate"]}
    if base is not None:
        defaults = {"steps": 400, "learning_rate": 3e-4}
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def check_settings(settings, accelerator: Accelerator):
    check_numbers(settings)
    if settings.device not in ("auto", accelerator.device.type):
        raise UserError(f"There is no {settings.device} device here: use --device auto.")
    if settings.batch_size % accelerator.num_processes:
        raise UserError("--batch-size must be a multiple of the number of processes.")


@torch.inference_mode()
def validate(network: ACT, batches: list[dict], state_std: list[float]) -> list[float]:
    """What a network gets wrong on held-out scenes: the joints' mean error (rad) over all steps, at
    the last step, and with the state hidden; and the share of steps with the right gripper."""

    def predict(batch, with_state):
        has_state = torch.full_like(batch["has_state"], with_state)
        inputs = (batch["images"], batch["state"], has_state, batch["bag_of_words"])
        joints, gripper_logits, _ = network(*inputs)
        error = (joints - batch["actions"][..., :-1]).abs() * scale  # (B, K, D) rad
        gripper_is_right = (gripper_logits > 0) == (batch["actions"][..., -1] > 0.5)
        return error.mean(-1), gripper_is_right  # (B, K) each

    network.eval()
    scale = torch.tensor(state_std[:-1], device=network.queries.device)  # (D,) rad
    with_state = [predict(batch, True) for batch in batches]
    without_state = [predict(batch, False) for batch in batches]
    network.train()
    error = torch.cat([error for error, _ in with_state])  # (N, K)
    gripper_is_right = torch.cat([right for _, right in with_state])
    error_without_state = torch.cat([error for error, _ in without_state])
    is_action = ~torch.cat([batch["action_is_pad"] for batch in batches])
    return [
        error[is_action].mean().item(),
        error[:, -1][is_action[:, -1]].mean().item(),
        error_without_state[is_action].mean().item(),
        gripper_is_right[is_action].float().mean().item(),
    ]

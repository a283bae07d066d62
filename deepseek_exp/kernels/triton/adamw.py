"""AdamW in one pass over all parameters.

    g = c grad,  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    w = (1 - lr wd) w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; the definition is
torch.optim.AdamW, which multiplies the decay by lr. c is the clipping factor. All arithmetic is fp32; a bf16 parameter
has an fp32 master w (Micikevicius et al. 2018, "Mixed Precision Training", section 3.1), rounded into it in the same
pass. The moments may be kept in 8 bits, see `reference.quantize_blocks`; the update uses them before they are rounded.

One launch updates the tensors of a group, see multi_tensor.py; it runs between compiled graphs, not inside them. Values
that change per step are passed as fp32 numbers, computed in float64; Triton does not recompile for them.

Bytes moved per parameter (the floor): fp32 without master 28; bf16 with a bf16 gradient 28, with an fp32 gradient 30;
with 8-bit moments 16 of the 28, and 1/16 for their scales. Measured with clipping, 293 million parameters in bf16 on an
H200: 2.18 ms, 95% of the floor; with 8-bit moments 1.79 ms, 70%.

Suffixes: B blocks of 256 elements, D elements per block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.kernels.reference import BLOCK, dequantize_blocks, quantize_blocks
from deepseek_exp.kernels.triton.multi_tensor import (
    TYPES,
    WARPS,
    are_aligned,
    gradient_norm,
    pointer,
    table_of,
    tile_map,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
# Blocks per tile: 4 elements per thread, a layout that all types load alike, so that no data moves between threads.
ROWS = 4
# Warps for 8-bit moments: each of their blocks then belongs to one warp; with 8 warps an H100 took 1.14 times as long.
NARROW_WARPS = 4
# The smallest fp32 number that has an fp32 inverse.
LEAST: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def _inverse(top_B):
    """Return 1 / the maximum of each block; 0 if that overflows fp32, since all codes of such a block are 0."""
    return tl.where(top_B >= LEAST, 1 / tl.maximum(top_B, LEAST), 0.0)


@triton.jit
def _update_tile(
    row, start, n, grad_scale, keep, step_size, rest1, beta2, rest2, root, eps,
    GRAD: tl.constexpr, PARAM: tl.constexpr, SCALED: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    M_TYPE: tl.constexpr = tl.int8 if BITS == 8 else tl.float32
    V_TYPE: tl.constexpr = tl.uint8 if BITS == 8 else tl.float32
    grad, w = pointer(row + 1, GRAD, ALIGNED), pointer(row + 2, tl.float32, ALIGNED)
    m, v = pointer(row + 3, M_TYPE, ALIGNED), pointer(row + 4, V_TYPE, ALIGNED)
    block = start // COLS + tl.arange(0, ROWS)[:, None]
    at = block * COLS + tl.arange(0, COLS)[None, :]
    if MASKED:
        here, here_B, other = at < n, block * COLS < n, 0.0
    else:
        here, here_B, other = None, None, None
    g_BD = tl.load(grad + at, here, other).to(tl.float32)
    if SCALED:
        g_BD *= tl.load(grad_scale)
    m_BD, v_BD = tl.load(m + at, here, other).to(tl.float32), tl.load(v + at, here, other).to(tl.float32)
    if BITS == 8:
        m_largest = pointer(row + 5, tl.float32, ALIGNED) + block
        v_largest = pointer(row + 6, tl.float32, ALIGNED) + block
        m_BD *= 1 / 127
        m_BD = m_BD * tl.abs(m_BD) * tl.load(m_largest, here_B, other)
        v_BD *= 1 / 255
        v_BD = v_BD * v_BD
        v_BD = v_BD * v_BD * tl.load(v_largest, here_B, other)
    m_BD += rest1 * (g_BD - m_BD)
    v_BD = beta2 * v_BD + rest2 * g_BD * g_BD
    change_BD = tl.div_rn(m_BD, tl.div_rn(tl.sqrt_rn(v_BD), root) + eps)
    w_BD = tl.load(w + at, here, other) * keep - step_size * change_BD
    tl.store(w + at, w_BD, here)
    if PARAM is not None:
        tl.store(pointer(row + 7, PARAM, ALIGNED) + at, w_BD.to(PARAM), here)
    if BITS == 8:
        top_B = tl.max(tl.abs(m_BD), 1, keep_dims=True)
        tl.store(m_largest, top_B, here_B)
        code_BD = tl.floor(tl.sqrt(tl.abs(m_BD) * _inverse(top_B)) * 127.0 + 0.5)
        m_BD = tl.where(m_BD < 0, -code_BD, code_BD).to(tl.int32)
        top_B = tl.max(v_BD, 1, keep_dims=True)
        tl.store(v_largest, top_B, here_B)
        root_BD = tl.sqrt(tl.sqrt(v_BD * _inverse(top_B)))
        v_BD = tl.maximum(tl.floor(root_BD * 255.0 + 0.5), tl.where(v_BD > 0, 1.0, 0.0)).to(tl.int32)
    tl.store(m + at, m_BD.to(M_TYPE), here)
    tl.store(v + at, v_BD.to(V_TYPE), here)


@triton.jit
def _update(
    table, tiles, grad_scale, keep, step_size, rest1, beta2, rest2, root, eps,
    GRAD: tl.constexpr, PARAM: tl.constexpr, SCALED: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    entry = tiles + 2 * tl.program_id(0)
    row, start = table + tl.load(entry) * 8, tl.load(entry + 1).to(tl.int64) * (ROWS * COLS)
    n = tl.load(row)
    # Mask only if needed, as in multi_tensor.py.
    if start + ROWS * COLS <= n:
        _update_tile(
            row, start, n, grad_scale, keep, step_size, rest1, beta2, rest2, root, eps,
            GRAD, PARAM, SCALED, BITS, ALIGNED, False, ROWS, COLS,
        )  # fmt: skip
    else:
        _update_tile(
            row, start, n, grad_scale, keep, step_size, rest1, beta2, rest2, root, eps,
            GRAD, PARAM, SCALED, BITS, ALIGNED, True, ROWS, COLS,
        )  # fmt: skip


class FusedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW fused with fp32 masters, clipping and rounding to bf16 in one pass.

    `param_groups` and `state` are those of the masters; an fp32 parameter is its own master. The gradient that the next
    step uses is the master's: a bf16 parameter's gradient is moved there as the backward pass computes it. It stays
    bf16 while it comes from one micro-batch, and is accumulated in fp32 from the second on. `state_dict` is that of
    torch.optim.AdamW, or that of optim.MasterWeights over it if a parameter is bf16, with fp32 moments for any
    state_bits.

    Attributes:
        params: the model's parameters in the order of the groups.
        masters: the updated fp32 tensors, in the same order.
        grad_scale: an fp32 scalar on the device that multiplies the gradients in the next step, then None again.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        masters: bool = True,
        wide_gradients: bool = False,
    ) -> None:
        """Make masters of bf16 parameters and take over their gradients.

        Args:
            params: tensors, (name, tensor) pairs or groups of either, as for torch.optim.AdamW.
            lr: learning rate; this and the next three may differ between groups and change between steps.
            betas: decay of the first and second moment.
            eps: added to the root of the second moment.
            weight_decay: fraction of the weight that a step at lr 1 removes.
            state_bits: 32, or 8 for moments in blocks of 256 with one fp32 scale per block.
            masters: keep fp32 masters. If False, the caller puts fp32 tensors into `param_groups` before the first
                step.
            wide_gradients: use fp32 gradients from the first micro-batch on, to sum them over ranks.

        Raises:
            ValueError: state_bits is neither, or a parameter is not contiguous or neither fp32 nor bf16.
        """
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits={state_bits} must be 8 or 32")
        self.params: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.grad_scale: Tensor | None = None
        self.state_bits, self.with_masters, self.wide_gradients = state_bits, masters, wide_gradients
        self._copies: dict[Tensor, Tensor] = {}  # master -> bf16 parameter
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch.optim.Optimizer does, and replace its parameters by their masters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        held = [self._hold(p) for p in group["params"]]
        self.params += group["params"]
        self.masters += held
        group["params"] = held

    def _hold(self, param: Tensor) -> Tensor:
        if not self.with_masters:
            return param
        if param.dtype not in TYPES or not param.is_contiguous():
            kind = f"{'' if param.is_contiguous() else 'non-contiguous '}{param.dtype}"
            raise ValueError(f"a parameter of shape {tuple(param.shape)} is {kind}, must be contiguous fp32 or bf16")
        if param.dtype is torch.float32:
            return param
        if any(param is p for p in self._copies.values()):
            raise ValueError("some parameters appear in more than one parameter group")
        master = param.detach().float()
        master.grad_dtype = None  # allow both types
        self._copies[master] = param
        param.register_post_accumulate_grad_hook(_take_gradient(master, wide=self.wide_gradients))
        return master

    def clip(self, clip_norm: float) -> Tensor:
        """Scale all gradients in the next step so that their global norm is at most `clip_norm`; 0 means no clipping.

        Returns:
            The norm before clipping, a float64 scalar.
        """
        norm = gradient_norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        if clip_norm:
            self.grad_scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0).float()
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            together = defaultdict(list)
            for master in group["params"]:
                if master.grad is not None:
                    done = self._count(master)
                    together[done, self._copies.get(master, master).dtype, master.grad.dtype].append(master)
            for (done, _, _), masters in together.items():
                self._launch(group, done, masters)
        self.grad_scale = None
        return loss

    def _count(self, master: Tensor) -> float:
        """Increment and return the step count of a tensor; create its state on the first call."""
        state = self.state[master]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in MOMENTS:
            if name not in state:
                state.update(self._kept(name, torch.zeros_like(master)))
        state["step"] += 1
        return state["step"].item()

    def _launch(self, group: dict[str, Any], done: float, masters: list[Tensor]) -> None:
        beta1, beta2, lr, eps = map(float, (*group["betas"], group["lr"], group["eps"]))
        gradients = [m.grad.contiguous() for m in masters]
        copies = [self._copies[m] for m in masters if m in self._copies]
        rows = tuple(
            (m.numel(), g.data_ptr(), m.data_ptr(), *_addresses(self.state[m]), copy.data_ptr() if copies else 0)
            for m, g, copy in zip(masters, gradients, copies or masters, strict=True)
        )
        device = masters[0].device
        tiles = tile_map(tuple(m.numel() for m in masters), ROWS * BLOCK, device)
        if len(tiles):
            _update[(len(tiles),)](
                table_of(rows, device), tiles, self.grad_scale if self.grad_scale is not None else tiles,
                1 - lr * group["weight_decay"], lr / (1 - beta1**done), 1 - beta1, beta2, 1 - beta2,
                math.sqrt(1 - beta2**done), eps,
                GRAD=TYPES[gradients[0].dtype], PARAM=TYPES[copies[0].dtype] if copies else None,
                SCALED=self.grad_scale is not None, BITS=self.state_bits, ALIGNED=are_aligned(rows),
                ROWS=ROWS, COLS=BLOCK, num_warps=WARPS if self.state_bits == 32 else NARROW_WARPS,
            )  # fmt: skip
        torch.autograd.graph.increment_version([*masters, *copies])

    def _kept(self, name: str, moment: Tensor) -> dict[str, Tensor]:
        """Return the state entries that hold an fp32 moment."""
        if self.state_bits == 32:
            return {name: moment}
        codes, largest = quantize_blocks(moment, is_signed=name == "exp_avg")
        return {name: codes, f"{name}_largest": largest}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of torch.optim.AdamW, inside that of optim.MasterWeights if a parameter is bf16.

        8-bit moments are dequantized exactly into host memory: loading restores the same 8 bits.
        """
        inner = super().state_dict()
        if self.state_bits == 8:
            inner["state"] = {index: _widened(state) for index, state in inner["state"].items()}
        return {"inner": inner, "masters": [m.detach() for m in self.masters]} if self._copies else inner

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state_dict of this class, of torch.optim.AdamW or of optim.MasterWeights over it.

        Raises:
            ValueError: it was made with amsgrad or maximize.
        """
        inner = state_dict["inner"] if self._copies else state_dict
        if any(group.get("amsgrad") or group.get("maximize") for group in inner["param_groups"]):
            raise ValueError("the optimizer's state was made with amsgrad or maximize, which FusedAdamW does not have")
        steps = {index: {"step": state["step"]} for index, state in inner["state"].items()}
        super().load_state_dict({**inner, "state": steps})
        indices = [index for group in inner["param_groups"] for index in group["params"]]
        for index, master in zip(indices, self.masters, strict=True):
            if index in inner["state"]:
                state = self.state[master]
                state["step"] = torch.tensor(float(state["step"]))
                for name in MOMENTS:  # one at a time: 8-bit moments are never all fp32 at once
                    moment = inner["state"][index][name].to(master, copy=True)
                    state.update(self._kept(name, moment.contiguous()))
                # what others keep in the state, such as a moving average of the weights
                rest = {k: v for k, v in inner["state"][index].items() if k not in ("step", *MOMENTS)}
                state.update({k: v.to(master, copy=True) for k, v in rest.items() if isinstance(v, Tensor)})
        if self._copies:
            for master, saved in zip(self.masters, state_dict["masters"], strict=True):
                master.copy_(saved)


def _take_gradient(master: Tensor, *, wide: bool) -> Callable[[Tensor], None]:
    """Return the hook that moves a parameter's gradient to its master."""

    def hook(param: Tensor) -> None:
        gradient, param.grad = param.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float() if wide else gradient
        elif master.grad.dtype is torch.float32:
            master.grad.add_(gradient)
        else:
            master.grad = master.grad.float().add_(gradient)

    return hook


def _addresses(state: dict[str, Tensor]) -> tuple[int, ...]:
    names = (*MOMENTS, *(f"{name}_largest" for name in MOMENTS))
    return tuple(state[name].data_ptr() if name in state else 0 for name in names)


def _widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    moments = {name: dequantize_blocks(state[name], state[f"{name}_largest"]).cpu() for name in MOMENTS}
    rest = {name: value for name, value in state.items() if not name.startswith(MOMENTS)}
    return {**rest, **moments}

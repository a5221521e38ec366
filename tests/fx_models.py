"""Eager modules as people write them, for the tests of tracing: nothing in them knows of plait."""

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


class RMS(nn.Module):
    def __init__(self, width: int, centered: bool = False) -> None:
        super().__init__()
        self.weight, self.centered = nn.Parameter(torch.rand(width)), centered

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * (1.0 + self.weight) if self.centered else self.weight * y


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def repeated(x: Tensor, r: int) -> Tensor:
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, r, t, d).reshape(b, g * r, t, d)


class Attention(nn.Module):
    """Heads first, keys and values shared by groups; `form` is eager, torch or window."""

    def __init__(self, width: int, heads: int, groups: int, dim: int, form: str) -> None:
        super().__init__()
        self.heads, self.groups, self.dim, self.form = heads, groups, dim, form
        sizes = {"q": heads, "k": groups, "v": groups}
        for name, n in sizes.items():
            self.add_module(name, nn.Linear(width, n * dim, bias=False))
        self.o = nn.Linear(heads * dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, -1, self.dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = (y * cos + rotate_half(y) * sin for y in (q, k))
        k, v = (repeated(y, self.heads // self.groups) for y in (k, v))
        return self.o(self.mixed(q, k, v, mask).transpose(1, 2).reshape(b, t, -1))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.form == "torch":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        t = q.shape[2]
        hidden = torch.full((t, t), -torch.inf, dtype=q.dtype).triu(1) if mask is None else mask
        if self.form == "window":
            i = torch.arange(t)
            near = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 3)
            hidden = torch.zeros(1, 1, t, t, dtype=q.dtype).masked_fill(~near, torch.finfo(q.dtype).min)
        logits = torch.matmul(q, k.transpose(2, 3)) * self.dim**-0.5 + hidden
        return torch.matmul(F.softmax(logits, -1), v)


class Block(nn.Module):
    def __init__(self, width: int, form: str, centered: bool) -> None:
        super().__init__()
        self.first, self.second = RMS(width, centered), RMS(width, centered)
        self.attention = Attention(width, 4, 2, 6, form)
        self.gate, self.up = nn.Linear(width, 30, bias=False), nn.Linear(width, 30, bias=False)
        self.down = nn.Linear(30, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.first(x), cos, sin, mask)
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, form: str = "eager", centered: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 20)
        self.layers = nn.ModuleList([Block(20, form, centered)])
        self.norm, self.head = RMS(20, centered), nn.Linear(20, 31, bias=False)
        self.register_buffer("inv_freq", 1.0 / 500.0 ** (torch.arange(0, 6, 2, dtype=torch.float64) / 6), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        angle = torch.arange(tokens.shape[1])[None, :, None].to(x.dtype) * self.inv_freq.to(x.dtype)
        both = torch.cat((angle, angle), -1)
        for layer in self.layers:
            x = layer(x, both.cos(), both.sin(), mask)
        return self.head(self.norm(x))


class GPT2(nn.Module):
    """Learned positions, layer norms with biases, a fused projection with transposed weights, gelu written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(31, 24), nn.Embedding(64, 24)
        self.first, self.second = nn.LayerNorm(24), nn.LayerNorm(24)
        self.w_qkv, self.b_qkv = nn.Parameter(0.1 * torch.randn(24, 72)), nn.Parameter(0.1 * torch.randn(72))
        self.out, self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 50), nn.Linear(50, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        b, t = tokens.shape
        x = self.embed(tokens) + self.places(torch.arange(t)[None])
        qkv = torch.addmm(self.b_qkv, self.first(x).view(-1, 24), self.w_qkv).view(b, t, 72)
        q, k, v = (y.view(b, t, 3, 8).transpose(1, 2) for y in qkv.split(24, 2))
        logits = (q @ k.transpose(-1, -2)) / 8**0.5
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        o = F.softmax(logits.masked_fill(~seen, -torch.inf), -1) @ v
        x = x + self.out(o.transpose(1, 2).reshape(b, t, 24))
        y = self.up(self.second(x))
        y = 0.5 * y * (1.0 + torch.tanh(0.7978845608028654 * (y + 0.044715 * y.pow(3))))
        return (x + self.down(y)) @ self.embed.weight.t()


def torch_chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Token by token, as its name says and in the layout that it has: [b t h d]."""
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    r = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(r, 2) for x in (query * query.shape[-1] ** -0.5, key))
    state = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    rows = list[Tensor]()
    for t in range(value.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        gap = value[:, t] - torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t] * beta[:, t, :, None], gap)
        rows.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(rows, 1), state if output_final_state else None


class Conv(nn.Module):
    """Depthwise and causal, over [b c t]."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, taps, groups=channels, padding=taps - 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x.transpose(1, 2))[:, :, : x.shape[1]]).transpose(1, 2)


class DeltaNet(nn.Module):
    """A gated delta net's mixer: projections, conv, gates, the rule, a gated norm."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_gates = nn.Linear(20, 2 * 2 * 6 + 4 * 5, bias=False), nn.Linear(20, 8, bias=False)
        self.w_z, self.out = nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)
        self.conv, self.norm = Conv(44, 4, bias=False), RMS(5)
        self.a_log, self.dt_bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.conv(self.w_in(x)).split([12, 12, 20], -1)
        beta, a = self.w_gates(x).chunk(2, -1)
        g = -self.a_log.exp() * F.softplus(a + self.dt_bias)
        parts = (q.reshape(b, t, 2, 6), k.reshape(b, t, 2, 6), v.reshape(b, t, 4, 5))
        o, _ = torch_chunk_gated_delta_rule(*parts, g=g, beta=beta.sigmoid(), use_qk_l2norm_in_kernel=True)
        o = self.norm(o) * F.silu(self.w_z(x).view(b, t, 4, 5))
        return self.out(o.reshape(b, t, 20))


def mamba2_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """Token by token: S_t = e^(dt A) S + dt B x^T, y = S^T C + D x."""
    dt = F.softplus(dt + dt_bias) if dt_softplus else dt
    r = x.shape[2] // B.shape[2]
    b, c = (y.repeat_interleave(r, 2) for y in (B, C))
    state, rows = x.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3]), list[Tensor]()
    for t in range(x.shape[1]):
        pushed = torch.einsum("bhn,bhp->bhnp", b[:, t] * dt[:, t, :, None], x[:, t])
        state = state * (dt[:, t] * A).exp()[..., None, None] + pushed
        rows.append(torch.einsum("bhn,bhnp->bhp", c[:, t], state))
    return torch.stack(rows, 1) + D[:, None] * x


class Mamba2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.out = nn.Linear(20, 24 + 24 + 2 * 2 * 5 + 4, bias=False), nn.Linear(24, 20, bias=False)
        self.conv, self.norm = Conv(44, 3, bias=True), RMS(24)
        self.a_log, self.dt_bias, self.d = (nn.Parameter(torch.rand(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        z, xbc, dt = self.w_in(x).split([24, 44, 4], -1)
        v, k, q = self.conv(xbc).split([24, 10, 10], -1)
        parts = (v.view(b, t, 4, 6), dt, -self.a_log.exp(), k.view(b, t, 2, 5), q.view(b, t, 2, 5))
        y = mamba2_chunk_scan(*parts, chunk_size=16, D=self.d, dt_bias=self.dt_bias, dt_softplus=True)
        return self.out(self.norm(y.reshape(b, t, 24) * F.silu(z)))


def mamba_selective_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Tensor:  # fmt: skip
    """Token by token, [b c t]: S_t = e^(dt A) S + dt x B^T, y = (S C + D x) silu(z)."""
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    state, columns = hidden_states.new_zeros(*hidden_states.shape[:2], A.shape[1]), list[Tensor]()
    for t in range(dt.shape[2]):
        step, x = dt[:, :, t, None], hidden_states[:, :, t, None]
        state = (step * A).exp() * state + step * x * B[:, None, :, t]
        columns.append((state @ C[:, :, t, None])[..., 0])
    y = torch.stack(columns, -1) + D[:, None] * hidden_states
    return y * F.silu(z)


class Mamba1(nn.Module):
    """Channels stand before tokens, the projection of steps is a product of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.out = nn.Linear(20, 24, bias=False), nn.Linear(12, 20, bias=False)
        self.conv = nn.Conv1d(12, 12, 4, groups=12, padding=3)
        self.x_proj, self.w_step = nn.Linear(12, 3 + 2 * 5, bias=False), nn.Parameter(torch.rand(12, 3))
        self.a_log, self.dt_bias, self.d = (nn.Parameter(torch.rand(*n)) for n in ((12, 5), (12,), (12,)))

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.w_in(x).transpose(1, 2).chunk(2, 1)
        h = F.silu(self.conv(h)[..., : x.shape[1]])
        step, b, c = self.x_proj(h.transpose(1, 2)).split([3, 5, 5], -1)
        parts = (h, self.w_step @ step.transpose(1, 2), -self.a_log.exp(), b.transpose(1, 2), c.transpose(1, 2))
        y = mamba_selective_scan(*parts, D=self.d, z=gate, delta_bias=self.dt_bias, delta_softplus=True)
        return self.out(y.transpose(1, 2))


class Experts(nn.Module):
    """Stacked gated experts; which rows an expert has depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.3 * torch.randn(5, 2 * 7, 12))
        self.down_proj = nn.Parameter(0.3 * torch.randn(5, 12, 7))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        made = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            row, slot = torch.where(top_k_index == e)
            gate, up = F.linear(hidden_states[row], self.gate_up_proj[e]).chunk(2, -1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[e]) * top_k_weights[row, slot, None]
            made = made.index_add(0, row, y)
        return made


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(12, 5, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        flat = x.view(-1, d)
        shares, chosen = F.softmax(self.gate(flat), -1).topk(2, -1)
        return self.experts(flat, chosen, shares / shares.sum(-1, keepdim=True)).view(b, t, d)

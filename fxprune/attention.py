"""Attention of torch.nn in a form that can be traced and may have any sizes, with the same parameter names.

`nn.MultiheadAttention` asserts that queries, keys and values are as wide as the embedding, and the layers of
`nn.Transformer` ask for shapes and fast paths that a symbolic trace cannot answer. Before tracing, a copy of the model
gets the classes of this module in their place; the parameters are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` of any number of heads and any head dims.

    Attributes:
        sizes: rows of the projections of query, key and value.
        scale: of the scores; that of the dense network, whatever the head dims are now.
    """

    sizes: tuple[int, int, int]
    scale: float

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Turn an `nn.MultiheadAttention` into one of these."""
        assert isinstance(module, nn.MultiheadAttention)
        sizes, scale = (module.embed_dim,) * 3, float(module.head_dim) ** -0.5
        module.__class__ = MultiheadAttention
        vars(module).update(sizes=sizes, scale=scale)

    @staticmethod
    def asked_for_weights(*args: Any, need_weights: bool = True, **kwargs: Any) -> bool:
        """Say whether a call of forward with these arguments returns the attention weights."""
        return bool(args[4]) if len(args) > 4 else need_weights

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `nn.MultiheadAttention` does.

        Args:
            query: (b, l, e), or (l, b, e) without `batch_first`, or (l, e).
            key: (b, s, e_k) or likewise.
            value: (b, s, e_v) or likewise.
            key_padding_mask: (b, s) or (s,), bool (True: not attended to) or float (added to the scores).
            need_weights: return the attention weights too.
            attn_mask: (l, s) or (b * heads, l, s), bool or float.
            average_attn_weights: return weights averaged over the heads.
            is_causal: a hint that `attn_mask` is the causal mask; the mask says it all.

        Returns:
            The result, of the query's layout, and the weights, (b, l, s) or (b, heads, l, s), or None.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask too.")
        batched = query.ndim == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        mask = self._mask(attn_mask, key_padding_mask, q)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        out, weights = self._attended(q, k, v, mask, need_weights)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        out = out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1)
        if weights is None:
            return out, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        sizes, bias = list(self.sizes), self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).split(sizes, dim=-1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(sizes)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = [None] * 3 if bias is None else bias.split(sizes)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Add up the masks as what is added to the scores: broadcasts to (b, heads, l, s)."""
        total = None
        if attn_mask is not None:
            wide = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            total = _added(wide, like)
        if key_padding_mask is not None:
            rows = key_padding_mask if key_padding_mask.ndim == 2 else key_padding_mask.unsqueeze(0)
            padding = _added(rows.unsqueeze(1).unsqueeze(1), like)
            total = padding if total is None else total + padding
        extra = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(total, (0, extra)) if total is not None and extra else total

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale), None
        scores = (q * self.scale) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights @ v, weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """An encoder layer without fast path."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend and feed forward; arguments and result as in `nn.TransformerEncoderLayer`."""
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(src + self._ff_block(src))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """A decoder layer that a trace walks through."""


class TransformerEncoder(nn.TransformerEncoder):
    """An encoder without fast path."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run the layers; arguments and result as in `nn.TransformerEncoder`."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.TransformerDecoder):
    """A decoder that does not ask for shapes."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Run the layers; arguments and result as in `nn.TransformerDecoder`."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                bool(tgt_is_causal),
                memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Transformer):
    """An encoder and a decoder, without checks of shapes."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encode and decode; arguments and result as in `nn.Transformer`."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        return self.decoder(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )


_TRACEABLE = {
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}


def make_traceable(modules: Iterable[nn.Module]) -> None:
    """Give the attention modules of torch.nn among those of a copy of a model the classes of this module."""
    for module in modules:
        if type(module) is nn.MultiheadAttention:
            MultiheadAttention.adopt(module)
        elif type(module) in _TRACEABLE:
            module.__class__ = _TRACEABLE[type(module)]

"""The multi-token prediction layer: drafts the token after next from the trunk's hidden state and the next token.

Shape legend: T packed tokens, D hidden, K selected positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm5_port import operators as ops
from glm5_port.config import Glm5Config
from glm5_port.model.bindings import Binder, BoundLayer
from glm5_port.model.cache import LayerCache
from glm5_port.model.layers import DecoderLayer, Norm, Options, Step


class MtpLayer(nn.Module):
    """u_i = out_norm(decoder_layer(W_eh [rms_norm_e(embedding(t_{i+1})) | rms_norm_h(h_i)]))

    h_i is the trunk's hidden state after its final norm; for further drafts it is this layer's own output, also after its norm
    (recycling the state before the norm collapses acceptance from the second draft on). The layer has its own indexer, always;
    embedding and head are the trunk's. Position i keeps rope position i. The embedding at position 0 is used as it is.
    Source: GLM-5 layer `num_hidden_layers`; spec section "MTP layer".
    """

    def __init__(self, config: Glm5Config, bind: Binder, options: Options) -> None:
        super().__init__()
        self.embedding_norm = BoundLayer(bind(ops.rms_norm))
        self.hidden_norm = BoundLayer(bind(ops.rms_norm))
        self.join = BoundLayer(bind(ops.linear, width_in=2 * config.hidden_size, width_out=config.hidden_size))
        self.layer = DecoderLayer(config, bind, config.num_hidden_layers, options)
        self.norm = Norm(config, bind)
        self.eps = config.rms_norm_eps

    def forward(
        self, hidden_TD: Tensor, next_embedding_TD: Tensor, step: Step, cache: LayerCache, indices_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Args: hidden_TD, h_i; next_embedding_TD, embedding of t_{i+1}; indices_TK, the first draft's selection when drafts
        share it, else None. Returns: u_i [T, D], and the selection used."""
        embedded_TD = self.embedding_norm(x=next_embedding_TD, eps=self.eps)
        carried_TD = self.hidden_norm(x=hidden_TD, eps=self.eps)
        block_TD = self.join(torch.cat([embedded_TD, carried_TD], dim=-1))
        block_TD, residual_TD, indices_TK = self.layer(block_TD, torch.zeros_like(block_TD), step, cache, indices_TK)
        return self.norm(block_TD, residual_TD)[0], indices_TK

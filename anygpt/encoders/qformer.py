"""BLIP-2's Q-Former as a projector, on either side of the language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class QFormerProjection(nn.Module):
    """`num_queries` learned queries that attend to the features of each input (arXiv 2301.12597), then one Linear.

    Wraps transformers' `Blip2QFormerModel`, of `num_layers` layers of `width`. Queries are initialized randomly:
    identical ones would stay identical.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, num_queries, width) * 0.02)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                encoder_hidden_size=in_features,
                intermediate_size=ffn_dim,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.output = nn.Linear(width, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, n, in_features)` to `(B, num_queries, out_features)`."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        return self.output(self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state)

"""`OutputProjector`: maps the language model's states at a signal span to a decoder's condition."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from anygpt.decoders.conditions import Condition
from anygpt.encoders.projector import QFormerProjection
from anygpt.errors import InputError


class OutputProjectorConfig(PreTrainedConfig):
    """Type and sizes of an output projector.

    Args:
        projection_type: `linear` (one Linear on the flattened span), `mlp` (two, with `activation` between them),
            `transformer` (the paper's: in-projection, encoder and decoder layers, one learned query per condition
            token; arXiv 2309.05519, §3 and its code), `qformer` (BLIP-2's, without the encoder layers) or `perceiver`
            (one layer, in which one query per condition token attends to the states and the other queries,
            `num_decoder_layers` times with the same weights, as in arXiv 2103.03206: small for wide conditions).
        in_features: `H`, width of the language model's states.
        num_signal_tokens: `N`.
        condition_shape: `(T, D)` of the decoder.
        pooled_dim: `P` if the decoder has a pooled condition, computed by a second head.
        masked: whether a third head computes the mask's logits (see `Condition`); at first all tokens are real.
        activation: any name in `transformers.activations.ACT2FN`.
        d_model, num_encoder_layers, num_decoder_layers, num_attention_heads, ffn_dim: sizes; the paper's by default.
        linear_path: for `transformer` and `perceiver`: add the output of a Linear, which a ridge solution can set.
            Their own output then starts at zero and learns the residual.
    """

    model_type = "anygpt_output_projector"

    projection_type: str = "transformer"
    in_features: int | None = None
    num_signal_tokens: int | None = None
    condition_shape: list[int] | tuple[int, ...] | None = None
    pooled_dim: int | None = None
    masked: bool = False
    activation: str = "gelu"
    d_model: int = 512
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    num_attention_heads: int = 4
    ffn_dim: int = 2048
    linear_path: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        known = ", ".join(_BUILDERS)
        if self.projection_type not in _BUILDERS:
            raise InputError(f"unknown output projector type {self.projection_type!r}; expected {known}")
        if self.activation not in ACT2FN:
            raise InputError(f"unknown activation {self.activation!r}; expected one of {', '.join(sorted(ACT2FN))}")
        self.condition_shape = None if self.condition_shape is None else list(self.condition_shape)


class OutputProjector(PreTrainedModel):
    """Maps `(K, N, H)` states at signal spans to a `Condition`: embeds `(K, T, D)`, and pooled part and mask if any.

    `projection`, a module of your own that maps the states to `(K, T, D)`, replaces the one built from the config. An
    `InputError` names sizes missing in the config.
    """

    config_class = OutputProjectorConfig
    base_model_prefix = "projection"

    def __init__(self, config: OutputProjectorConfig, projection: nn.Module | None = None):
        super().__init__(config)
        missing = [n for n in ("in_features", "num_signal_tokens", "condition_shape") if getattr(config, n) is None]
        if missing:
            raise InputError(f"an output projector needs {', '.join(missing)} in its OutputProjectorConfig")
        self.projection = projection if projection is not None else _BUILDERS[config.projection_type](config)
        flat = config.num_signal_tokens * config.in_features
        self.pooled_head = nn.Linear(flat, config.pooled_dim) if config.pooled_dim is not None else None
        self.mask_head = nn.Linear(flat, config.condition_shape[0]) if config.masked else None
        if self.mask_head is not None:
            nn.init.zeros_(self.mask_head.weight)
            nn.init.zeros_(self.mask_head.bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: modules keep their constructors' initialisation."""

    @property
    def line(self) -> nn.Linear | None:
        """The Linear from the flattened span to all condition tokens, if there is one."""
        if isinstance(self.projection, FlatProjection) and isinstance(self.projection.layers, nn.Linear):
            return self.projection.layers
        return self.projection.line.layers if getattr(self.projection, "line", None) is not None else None

    def forward(self, states: Tensor) -> Condition:
        """Project `(K, N, H)` of any float dtype, in the dtype of the projector's parameters."""
        states = states.to(next(self.parameters()).dtype)
        pooled = None if self.pooled_head is None else self.pooled_head(states.flatten(1))
        mask = None if self.mask_head is None else self.mask_head(states.flatten(1))
        return Condition(self.projection(states), pooled, mask)


class FlatProjection(nn.Module):
    """One or two Linears from the concatenated `N` states to all `T` condition tokens."""

    def __init__(self, config: OutputProjectorConfig):
        super().__init__()
        inputs = config.num_signal_tokens * config.in_features
        outputs = config.condition_shape[0] * config.condition_shape[1]
        if config.projection_type != "mlp":
            self.layers = nn.Linear(inputs, outputs)
        else:
            self.layers = nn.Sequential(
                nn.Linear(inputs, config.d_model), ACT2FN[config.activation], nn.Linear(config.d_model, outputs)
            )
        self.condition_shape = tuple(config.condition_shape)

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states.flatten(1)).unflatten(1, self.condition_shape)


class TransformerProjection(nn.Module):
    """In-projection, a transformer with a learned query for each condition token, and out-projection.

    The transformer is the paper's `nn.Transformer`, or a perceiver's repeated layer; pre-norm, without dropout. Queries
    start random, because identical ones would stay identical.
    """

    def __init__(self, config: OutputProjectorConfig):
        super().__init__()
        tokens, width = config.condition_shape
        if config.d_model % config.num_attention_heads:
            raise InputError(
                f"an output projector has d_model={config.d_model}, expected a multiple of num_attention_heads, "
                f"{config.num_attention_heads}"
            )
        layer: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer |= {"d_model": config.d_model, "nhead": config.num_attention_heads, "dim_feedforward": config.ffn_dim}
        depth = config.num_decoder_layers
        self.input = nn.Linear(config.in_features, config.d_model)
        self.queries = nn.Parameter(torch.randn(1, tokens, config.d_model))
        if config.projection_type == "perceiver":
            self.transformer = RepeatedLayer(nn.TransformerDecoderLayer(**layer), depth, config.d_model)
        else:
            # Built here because nn.Transformer's own encoder warns that pre-norm has no fast path.
            one, norm = nn.TransformerEncoderLayer(**layer), nn.LayerNorm(config.d_model)
            encoder = nn.TransformerEncoder(one, config.num_encoder_layers, norm, enable_nested_tensor=False)
            self.transformer = nn.Transformer(**layer, num_decoder_layers=depth, custom_encoder=encoder)
        self.output = nn.Linear(config.d_model, width)
        self.line = None
        if config.linear_path:
            self.line = FlatProjection(config)
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, states: Tensor) -> Tensor:
        queries = self.queries.expand(states.shape[0], -1, -1)
        output = self.output(self.transformer(self.input(states), queries))
        return output if self.line is None else output + self.line(states)


class RepeatedLayer(nn.Module):
    """One decoder layer, applied several times with the same weights, and a norm."""

    def __init__(self, layer: nn.TransformerDecoderLayer, repetitions: int, width: int):
        super().__init__()
        self.layer, self.repetitions, self.norm = layer, repetitions, nn.LayerNorm(width)

    def forward(self, states: Tensor, queries: Tensor) -> Tensor:
        for _ in range(self.repetitions):
            queries = self.layer(queries, states)
        return self.norm(queries)


def _qformer(config: OutputProjectorConfig) -> nn.Module:
    tokens, width = config.condition_shape
    return QFormerProjection(
        config.in_features,
        width,
        tokens,
        hidden_size=config.d_model,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_decoder_layers,
        num_attention_heads=config.num_attention_heads,
    )


_BUILDERS = {
    "linear": FlatProjection,
    "mlp": FlatProjection,
    "transformer": TransformerProjection,
    "qformer": _qformer,
    "perceiver": TransformerProjection,
}

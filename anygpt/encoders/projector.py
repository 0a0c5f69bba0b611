"""`MultimodalProjector`: maps encoder features to the language model's embedding space."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ModelOutput

from anygpt.errors import InputError

PROJECTION_TYPES = ("linear", "mlp", "pooled", "qformer", "merger")
FIXED_LAYOUT_ONLY = ("pooled", "qformer")
"""Types that mix all features of an input, so that inputs must not be packed or padded."""


def hidden_size_of(config: Any) -> int:
    """Output width of a part, under whichever name its config has it; an `InputError` if it has none."""
    for name in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise InputError(
        f"cannot tell the feature size of {type(config).__name__}; give the module a projector with "
        "MultimodalProjectorConfig(in_features=…, out_features=…)"
    )


def first_of(output: Any) -> Tensor:
    """The features in an encoder's output: its first entry, or the tensor itself."""
    return output if isinstance(output, Tensor) else output[0]


def with_features(output: Any, features: Any) -> Any:
    """A `ModelOutput` or tuple with its first entry replaced; `features` itself for a tensor."""
    if isinstance(output, ModelOutput):
        return type(output)(**(dict(output) | {next(iter(output.keys())): features}))
    return features if isinstance(output, Tensor) else (features, *output[1:])


class MultimodalProjectorConfig(PreTrainedConfig):
    """Config of a `MultimodalProjector`.

    Args:
        encoder_config: config of the encoder, the default source of `in_features`.
        text_config: config of the language model, the default source of `out_features`.
        projection_type: `linear` (one Linear), `mlp` (two, with `activation` between them), `pooled` (mean of an
            input's or of each clip's features, then one Linear, as in NExT-GPT, arXiv 2309.05519), `qformer` (BLIP-2,
            arXiv 2301.12597: `num_query_tokens` learned queries attend to the features) or `merger` (Qwen2-VL, arXiv
            2409.12191: `merge_size²` consecutive features become one).
        activation: a key of `transformers.activations.ACT2FN`; used by `mlp`.
        in_features, out_features: sizes, in place of the two configs.
        num_query_tokens, num_hidden_layers, num_attention_heads: used by `qformer`; an input becomes
            `num_query_tokens` features.
        merge_size: used by `merger`.
        pool_size: used by `pooled`: consecutive features to average; all of the input's if None.
        bias: whether the Linears of `linear`, `mlp` and `pooled` have a bias.
    """

    model_type = "anygpt_projector"

    def __init__(
        self,
        encoder_config: PreTrainedConfig | None = None,
        text_config: PreTrainedConfig | None = None,
        projection_type: str = "linear",
        activation: str = "gelu",
        in_features: int | None = None,
        out_features: int | None = None,
        num_query_tokens: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        merge_size: int = 2,
        pool_size: int | None = None,
        bias: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if projection_type not in PROJECTION_TYPES:
            raise InputError(f"unknown projector type {projection_type!r}; expected {', '.join(PROJECTION_TYPES)}")
        if activation not in ACT2FN:
            raise InputError(f"unknown activation {activation!r}; expected one of {', '.join(sorted(ACT2FN))}")
        self.projection_type = projection_type
        self.activation = activation
        self.in_features = hidden_size_of(encoder_config) if in_features is None and encoder_config else in_features
        self.out_features = hidden_size_of(text_config) if out_features is None and text_config else out_features
        self.num_query_tokens = num_query_tokens
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.merge_size = merge_size
        self.pool_size = pool_size
        self.bias = bias

    def features_after(self, count: int) -> int:
        """Number of output features of an input that has `count` features."""
        if self.projection_type == "qformer":
            return self.num_query_tokens
        if self.projection_type == "pooled":
            return 1 if self.pool_size is None else count // self.pool_size
        return count // self.merge_size**2 if self.projection_type == "merger" else count


class MultimodalProjector(PreTrainedModel):
    """Maps features `(items, n, in_features)` to `(items, n', out_features)`; see `features_after` for n'.

    Wraps `projection`, which is called with the features, or a module built from the config; an `InputError` names
    missing sizes, or features of another width.
    """

    config_class = MultimodalProjectorConfig
    base_model_prefix = "projection"

    def __init__(self, config: MultimodalProjectorConfig, projection: nn.Module | None = None):
        super().__init__(config)
        self.projection = projection if projection is not None else _build(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initialization of the modules' constructors."""

    def forward(self, features: Tensor | ModelOutput | tuple) -> Any:
        """Project a tensor, or the first entry of an encoder's output, which keeps its type and its other entries."""
        given, expected = first_of(features), self.config.in_features
        if expected is not None and given.shape[-1] != expected:
            raise InputError(
                f"the encoder gives features of size {given.shape[-1]}, but its projector expects {expected}"
            )
        # A frozen encoder may run in half precision, while the projector's parameters are in fp32.
        dtype = next((p.dtype for p in self.projection.parameters()), given.dtype)
        return with_features(features, self.projection(given.to(dtype)))


class PooledProjection(nn.Module):
    """Mean of all features, or of each run of `pool_size`, followed by one Linear."""

    def __init__(self, config: MultimodalProjectorConfig):
        super().__init__()
        self.pool_size = config.pool_size
        self.linear = nn.Linear(config.in_features, config.out_features, bias=config.bias)

    def forward(self, features: Tensor) -> Tensor:
        """`(items, n, in_features)` to `(items, 1, out_features)`, or `(items, n / pool_size, out_features)`."""
        if features.dim() != 3:
            raise InputError(
                f"a pooled projector needs features of shape (items, n, {self.linear.in_features}), not "
                f"{tuple(features.shape)}: packed ones do not tell where an input ends"
            )
        return self.linear(features.unflatten(1, (-1, self.pool_size or features.shape[1])).mean(dim=2))


class MergerProjection(nn.Module):
    """Concatenation of `merge_size²` consecutive features, followed by two Linears: Qwen2-VL's patch merger."""

    def __init__(self, config: MultimodalProjectorConfig):
        super().__init__()
        self.group = config.merge_size**2
        width = config.in_features * self.group
        self.norm = nn.LayerNorm(config.in_features, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_features))

    def forward(self, features: Tensor) -> Tensor:
        """`(…, n, in_features)` to `(…, n / merge_size², out_features)`."""
        return self.mlp(self.norm(features).unflatten(-2, (-1, self.group)).flatten(-2))


class QFormerProjection(nn.Module):
    """`num_queries` learned queries that attend to the features of each input (arXiv 2301.12597), then one Linear.

    Wraps transformers' `Blip2QFormerModel`, whose config takes `sizes`. Queries are initialized randomly: identical
    ones would stay identical.
    """

    def __init__(self, in_features: int, out_features: int, num_queries: int, **sizes: int):
        super().__init__()
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = Blip2QFormerConfig(encoder_hidden_size=in_features, **sizes, **no_dropout)
        self.queries = nn.Parameter(torch.randn(1, num_queries, config.hidden_size) * 0.02)
        self.qformer = Blip2QFormerModel(config)
        self.output = nn.Linear(config.hidden_size, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, n, in_features)` to `(B, num_queries, out_features)`."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        return self.output(self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state)


def _build(config: MultimodalProjectorConfig) -> nn.Module:
    sizes = config.in_features, config.out_features
    if None in sizes:
        raise InputError(
            f"a projector needs both sizes, got in_features={sizes[0]} and out_features={sizes[1]}; give "
            "MultimodalProjectorConfig the encoder's and the language model's config, or the sizes themselves"
        )
    if config.projection_type == "linear":
        return nn.Linear(*sizes, bias=config.bias)
    if config.projection_type == "mlp":
        first, second = nn.Linear(*sizes, bias=config.bias), nn.Linear(sizes[1], sizes[1], bias=config.bias)
        return nn.Sequential(first, ACT2FN[config.activation], second)
    if config.projection_type == "pooled":
        return PooledProjection(config)
    if config.projection_type == "merger":
        return MergerProjection(config)
    return QFormerProjection(
        *sizes,
        config.num_query_tokens,
        hidden_size=config.in_features,
        intermediate_size=4 * config.in_features,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
    )

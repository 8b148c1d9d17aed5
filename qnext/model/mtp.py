"""Multi-token prediction: one more layer, which reads the trunk and the next token and predicts the token after that.

Legend: T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.batch import Batch
from qnext.model.layers import Linear, make_norm


class MultiTokenPredictor(nn.Module):
    """fc(concat[norm(embedding of token i + 1), norm(hidden i)]), a full-attention layer, a norm.

    The embedding half comes first. The embedding table and the head are those of the trunk.
    """

    def __init__(self, config: ModelConfig, layer: nn.Module) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.pre_fc_norm_embedding = make_norm(config, hidden)
        self.pre_fc_norm_hidden = make_norm(config, hidden)
        self.fc = Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([layer])
        self.norm = make_norm(config, hidden)

    def forward(self, embedding_TD: Tensor, hidden_TD: Tensor, batch: Batch, rope: ops.Rope) -> Tensor:
        both_TX = ops.concat(self.pre_fc_norm_embedding(embedding_TD), self.pre_fc_norm_hidden(hidden_TD))
        return self.norm(self.layers[0](self.fc(both_TX), batch, rope))

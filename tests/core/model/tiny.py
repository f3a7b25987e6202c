"""The facts of a model of two layers, small enough for float64 and finite differences."""

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_size": 48,
    "max_positions": 64,
    "initializer_range": 0.3,
}

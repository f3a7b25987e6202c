"""The angles of the native executor against torch's, whose frequencies are the reference's."""

import numpy as np
import pytest
import torch

from llmctl.core.config.model import ModelConfig, RopeScaling
from llmctl.core.model.frequencies import angles
from llmctl.core.model.rope import Rope

SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", parameters={"factor": 3.0}),
    "dynamic": RopeScaling(kind="dynamic", parameters={"factor": 2.0}),
    "llama3": RopeScaling(
        kind="llama3",
        parameters={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "yarn": RopeScaling(kind="yarn", parameters={"factor": 4.0, "original_max_position_embeddings": 1024}),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_angles_are_torchs(scaling: str, theta: float) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 96, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_size": 8}
    config = ModelConfig(**sizes, head_dim=96, max_positions=1024, rope_theta=theta, rope_scaling=SCALINGS[scaling])
    cosines, sines = angles(config, 1024)
    want = Rope(config).cos_sin(torch.arange(1024)[None], dtype=torch.float32, device=torch.device("cpu"))
    # a float32 frequency may differ in its last bit, which 1024 positions multiply
    for got, table in zip((cosines, sines), want, strict=True):
        assert np.abs(got - table[0, 0].numpy()).max() < 1024 * 2**-23

"""Embeddings that training starts from, from a file of word vectors. Knows names of tokens; knows no loop."""

from pathlib import Path

import torch

from llmctl.core.config.model import ModelConfig
from llmctl.core.data.wordvectors import read_vectors, vector_names
from llmctl.core.errors import InputError
from llmctl.core.model import Decoder
from llmctl.core.tokenizer import Tokenizer


class Vectors:
    """The vectors of a file that belong to tokens: `ids` (n,) and `numbers` (n, C)."""

    def __init__(self, path: Path, tokenizer: Tokenizer, architecture: ModelConfig) -> None:
        """Read those that are wanted. Raises NotFoundError, or InputError when the size is another, or when none belongs."""
        ids = {name: i for i, name in vector_names(tokenizer).items()}
        found: dict[int, torch.Tensor] = {}
        for name, numbers in read_vectors(path):
            if len(numbers) != architecture.hidden_size:
                raise InputError(
                    f"--init-embeddings {path}: vectors of {len(numbers)} numbers, the model's embeddings have {architecture.hidden_size}"
                )
            if name in ids:
                found.setdefault(ids[name], torch.from_numpy(numbers))  # of a word given twice the first, as gensim has it
        if not found:
            raise InputError(f"--init-embeddings {path}: none of its words is a token of this tokenizer (which writes ' the' as 'Ġthe')")
        self.ids, self.numbers = torch.tensor(list(found)), torch.stack(list(found.values()))
        self.num_tokens = len(ids)

    def put_into(self, model: Decoder) -> None:
        """Replace the embeddings of those tokens; the others keep what they have."""
        with torch.no_grad():
            model.embed.weight[self.ids] = self.numbers.to(model.embed.weight)
